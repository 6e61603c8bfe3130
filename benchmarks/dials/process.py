"""A process of the benchmark's own, run from outside."""

import argparse
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.dials.lines import read_event, without_event
from benchmarks.dials.meter import Meter, Seen, sampled

GRACE_SECONDS = 20.0
"""How long after its time a process may still end by itself."""


@dataclass
class Child:
    """A process that has ended, and what it said."""

    events: list[dict[str, Any]]
    exit_code: int
    seconds: float
    seen: Seen

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, without its name; empty where there was none."""
        return next((without_event(event) for event in reversed(self.events) if event["event"] == kind), {})

    @property
    def lived(self) -> bool:
        """Whether it ended by itself, as it should."""
        return self.exit_code == 0 and bool(self.last("end") or self.last("no plan"))

    def facts(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 1), "exit_code": self.exit_code, "seen_from_outside": asdict(self.seen)}


def run_child(
    options: argparse.Namespace, work: str, meter: Meter | None, seconds: float, dial_bytes: int | None
) -> Child:
    """Run a fresh process for so long, and a little longer at most, while the meter is read."""
    passed = ("requests", "model", "device", "dtype", "seed")
    command = [sys.executable, "-m", "benchmarks.dials", "--child", work, "--seconds", str(seconds)]
    command += [f"--{name}={getattr(options, name)}" for name in passed]
    command += [f"--dial={dial_bytes}"] if dial_bytes else []
    command += ["--small"] if options.small else []
    started = time.monotonic()
    with sampled(meter) as seen:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        killer = threading.Timer(seconds + GRACE_SECONDS, process.kill)
        killer.start()
        # torch takes seconds to import, and the parent needs it only once the process has ended.
        threading.Thread(target=import_module, args=("benchmarks.document",), daemon=True).start()
        assert process.stdout is not None
        events = [event for line in process.stdout if (event := read_event(line))]
        exit_code = process.wait()
        killer.cancel()
    return Child(events, exit_code, time.monotonic() - started, seen)
