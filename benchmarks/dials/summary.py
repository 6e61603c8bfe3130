"""What a process told, as one dial's figures, and which requirements hold."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.dials.lines import without_event
from benchmarks.dials.process import Child


def summarize_dial(dial_bytes: int | None, requests: int, child: Child) -> dict[str, Any]:
    """One dial's figures and which requirements hold; a request that was not reached is listed as not run."""
    ended = {event["index"]: without_event(event) for event in child.events if event["event"] == "request"}
    records = [ended.get(i, {"index": i, "outcome": "not run"}) for i in range(requests)]
    end, refused_dial = child.last("end"), child.last("no plan")
    if refused_dial:
        holds = _has_numbers(refused_dial["sentence"]) and child.exit_code == 0
        return {"dial_bytes": dial_bytes, **child.facts(), **refused_dial, "complete": True, "holds": holds}
    checks = judge(dial_bytes, records, end, child)
    outcomes = [record["outcome"] for record in records]
    return {
        "dial_bytes": dial_bytes,
        "complete": "not run" not in outcomes,
        "holds": all(held is not False for held in checks.values()),
        "checks": checks,
        "outcomes": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
        **child.facts(),
        "margin_bytes": _margin_bytes(dial_bytes, child),
        "context_at_end_bytes": _context_at_end(end, child),
        **child.last("plan"),
        **end,
        "refused": [record for record in records if record["outcome"] == "refused"],
        "failed": [record for record in records if record["outcome"] == "failed"],
        "not_run": [record["index"] for record in records if record["outcome"] == "not run"],
        "requests": records,
    }


def _context_at_end(end: Mapping[str, Any], child: Child) -> int | None:
    if not end.get("used_bytes") or child.seen.source is None:
        return None
    return int(end["used_bytes"] - child.seen.base_bytes - end["held_bytes"])


def _margin_bytes(dial_bytes: int | None, child: Child) -> int | None:
    """How far below the dial the process stayed, as seen from outside."""
    return None if dial_bytes is None or child.seen.source is None else dial_bytes - child.seen.peak_bytes


def judge(
    dial_bytes: int | None, records: Sequence[Mapping[str, Any]], end: Mapping[str, Any], child: Child
) -> dict[str, bool | None]:
    """The requirements, and whether each holds; None where nothing could be read, or there is no dial to exceed."""
    ran = [record for record in records if record["outcome"] != "not run"]
    kinds = end.get("kinds", {}).values()
    margin_bytes = _margin_bytes(dial_bytes, child) if child.seen.samples else None
    return {
        "every request that alone fits is answered": all(
            record["outcome"] == "answered" for record in ran if record.get("fits") is not False
        ),
        "every other request is refused with numbers": all(
            record["outcome"] == "refused" and _has_numbers(record["sentence"])
            for record in ran
            if record.get("fits") is False
        ),
        "no out-of-memory error escapes": not any(record.get("out_of_memory") for record in ran),
        "the process lives": child.lived,
        "the dial is never exceeded": None if margin_bytes is None else margin_bytes >= 0,
        "no step takes more than predicted": not any(kind["above"] for kind in kinds) if kinds else None,
        "no prediction is far above": not any(kind["below"] for kind in kinds) if kinds else None,
    }


def _has_numbers(sentence: str) -> bool:
    return re.search(r"\d", sentence) is not None
