"""What a request takes of the pool, next and at most, and whether it can ever fit. Integers only."""

from dataclasses import dataclass

from memphi.engine.sequence import Sequence
from memphi.memory.costs import FIRST_ANSWER_TOKENS


@dataclass(frozen=True)
class Refuse:
    """It never fits."""

    needed_tokens: int
    available_tokens: int
    advice: str


def stretched(sequence: Sequence) -> int:
    """Tokens to reserve for next: those there are and a stretch of answer, no more than there will ever be."""
    return min(sequence.length + FIRST_ANSWER_TOKENS, computed_at_most(sequence))


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
