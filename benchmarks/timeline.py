"""Where the time of a workload of `memphi bench` goes: seconds of host and device by kind of step, kernels, code.

Each workload is done once to warm up, once with events around every step, once with the host's stack sampled, and once
under torch's profiler, whose kernels are summed by name; each disturbs the others. Usage:
python -m benchmarks.timeline decode-64 prefill --out FILE
"""

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args
from unittest.mock import patch

import torch

from benchmarks.document import write_document
from memphi.bench.card import wait_for
from memphi.bench.limits import Card
from memphi.bench.run import Bench
from memphi.bench.workloads import WORKLOADS, Workload
from memphi.config import CacheFormat, EngineConfig, Scheme
from memphi.engine.engine import Engine, load
from memphi.engine.runner import Flight, Runner
from memphi.engine.step import StepPlan, StepResult

T = TypeVar("T")

MOST_LINES, MOST_KERNELS = 40, 30
SAMPLE_SECONDS = 0.001


class Mark:
    """A moment on the device, once it has come to it; on a CPU, which waits for nobody, on the host."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        self._noted = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def until(self, other: "Mark") -> float:
        """Seconds from this one to another; both have come."""
        if self._event is None or other._event is None:
            return other._noted - self._noted
        return float(self._event.elapsed_time(other._event)) / 1000


@dataclass
class Step:
    """One step as it was seen."""

    kind: str
    tokens: int
    begins: float
    """When the host began it, and when it was done with it (time.perf_counter)."""
    ends: float
    marks: "tuple[Mark, Mark]"


@dataclass
class Record:
    steps: list[Step] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds that the host waited for the ids of steps that it had launched before."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--model", default="random")
    parser.add_argument("--scheme", default="auto", choices=("auto", *get_args(Scheme)), help="of the weights")
    parser.add_argument("--cache-format", default="auto", choices=("auto", *get_args(CacheFormat)))
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: a CPU waits for nobody")
    config = EngineConfig(speculation=False, scheme=options.scheme, cache_format=options.cache_format)
    engine = load(options.model, "cuda", config=config)
    figures = []
    for name in options.workloads:
        figures.append(look(engine, WORKLOADS[name]))
        show(figures[-1])
        write_document(options.out, engine.model.device, options.commit, {"workloads": figures})
    engine.close()
    return 0


def look(engine: Engine, workload: Workload) -> dict[str, Any]:
    bench = Bench(engine, Card("", 1, 1), 1, 0, time.perf_counter() + 3600, lambda text: None)

    def do(seed: int) -> float:
        """Do it with requests of its own, so that no cache helps; returns its seconds."""
        return bench.once(workload, seed).timing.seconds

    do(1)
    with watched() as record:
        seconds = do(2)
    wait_for(engine.model.device)
    steps = record.steps
    with sampled() as lines:
        do(3)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if torch.cuda.is_available() else activity.CPU]) as profile:
        do(4)
        wait_for(engine.model.device)
    kernels, calls = Counter[str](), Counter[str]()
    for event in profile.profiler.kineto_results.events():  # `key_averages` takes minutes for so many.
        if event.device_type().name == "CUDA":
            kernels[event.name()] += event.duration_ns()
            calls[event.name()] += 1
    return {
        "workload": workload.name,
        "seconds": seconds,
        "steps": by_kind(steps),
        "waited_seconds": sum(record.waits),
        "first_steps": [told(step, steps[0].begins) for step in steps[:40]],
        "busy_seconds": kernels.total() / 1e9,
        "kernels": [
            {"name": name[:90], "calls": calls[name], "seconds": nanoseconds / 1e9}
            for name, nanoseconds in kernels.most_common(MOST_KERNELS)
        ],
        "host": [{"line": line, "share": count / sum(lines.values())} for line, count in lines.most_common(MOST_LINES)],
    }


@contextmanager
def watched() -> Iterator[Record]:
    """Note all steps: those that are run, and those that are launched and heard of later."""
    record, run, launch, land = Record(), Runner.run, Runner.launch, Flight.land

    def note(self: Runner, plan: StepPlan, work: Callable[..., T], *rest: object) -> T:
        begins, first = time.perf_counter(), Mark()
        found = work(self, plan, *rest)
        marks = first, Mark()
        kind = kind_of(plan) + (" launched" if work is launch else "")
        tokens = sum(row.tokens for row in plan.rows)
        record.steps.append(Step(kind, tokens, begins, time.perf_counter(), marks))
        return found

    def note_wait(self: Flight) -> StepResult:
        started = time.perf_counter()
        result = land(self)
        record.waits.append(time.perf_counter() - started)
        return result

    with (
        patch.object(Runner, "run", lambda self, plan: note(self, plan, run)),
        patch.object(Runner, "launch", lambda self, plan, *rest: note(self, plan, launch, *rest)),
        patch.object(Flight, "land", note_wait),
    ):
        yield record


def kind_of(plan: StepPlan) -> str:
    prompts = sum(1 for row in plan.rows if row.tokens > 1)
    parts = ["media" * bool(plan.slices), "prompts" * bool(prompts), "answers" * (len(plan.rows) > prompts)]
    return " and ".join(filter(None, parts))


def by_kind(steps: list[Step]) -> list[dict[str, Any]]:
    """Sums over steps of a kind; `device` runs from a step's first operation to its last, waits for the host included,
    and `between` from the end of the step before."""
    kinds: dict[str, list[tuple[float, float, float, int]]] = {}
    for i, step in enumerate(steps):
        device = step.marks[0].until(step.marks[1])
        between = steps[i - 1].marks[1].until(step.marks[0]) if i else 0.0
        kinds.setdefault(step.kind, []).append((step.ends - step.begins, device, between, step.tokens))
    return [
        {
            "kind": kind,
            "steps": len(seen),
            "tokens": sum(each[3] for each in seen),
            "host_seconds": sum(each[0] for each in seen),
            "device_seconds": sum(each[1] for each in seen),
            "between_seconds": sum(each[2] for each in seen),
        }
        for kind, seen in kinds.items()
    ]


def told(step: Step, zero: float) -> str:
    device = 1000 * step.marks[0].until(step.marks[1])
    return (
        f"{1000 * (step.begins - zero):.1f} ms: {step.kind}, {step.tokens} tokens, host "
        f"{1000 * (step.ends - step.begins):.2f} ms, device {device:.2f} ms"
    )


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Sample where the engine's thread is: each line of memphi's on its stack, innermost first, counts once."""
    lines, over = Counter[str](), threading.Event()
    thread = next(thread for thread in threading.enumerate() if thread.name == "memphi-engine")
    interval = sys.getswitchinterval()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            frame = sys._current_frames().get(thread.ident or 0)
            while frame is not None and "memphi" not in frame.f_code.co_filename:
                frame = frame.f_back
            depth = 0
            while frame is not None and depth < 2:
                if "memphi" in frame.f_code.co_filename:
                    where = Path(frame.f_code.co_filename).name
                    lines[f"{'  ' * depth}{where}:{frame.f_lineno} {frame.f_code.co_name}"] += 1
                    depth += 1
                frame = frame.f_back

    sampler = threading.Thread(target=sample)
    sys.setswitchinterval(1e-4)
    sampler.start()
    try:
        yield lines
    finally:
        over.set()
        sampler.join()
        sys.setswitchinterval(interval)


def show(figure: dict[str, Any]) -> None:
    print(f"== {figure['workload']}: {figure['seconds']:.3f} s, device busy {figure['busy_seconds']:.3f} s")
    for kind in figure["steps"]:
        print("  ", *(f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in kind.items()))
    print("  ", f"waited {figure['waited_seconds']:.3f} s", *figure["first_steps"], sep="\n   ")
    for kernel in figure["kernels"]:
        print(f"   {kernel['seconds'] * 1000:8.2f} ms {kernel['calls']:6d} {kernel['name']}")
    for line in figure["host"]:
        print(f"   {line['share']:6.1%} {line['line']}")


if __name__ == "__main__":
    raise SystemExit(main())
