"""Runs a process for each dial and for the single steps, and writes what they found."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dials.calibration import work_calibrate
from benchmarks.dials.child import work_dial
from benchmarks.dials.lines import say, without_event
from benchmarks.dials.meter import Meter, find_meter
from benchmarks.dials.options import dial_name, read_options
from benchmarks.dials.process import Child, run_child
from benchmarks.dials.summary import summarize_dial


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if options.child:
        {"dial": work_dial, "calibrate": work_calibrate}[options.child](options)
        return 0
    figures = _earlier(options.out)
    meter = find_meter(options.device)
    if options.calibrate:
        figures["calibration"] = run_calibration(options, meter)
        _write(options, figures)
    for dial_bytes in options.dial:
        name = dial_name(dial_bytes)
        if _is_finished(figures["dials"].get(name), options.commit):
            say(f"{name}: finished before, kept")
            continue
        figures["dials"][name] = run_dial(options, meter, dial_bytes)
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


def run_dial(options: argparse.Namespace, meter: Meter | None, dial_bytes: int) -> dict[str, Any]:
    """All about one dial, from a process of its own."""
    child = run_child(options, "dial", meter, options.seconds, dial_bytes)
    return {"commit": options.commit, **summarize_dial(dial_bytes, options.requests, child)}


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


def _context(stages: Mapping[str, Mapping[str, int]], child: "Child") -> dict[str, Any] | None:
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
