"""The hand-over between deciding a step and doing it; imports no torch."""

from dataclasses import dataclass

from memphi.engine.sequence import Sequence


@dataclass(frozen=True)
class PlannedRow:
    """One sequence's share of a step: `tokens` of its ids from `past` on."""

    sequence: Sequence
    past: int
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether the row reaches the last known id, so that the next one can be chosen."""
        return self.past + self.tokens == len(self.sequence.ids)


@dataclass(frozen=True)
class StepPlan:
    """The rows of one step."""

    rows: tuple[PlannedRow, ...]
