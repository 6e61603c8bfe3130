"""The hand-over between deciding a step and doing it; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memphi.cache.media import MediaEntry
from memphi.engine.sequence import Sequence as Running
from memphi.engine.sequence import State
from memphi.errors import RequestError
from memphi.request import MediaKind, TokenLogprob


@dataclass  # Not frozen, though nobody changes it: one is made for every row of every step, three times as fast so.
class PlannedRow:
    """One sequence's share of a step: `tokens` of its ids and drafts from `past` on, on pages that hold all of them."""

    sequence: Running
    past: int
    tokens: int
    pages: tuple[int, ...] = ()
    """All that the sequence holds, perhaps more than these; empty where nothing is cached: then the row is whole."""
    drafts: tuple[int, ...] = ()
    """Guesses of what follows the last known id; then the row ends with them."""
    follows: bool = False
    """Whether its one id is what the step before chooses: when it was planned, nobody knew that yet."""
    losses: int = 0
    """The sequence's, when it was planned."""

    @property
    def samples(self) -> bool:
        """Whether the row reaches the last known id, so that the next one can be chosen."""
        return self.follows or self.past + self.tokens == len(self.sequence.ids) + len(self.drafts)

    @property
    def scored(self) -> int:
        """At how many of its last places an id is chosen: after the last known id, and after each draft."""
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def stands(self) -> bool:
        """Whether its sequence is still where the row begins: it has not ended, been paused or gone another way."""
        sequence = self.sequence
        stays = sequence.state is State.RUNNING and sequence.losses == self.losses
        return stays and sequence.computed == self.past

    def begun_pages(self, page_tokens: int) -> tuple[int, ...]:
        """The pages whose first token the row writes: the only ones that may have no memory behind them yet.

        A page with a token of the row's past was given some for the step that wrote it, and nobody trims the pool of a
        page that a sequence holds. One that was taken for a step that failed is begun by the step that is done instead.
        """
        first, end = -(-self.past // page_tokens), -(-(self.past + self.tokens) // page_tokens)
        return self.pages[first:end] if first < end else ()

    @property
    def ids(self) -> list[int]:
        return [*self.sequence.ids[self.past : self.past + self.tokens], *self.drafts]


@dataclass(frozen=True)
class EncodeSlice:
    """Some units of one attachment to encode: crops of an image, or windows of a clip."""

    sequence: Running
    entry: MediaEntry[Any]
    """Where its embeddings go."""
    kind: MediaKind
    index: int
    """Counts within its kind in the sequence's prompt."""
    first: int
    units: int


@dataclass(frozen=True)
class StepPlan:
    """The attachments to encode and the rows to compute in one step."""

    rows: tuple[PlannedRow, ...]
    slices: tuple[EncodeSlice, ...] = ()

    def standing(self) -> "StepPlan":
        """The same without rows whose sequences went another way meanwhile: what they bring counts for nothing."""
        return replace(self, rows=tuple([row for row in self.rows if row.stands]))

    def __bool__(self) -> bool:
        return bool(self.rows or self.slices)


@dataclass(frozen=True)
class StepResult:
    """What a step brought to the rows that reached their ends, by sequence id."""

    sampled: Mapping[int, Sequence[int]]
    """The ids that were chosen: those that drafts foretold, and the one after them."""
    logprobs: Mapping[int, Sequence[TokenLogprob]] = field(default_factory=dict)
    """How likely they were, where that was asked for."""
    failed: Mapping[int, RequestError] = field(default_factory=dict)
    """Sequences that cannot go on, each by its own fault."""
