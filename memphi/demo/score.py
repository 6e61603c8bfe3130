"""Scores of a model on the demo's tasks: how many answers are right, how many words misheard, and what is asked for.

Knows answers and references as text; knows no models and no samples. Evaluation calls `scores` and prints `table`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Pairs = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Score:
    """One line of the table: the share right (or words misheard), over how many samples, against what is asked for.

    Where nothing is asked for, threshold is None: the score is only told.
    """

    name: str
    value: float
    threshold: float | None
    count: int
    lower_is_better: bool = False

    @property
    def passed(self) -> bool:
        """Return whether the score meets its threshold; no samples never do, and what is only told always does."""
        if self.threshold is None:
            return True
        if self.count == 0:
            return False
        return self.value <= self.threshold if self.lower_is_better else self.value >= self.threshold

    @property
    def share_right(self) -> float:
        """Return the share of answers, or of words, that are right; more is better for every score."""
        return max(0.0, 1 - self.value) if self.lower_is_better else self.value


@dataclass(frozen=True)
class Demand:
    """A line that is asked for: the tasks it pools and the share that must be right (or may be misheard)."""

    name: str
    tasks: tuple[str, ...]
    threshold: float | None
    measures_word_errors: bool = False


DEMANDS = (
    Demand("numbers", ("read-number",), 0.97),
    Demand("words", ("read-word",), 0.85),
    Demand("colour, shape, count", ("colour", "shape", "colour-shape", "count"), 0.95),
    Demand("several images", ("compare-images", "add-images", "which-image"), 0.90),
    Demand("speech (word error rate)", ("transcribe",), 0.05, measures_word_errors=True),
    Demand("spoken questions", ("spoken-question",), 0.90),
    Demand("text", ("arithmetic", "reverse-word", "json", "chat"), 0.90),
)


def scores(answers: Mapping[str, Sequence[tuple[str, str]]]) -> list[Score]:
    """Return one score for each demand from {task: [(answer, reference), ...]}."""
    return [scored(demand, [pair for task in demand.tasks for pair in answers.get(task, ())]) for demand in DEMANDS]


def scored(demand: Demand, pairs: Sequence[tuple[str, str]]) -> Score:
    """Return the score of what was answered to the samples of one demand."""
    measure = word_error_rate if demand.measures_word_errors else exactly_right
    return Score(demand.name, measure(pairs), demand.threshold, len(pairs), demand.measures_word_errors)


def table(lines: Iterable[Score]) -> str:
    """Return the scores as an aligned table of text."""
    rows = [("", "score", "asked", "samples", "")]
    for line in lines:
        reached = f"{line.value:.1%}" if line.count else "-"
        rows.append((line.name, reached, _asked(line), str(line.count), _verdict(line)))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as text whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _asked(line: Score) -> str:
    return "" if line.threshold is None else f"{'<=' if line.lower_is_better else '>='} {line.threshold:.1%}"


def _verdict(line: Score) -> str:
    return "" if line.threshold is None else "ok" if line.passed else "missed"


def exactly_right(pairs: Pairs) -> float:
    """Return the share of answers that equal their reference, space around them aside."""
    results = [answer.strip() == reference.strip() for answer, reference in pairs]
    return sum(results) / len(results) if results else 0.0


def word_error_rate(pairs: Pairs) -> float:
    """Return the words wrongly left out, added or replaced, per word of the references."""
    split = [(answer.split(), reference.split()) for answer, reference in pairs]
    spoken = sum(len(reference) for _, reference in split)
    errors = sum(edits(answer, reference) for answer, reference in split)
    return errors / spoken if spoken else float(errors > 0)


def edits(answer: Sequence[str], reference: Sequence[str]) -> int:
    """Return the least number of words to insert, delete or replace to turn one into the other."""
    row = list(range(len(reference) + 1))
    for place, heard in enumerate(answer, start=1):
        above, row = row, [place]
        for column, said in enumerate(reference):
            row.append(min(above[column + 1] + 1, row[column] + 1, above[column] + (heard != said)))
    return row[-1]
