"""Predicted against observed, per kind of step.

Numbers only: the engine reads what the device says and notes it here.
"""

from dataclasses import dataclass

from memphi.memory.costs import MIB, size_text

SLACK_SHARE, SLACK_BYTES = 0.15, 32 * MIB
"""How far above the truth a prediction may lie, whichever is larger, before it wastes memory worth a word."""


@dataclass(frozen=True)
class Record:
    """What was noted of one kind of step."""

    steps: int = 0
    above: int = 0
    """Steps that took more than predicted: the prediction is wrong."""
    below: int = 0
    """Steps that took so much less that the prediction wastes memory."""
    highest_ratio: float = 0.0
    """Observed over predicted, at its largest."""


class Monitor:
    """Counts how well each kind of step was predicted."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def note(self, kind: str, predicted_bytes: int, observed_bytes: int) -> str | None:
        """Count one step; a sentence where the prediction was below the truth, or far above it."""
        above = observed_bytes > predicted_bytes
        below = predicted_bytes - observed_bytes > max(SLACK_SHARE * observed_bytes, SLACK_BYTES)
        ratio = observed_bytes / max(predicted_bytes, 1)
        old = self._records.get(kind, Record())
        self._records[kind] = Record(old.steps + 1, old.above + above, old.below + below, max(old.highest_ratio, ratio))
        if not above and not below:
            return None
        verdict = "more than" if above else "far less than"
        return f"{kind} took {size_text(observed_bytes)}, {verdict} the {size_text(predicted_bytes)} predicted"

    def records(self) -> dict[str, Record]:
        """What was noted, by kind of step."""
        return dict(self._records)
