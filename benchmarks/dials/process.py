"""The benchmark's own processes, run from outside."""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.dials.lines import read_event, without_event
from benchmarks.dials.meter import Meter, Seen, sampled
from benchmarks.dials.options import NO_DIAL

GRACE_SECONDS = 20.0
"""How long after its time a process may still end by itself."""
PASSED = ("requests", "model", "device", "scheme", "seed", "turn")


@dataclass
class Child:
    """A process that has ended, and what it said; `at` of an event is when it was heard, in seconds from the start."""

    events: list[dict[str, Any]]
    exit_code: int
    seconds: float
    seen: Seen

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, without its name; empty where there was none."""
        return next((without_event(event) for event in reversed(self.events) if event["event"] == kind), {})

    def said(self, kind: str) -> bool:
        """Whether there was an event of a kind."""
        return any(event["event"] == kind for event in self.events)

    @property
    def lived(self) -> bool:
        """Whether it ended by itself, as it should."""
        return self.exit_code == 0 and (self.said("end") or self.said("no plan"))

    def facts(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 1), "exit_code": self.exit_code, "seen_from_outside": asdict(self.seen)}


class Process:
    """A fresh process at work for so long, and a little longer at most."""

    def __init__(self, command: list[str], seconds: float, started: float) -> None:
        """started is the time of time.monotonic from which events are counted."""
        self.events: list[dict[str, Any]] = []
        self._started = started
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=pipe, stdout=pipe, text=True)
        self._killer = threading.Timer(seconds + GRACE_SECONDS, self._process.kill)
        self._killer.start()

    def listen(self, hear: Callable[[str], None] = lambda kind: None) -> None:
        """Keep all that it says until it says no more; hear is called with each event's name."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if event := read_event(line):
                self.events.append({**event, "at": round(time.monotonic() - self._started, 3)})
                hear(event["event"])

    def begin(self) -> None:
        """Give the word that a neighbour waits for."""
        assert self._process.stdin is not None
        with suppress(OSError):  # It has ended, which its exit code tells.
            self._process.stdin.write("begin\n")
            self._process.stdin.flush()

    def end(self) -> int:
        """Let it know that no more is said, and wait for its exit code."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        exit_code = self._process.wait()
        self._killer.cancel()
        return exit_code


def run_child(
    options: argparse.Namespace,
    work: str,
    meter: Meter | None,
    seconds: float,
    dial_bytes: int | None,
    dtype: str = "bf16",
) -> Child:
    """Run a fresh process while the meter is read; dtype is the number format where options name none."""
    return _follow(_command(options, work, seconds, dial_bytes, dtype), meter, seconds, time.monotonic())


def run_beside_neighbour(
    options: argparse.Namespace, meter: Meter | None, seconds: float, dtype: str
) -> tuple[Child, Child]:
    """Run a process without a dial, and a neighbour from when that has loaded until it ends; both as they ended."""
    started = time.monotonic()
    neighbour = Process(_command(options, "neighbour", seconds, None, dtype), seconds, started)
    listener = threading.Thread(target=neighbour.listen, daemon=True)
    listener.start()

    def hear(kind: str) -> None:
        if kind == "plan":
            neighbour.begin()

    try:
        engine = _follow(_command(options, "dial", seconds, None, dtype), meter, seconds, started, hear)
    finally:
        exit_code = neighbour.end()
        listener.join()
    return engine, Child(neighbour.events, exit_code, time.monotonic() - started, Seen(None))


def _command(options: argparse.Namespace, work: str, seconds: float, dial_bytes: int | None, dtype: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.dials", "--child", work, "--seconds", str(seconds)]
    command += [f"--{name}={getattr(options, name)}" for name in PASSED]
    command += [f"--dtype={options.dtype or dtype}", f"--dial={NO_DIAL if dial_bytes is None else dial_bytes}"]
    return command + ["--small"] * options.small


def _follow(
    command: list[str],
    meter: Meter | None,
    seconds: float,
    started: float,
    hear: Callable[[str], None] = lambda kind: None,
) -> Child:
    with sampled(meter) as seen:
        process = Process(command, seconds, started)
        # torch takes seconds to import, and the parent needs it only once the process has ended.
        threading.Thread(target=import_module, args=("benchmarks.document",), daemon=True).start()
        process.listen(hear)
        exit_code = process.end()
    return Child(process.events, exit_code, time.monotonic() - started, seen)
