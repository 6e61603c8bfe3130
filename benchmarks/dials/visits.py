"""What a neighbour's visits did to the pool and to the answers: two runs of one mix, without and with a neighbour."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.dials.process import Child

SEVERAL = 2
"""Visits, from coming to leaving, that a run must have seen."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Visit:
    """Once that the neighbour came, took memory, and left; seconds count from the run's start."""

    came_seconds: float
    held_seconds: float | None
    """When it had taken all that it took."""
    left_seconds: float | None
    """None where the run ended before."""
    free_bytes_before: int
    held_bytes: int
    refused: bool
    """Whether the device had less than it had said."""
    free_bytes_while_held: int | None
    """What was free when it held the most."""
    pages_before: int
    pages_least: int
    """The smallest that the pool was before the neighbour left, or the run ended."""
    pages_then: int
    """When the neighbour left, or the run ended."""
    pages_after: int
    """When it came again, or the run ended."""
    resizes: int
    mapped_bytes_least: int | None
    """Memory that the pool held after it had shrunk; None where it did not."""

    @property
    def shrank(self) -> bool | None:
        """Whether the pool made way before the neighbour left; None where the run ended too early to tell."""
        return True if self.pages_least < self.pages_before else None if self.left_seconds is None else False

    @property
    def grew(self) -> bool:
        """Whether the pool grew after the neighbour had left, or was whole already."""
        return self.pages_after > self.pages_then or self.pages_after >= self.pages_before


def find_visits(neighbour: Sequence[Event], engine: Sequence[Event]) -> list[Visit]:
    """The visits while the engine worked, from what both processes said and when (`at`)."""
    plan = next((event for event in engine if event["event"] == "plan"), None)
    if plan is None:  # It was never told to come.
        return []
    end = next((event["at"] for event in engine if event["event"] == "closing"), engine[-1]["at"])
    sizes = [event for event in engine if event["event"] == "pool" and event["at"] <= end]
    heard = [event for event in neighbour if event["at"] <= end]
    came = [event for event in heard if event["event"] == "takes"]
    ends = [*(event["at"] for event in came[1:]), end]
    return [_visit(first, until, heard, sizes, plan["plan"]["pages"]) for first, until in zip(came, ends, strict=True)]


def _visit(came: Event, until: float, heard: Sequence[Event], sizes: Sequence[Event], planned_pages: int) -> Visit:
    during = {event["event"]: event for event in heard if came["at"] <= event["at"] < until or event is came}
    holds, leaves = during.get("holds"), during.get("leaves")
    before = [size["after_pages"] for size in sizes if size["at"] < came["at"]]
    later = [size for size in sizes if came["at"] <= size["at"] <= until]
    pages_before = before[-1] if before else planned_pages
    beside = [size for size in later if leaves is None or size["at"] <= leaves["at"]]
    mapped = [size["mapped_bytes"] for size in beside if size["after_pages"] < size["before_pages"]]
    return Visit(
        came_seconds=came["at"],
        held_seconds=holds["at"] if holds else None,
        left_seconds=leaves["at"] if leaves else None,
        free_bytes_before=came["free_bytes"],
        held_bytes=holds["held_bytes"] if holds else 0,
        refused=bool(holds and holds["refused"]),
        free_bytes_while_held=holds["free_bytes"] if holds else None,
        pages_before=pages_before,
        pages_least=min([pages_before, *(size["after_pages"] for size in beside)]),
        pages_then=beside[-1]["after_pages"] if beside else pages_before,
        pages_after=later[-1]["after_pages"] if later else pages_before,
        resizes=len(later),
        mapped_bytes_least=min(mapped, default=None),
    )


def compare_answers(quiet: Sequence[Event], disturbed: Sequence[Event]) -> dict[str, Any]:
    """Answers of both runs, id by id; one that either run does not have is not compared."""
    pairs = [(one, other) for one, other in zip(quiet, disturbed, strict=True) if "ids" in one and "ids" in other]
    differing = [
        {"index": one["index"], "equal_ids": _equal_ids(one["ids"], other["ids"])}
        for one, other in pairs
        if one["ids"] != other["ids"]
    ]
    return {"compared": len(pairs), "equal": len(pairs) - len(differing), "differing": differing}


def _equal_ids(one: str, other: str) -> int:
    """How many ids two answers begin with in common."""
    pairs = list(zip(one.split(), other.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def summarize_visited(
    quiet: Mapping[str, Any], disturbed: Mapping[str, Any], engine: Child, neighbour: Child
) -> dict[str, Any]:
    """Both runs, the visits, and which requirements hold; None where nothing could be read."""
    found = {"quiet": quiet, "disturbed": disturbed}
    if not ("requests" in quiet and "requests" in disturbed):  # There was no room for a model.
        return {"complete": False, "holds": False, **found}
    visits = find_visits(neighbour.events, engine.events)
    answers = compare_answers(quiet["requests"], disturbed["requests"])
    checks = judge_visits(visits, answers, neighbour, engine.seen.source is not None)
    parts = {"the run without a neighbour holds": quiet["holds"], "the run with one holds": disturbed["holds"]}
    checks = {**parts, **checks}
    return {
        "complete": quiet["complete"] and disturbed["complete"],
        "holds": all(held is not False for held in checks.values()),
        "checks": checks,
        "answers": answers,
        "neighbour": {"exit_code": neighbour.exit_code, "visits": [asdict(visit) for visit in visits]},
        **found,
    }


def judge_visits(
    visits: Sequence[Visit], answers: Mapping[str, Any], neighbour: Child, on_card: bool
) -> dict[str, bool | None]:
    """What a neighbour must and must not do; on a CPU there is no card to make way on.

    After the last visit the run may end before the pool grows; that one counts for nothing there.
    """
    whole = [visit for visit in visits if visit.left_seconds is not None]
    return {
        "the neighbour comes and leaves several times": len(whole) >= SEVERAL,
        "the pool makes way at every visit": all(visit.shrank for visit in whole) if on_card else None,
        "the pool grows again after it": all(visit.grew for visit in visits[:-1]) if on_card else None,
        "every answer equals the one without a neighbour": answers["equal"] == answers["compared"] > 0,
        "no error escapes in the neighbour": neighbour.exit_code == 0 and bool(neighbour.said("gone")),
    }
