"""The hand-over between deciding a step and doing it; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memphi.cache.media import MediaEntry
from memphi.engine.sequence import Sequence
from memphi.request import MediaKind


@dataclass(frozen=True)
class PlannedRow:
    """One sequence's share of a step: `tokens` of its ids from `past` on, on pages that hold all of them."""

    sequence: Sequence
    past: int
    tokens: int
    pages: tuple[int, ...] = ()
    """Empty where nothing is cached: then the row is whole."""

    @property
    def samples(self) -> bool:
        """Whether the row reaches the last known id, so that the next one can be chosen."""
        return self.past + self.tokens == len(self.sequence.ids)


@dataclass(frozen=True)
class EncodeSlice:
    """Some units of one attachment to encode: crops of an image, or windows of a clip."""

    sequence: Sequence
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

    def __bool__(self) -> bool:
        return bool(self.rows or self.slices)


@dataclass(frozen=True)
class StepResult:
    """What a step brought: the id chosen for each row that reached its end, by sequence id."""

    sampled: Mapping[int, int]
