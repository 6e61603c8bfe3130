"""How long the device waits for the host between decode steps in CUDA graphs, and how long the host waits for it.

Answers of one length to prompts of one length, so many at once, greedy, by random weights. Events on the device mark
where each step's copies begin and where its graph ends; of steps of as many rows one after the other, what lies between
is the gap. Measured with each step launched behind the one before (`ahead`), and step by step (`in turn`).
Usage: python -m benchmarks.gaps --rows 1 64 --out FILE
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.document import write_document
from memphi.bench.workloads import Words, Workload, draw
from memphi.config import EngineConfig
from memphi.engine.engine import Engine, load
from memphi.engine.graphs import Decoded, Graphs
from memphi.engine.runner import Flight
from memphi.engine.scheduler import Scheduler
from memphi.engine.step import StepResult

PROMPT_TOKENS, ANSWER_TOKENS = 512, 128


@dataclass
class Record:
    """What was seen of the steps of one run."""

    rows: list[int] = field(default_factory=list)
    begins: list[torch.cuda.Event] = field(default_factory=list)
    ends: list[torch.cuda.Event] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds that the host waited for each step's ids."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="random")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="answers at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU is needed: nothing overlaps on a CPU")
    engine = load(options.model, "cuda", config=EngineConfig(kernels="auto", speculation=False))
    figures = [
        {"rows": rows, "way": way, **measure(engine, rows, way == "ahead", options.repeats)}
        for rows in options.rows
        for way in ("ahead", "in turn")
    ]
    for figure in figures:
        print(*(f"{name} {value}" for name, value in figure.items()), sep=", ")
    write_document(options.out, engine.model.device, options.commit, {"figures": figures})
    engine.close()
    return 0


def measure(engine: Engine, rows: int, ahead: bool, repeats: int) -> dict[str, Any]:
    """The run of the median pace, after one that captures the graphs."""
    runs = [run(engine, rows, ahead, seed) for seed in range(repeats + 1)][1:]
    return sorted(runs, key=lambda figures: figures["tokens_per_second"])[len(runs) // 2]


def run(engine: Engine, rows: int, ahead: bool, seed: int) -> dict[str, Any]:
    workload = Workload(f"gaps-{rows}", "tokens", rows, PROMPT_TOKENS, ANSWER_TOKENS)
    words = Words(engine.tokenizer, engine.model.config.language.vocab_size)
    requests = [drafted.request() for drafted in draw(workload, words, seed)]
    with watched(ahead) as record:
        started = time.perf_counter()
        engine.generate(requests)
        seconds = time.perf_counter() - started
    torch.cuda.synchronize(engine.model.device)
    pairs = [i for i in range(1, len(record.rows)) if record.rows[i - 1] == record.rows[i] == rows]
    gaps = [1000 * record.ends[i - 1].elapsed_time(record.begins[i]) for i in pairs]
    steps = [1000 * record.begins[i].elapsed_time(record.ends[i]) for i in pairs]
    return {
        "steps": len(pairs),
        "step_microseconds": spread(steps),
        "gap_microseconds": spread(gaps),
        "host_waits_microseconds": spread([1e6 * wait for wait in record.waits]),
        "tokens_per_second": round(rows * ANSWER_TOKENS / seconds, 1),
    }


@contextmanager
def watched(ahead: bool) -> Iterator[Record]:
    """Note all steps that go to graphs; unless they go ahead, each one is launched when the one before is heard."""
    record, decode, land = Record(), Graphs.decode, Flight.land

    def note_step(self: Graphs, rows: Sequence[Any], ids: Sequence[Any]) -> Decoded:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = decode(self, rows, ids)
        end.record()
        record.rows.append(len(rows))
        record.begins.append(begin)
        record.ends.append(end)
        return found

    def note_wait(self: Flight) -> StepResult:
        started = time.perf_counter()
        result = land(self)
        record.waits.append(time.perf_counter() - started)
        return result

    with patch.object(Graphs, "decode", note_step), patch.object(Flight, "land", note_wait):
        if ahead:
            yield record
        else:
            with patch.object(Scheduler, "plan_ahead", lambda self, plan: None):
                yield record


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """The median, and what one in twenty exceeds."""
    return {
        "median": round(statistics.median(numbers), 1),
        "p95": round(statistics.quantiles(numbers, n=20)[-1], 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
