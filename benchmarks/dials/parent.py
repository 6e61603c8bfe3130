"""Runs a process for each dial and for the single steps, and writes what they found."""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dials.calibration import work_calibrate
from benchmarks.dials.child import work_dial
from benchmarks.dials.lines import say, without_event
from benchmarks.dials.meter import Meter, find_meter
from benchmarks.dials.neighbour import work_neighbour
from benchmarks.dials.options import dial_name, read_options
from benchmarks.dials.process import Child, run_beside_neighbour, run_child
from benchmarks.dials.summary import summarize_dial
from benchmarks.dials.visits import summarize_visited

EXACT = "fp32"
"""The number format in which what shares a step with a row changes none of its ids."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if options.child:
        {"dial": work_dial, "calibrate": work_calibrate, "neighbour": work_neighbour}[options.child](options)
        return 0
    figures = _earlier(options.out)
    meter = find_meter(options.device)
    if options.calibrate:
        figures["calibration"] = run_calibration(options, meter)
        _write(options, figures)
    for dial_bytes in options.dial:
        name = dial_name(dial_bytes)
        earlier = figures["dials"].get(name)
        if _is_finished(earlier, options.commit):
            say(f"{name}: finished before, kept")
            continue
        for found in _run(options, meter, dial_bytes, earlier):
            figures["dials"][name] = {"commit": options.commit, **found}
            _write(options, figures)
    return 0 if not options.dial or _all_hold(figures) else 1


def _earlier(out: Path) -> dict[str, Any]:
    """What an earlier run found, to go on from."""
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    kept = {"calibration": document["calibration"]} if "calibration" in document else {}
    return {**kept, "dials": document.get("dials", {})}


def _is_finished(dial: Mapping[str, Any] | None, commit: str | None) -> bool:
    return dial is not None and dial["complete"] and dial["commit"] == commit


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write what is known so far."""
    import torch

    from benchmarks.document import write_document

    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    write_document(
        options.out, torch.device("cuda" if on_gpu else "cpu"), options.commit, {"holds": _all_hold(figures), **figures}
    )


def _all_hold(figures: Mapping[str, Any]) -> bool:
    dials = figures["dials"].values()
    return bool(dials) and all(dial["holds"] and dial["complete"] for dial in dials)


def _run(
    options: argparse.Namespace, meter: Meter | None, dial_bytes: int | None, earlier: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """All that is known of a dial, each time it is more."""
    if dial_bytes is None:
        return run_without_dial(options, meter, earlier)
    return iter([run_dial(options, meter, dial_bytes)])


def run_dial(options: argparse.Namespace, meter: Meter | None, dial_bytes: int) -> dict[str, Any]:
    """All about one dial, from a process of its own."""
    child = run_child(options, "dial", meter, options.seconds, dial_bytes)
    return summarize_dial(dial_bytes, options.requests, child)


def run_without_dial(
    options: argparse.Namespace, meter: Meter | None, earlier: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """The mix alone, unless an earlier run has that, then beside a neighbour; all that is known, each time it is more.

    The second run takes no less time than the first; where that is not left, it is for another time.
    """
    deadline, mix = time.monotonic() + options.seconds, _mix(options)
    kept = earlier and earlier["commit"] == options.commit and earlier["mix"] == mix and earlier["quiet"]["complete"]
    if earlier and kept:
        quiet, needed_seconds = earlier["quiet"], 0.0
    else:
        child = run_child(options, "dial", meter, options.seconds, None, EXACT)
        quiet = summarize_dial(None, options.requests, child)
        needed_seconds = child.seconds
        yield {"mix": mix, "complete": False, "holds": quiet["holds"], "quiet": quiet}
    seconds = deadline - time.monotonic()
    if not quiet["complete"] or seconds < needed_seconds:
        say(f"{seconds:.0f} s are left; the run beside a neighbour is for the next time")
        return
    engine, neighbour = run_beside_neighbour(options, meter, seconds, EXACT)
    disturbed = summarize_dial(None, options.requests, engine)
    yield {"mix": mix, **summarize_visited(quiet, disturbed, engine, neighbour)}


def _mix(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for two runs to have the same answers."""
    names = ("requests", "scheme", "seed", "small")
    model, dtype = Path(options.model).name, options.dtype or EXACT
    return {"model": model, "dtype": dtype, **{name: getattr(options, name) for name in names}}


def run_calibration(options: argparse.Namespace, meter: Meter | None) -> dict[str, Any]:
    """Predicted and observed of single steps, and how large CUDA's context really is, from a process of its own."""
    # The whole device, so that the largest steps are among them.
    child = run_child(options, "calibrate", meter, options.calibrate, options.dial[0] if options.small else None)
    stages = {e["stage"]: e for e in child.events if e["event"] == "stage"}
    return {
        "commit": options.commit,
        **child.facts(),
        **child.last("plan"),
        "context": _context(stages, child),
        "cases": [without_event(event) for event in child.events if event["event"] == "case"],
    }


def _context(stages: Mapping[str, Mapping[str, int]], child: Child) -> dict[str, Any] | None:
    """What the device had in use beyond torch's tensors and the pool, stage by stage."""
    if not stages or child.seen.source is None:
        return None
    measured = {name: s["used_bytes"] - child.seen.base_bytes - s["held_bytes"] for name, s in stages.items()}
    return {
        "assumed_bytes": child.last("plan").get("plan", {}).get("context_bytes"),
        "measured_bytes": max(measured.values()),
        "measured_by_stage_bytes": measured,
        "free_by_stage_bytes": {name: stage["free_bytes"] for name, stage in stages.items()},
    }
