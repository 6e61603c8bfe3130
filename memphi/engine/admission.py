"""May a sequence enter? Its price in pages against what is left. Integers only; the scheduler asks."""

from dataclasses import dataclass

from memphi.engine.sequence import Sequence

STRETCH_TOKENS = 256
"""How much of an answer is reserved at once: its beginning at admission, more as it grows."""


@dataclass(frozen=True)
class Admit:
    """It may enter, with so many pages."""

    pages: int


@dataclass(frozen=True)
class Wait:
    """It fits, but not now."""


@dataclass(frozen=True)
class Refuse:
    """It never fits."""

    needed_tokens: int
    available_tokens: int
    advice: str


@dataclass(frozen=True)
class Room:
    """What there is, in pages: in all, and unclaimed."""

    capacity_pages: int
    available_pages: int
    page_tokens: int

    @property
    def tokens(self) -> int:
        return self.capacity_pages * self.page_tokens


def admit(sequence: Sequence, room: Room) -> Admit | Wait:
    """Weigh a sequence that was accepted: the tokens it has and a first stretch of answer."""
    pages = -(-stretched(sequence) // room.page_tokens)
    return Admit(pages) if pages <= room.available_pages else Wait()


def stretched(sequence: Sequence) -> int:
    """Tokens to reserve for next: those there are and a stretch of answer, no more than there will ever be."""
    return min(sequence.length + STRETCH_TOKENS, computed_at_most(sequence))


def computed_at_most(sequence: Sequence) -> int:
    """Tokens whose keys and values are ever needed: the answer's last one is never read again."""
    return sequence.footprint.prompt_tokens + sequence.max_tokens - 1


def refuse(prompt_tokens: int, max_tokens: int | None, tokens: int) -> Refuse | None:
    """Whether a request can never fit into so many tokens, and what would; max_tokens None: as many as fit."""
    needed = prompt_tokens + (max_tokens or 1) - 1
    if needed <= tokens:
        return None
    rest = tokens - prompt_tokens + 1
    if rest >= 1:
        return Refuse(needed, tokens, f"ask for an answer of at most {rest} tokens (--max-tokens {rest})")
    return Refuse(needed, tokens, "shorten the text, send fewer or smaller attachments, or give more --memory")
