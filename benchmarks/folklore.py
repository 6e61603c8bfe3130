"""What the usual advice for this model costs and saves here: each setting alone, then all together.

Random weights at full size. What CUDA reads when it starts gets a process of its own. What --out holds for the same
commit is kept, what was not reached is listed; --page writes what --out holds into docs/folklore.md.
Usage: python -m benchmarks.folklore --seconds 150 --out FILE --commit HASH [--only NAME ...]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.dials.meter import Meter, find_meter, sampled
from benchmarks.document import write_document
from memphi.bench.workloads import ANSWER_TOKENS as RECIPE_TOKENS
from memphi.bench.workloads import PICTURE as SIZE
from memphi.cache.pool import PagePool
from memphi.config import EngineConfig
from memphi.engine.device import device_facts, find_device
from memphi.engine.engine import Engine, Parts, load_parts
from memphi.engine.messages import Loading
from memphi.engine.settings import ALLOCATOR_VARIABLES, AllocatorName, use_allocator, wait_for_launches
from memphi.inputs.media import image_media
from memphi.memory.costs import GIB
from memphi.memory.devices import DeviceFacts
from memphi.memory.monitor import Monitor
from memphi.memory.planner import make_plan
from memphi.request import Request, Result, SamplingParams

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "folklore.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
WORK_SECONDS, GRACE_SECONDS = 30.0, 15.0
"""The most that one work may take, and how long after its time a process may still end by itself."""


@dataclass(frozen=True)
class Work:
    """So many calls, one after another, of so many requests each, about so many images each."""

    says: str
    tokens: int = 32
    calls: int = 1
    requests: int = 1
    images: int = 1


WORKS = {
    "one": Work("1 image, 250 tokens", RECIPE_TOKENS),
    "short": Work("1 image, 32 tokens"),
    "jointly": Work("8 images in one request, 32 tokens", images=8),
    "each": Work("8 images one after another (`--each`), 32 tokens each", calls=8),
    "at once": Work("8 requests of 1 image at once, 32 tokens each", requests=8),
}


@dataclass(frozen=True)
class Setting:
    """What a recipe says to set, and on what it is tried."""

    says: str
    works: tuple[str, ...] = ("one", "jointly")
    allocator: AllocatorName = "default"
    blocking: bool = False
    dtype: Any = "bf16"
    attention: Any = "auto"
    kv_cache: bool = True
    tidies: bool = False
    """Collect garbage and empty the allocator's cache before and after every call."""


SETTINGS = {  # Those of one process stand together.
    "baseline": Setting("nothing: memphi as it is", tuple(name for name in WORKS if name != "short")),
    "no-kv-cache": Setting("`--kv-cache off`", ("short",), kv_cache=False),
    "tidy": Setting("`empty_cache()` and `gc.collect()` around every image", ("one", "each"), tidies=True),
    "fp16": Setting("`--dtype fp16`", dtype="fp16"),
    "eager": Setting("`--attention eager`", attention="eager"),
    "all": Setting("all but eager", ("short",), "split128", True, "fp16", kv_cache=False, tidies=True),
    "launch-blocking": Setting("`CUDA_LAUNCH_BLOCKING=1`", blocking=True),
    "split128": Setting("`--allocator split128`", allocator="split128"),
    "expandable": Setting("`--allocator expandable`", allocator="expandable"),
}
STARTED, LOADED = attrgetter("allocator", "blocking"), attrgetter("dtype", "attention")
"""What makes another process necessary, and what another model."""
EVERY = [(name, work) for name, setting in SETTINGS.items() for work in setting.works]


def main(arguments: Sequence[str] | None = None) -> int:
    deadline = time.monotonic() + (options := _options(arguments)).seconds
    if options.child:
        work_through([tuple(task.split(":")) for task in options.child], options, deadline)
        return 0
    if options.page:
        PAGE.write_text(with_table(PAGE.read_text("utf-8"), json.loads(options.out.read_text("utf-8"))), "utf-8")
        return 0
    earlier = json.loads(options.out.read_text("utf-8"))["measured"] if options.commit and options.out.exists() else []
    records = [record for record in earlier if record["commit"] == options.commit]
    wanted = [task for task in EVERY if task[0] in options.only and task not in _tasks(records)]
    for _, tasks in groupby(wanted, lambda task: STARTED(SETTINGS[task[0]])):
        if (seconds := deadline - time.monotonic()) > 0:
            records += _run_child(list(tasks), seconds, options)
            missing = [f"{name}: {WORKS[work].says}" for name, work in EVERY if (name, work) not in _tasks(records)]
            figures = {"model": options.model, "not_reached": missing, "measured": records}
            where = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
            write_document(options.out, where, options.commit, figures)
    return 0 if set(wanted) <= _tasks(records) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0, help="for everything, starting included")
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured; without it nothing of --out is kept")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/folklore.md from --out")
    parser.add_argument("--model", default="random", help="random, demo or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny requests, to try the benchmark itself")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.child and not options.out:
        parser.error("--out is needed")
    return options


def _tasks(records: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    return {(record["setting"], record["work"]) for record in records}


def _run_child(tasks: list[tuple[str, str]], seconds: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a fresh process measured in so many seconds."""
    command = [sys.executable, "-m", "benchmarks.folklore", f"--seconds={seconds}", f"--model={options.model}"]
    command += [f"--device={options.device}", *["--small"][: options.small]]
    command += ["--child", *(f"{name}:{work}" for name, work in tasks)]
    others = {name: v for name, v in os.environ.items() if name not in (*ALLOCATOR_VARIABLES, "CUDA_LAUNCH_BLOCKING")}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=others)
    killer = threading.Timer(seconds + GRACE_SECONDS, process.kill)
    killer.start()
    assert process.stdout is not None
    records = [json.loads(line) | {"commit": options.commit} for line in process.stdout if line.startswith("{")]
    print(f"folklore: a process ended with {process.wait()}, {len(records)} of {len(tasks)} measured", file=sys.stderr)
    killer.cancel()
    return records


def work_through(tasks: Sequence[tuple[str, ...]], options: argparse.Namespace, deadline: float) -> None:
    """Measure settings that agree in what CUDA reads when it starts; tells each work by a line."""
    use_allocator(SETTINGS[tasks[0][0]].allocator)
    if SETTINGS[tasks[0][0]].blocking:
        wait_for_launches()
    meter = find_meter(options.device)
    base_bytes = meter.used_bytes() if meter else 0
    facts = device_facts(find_device(options.device))  # before anything is loaded
    for (dtype, attention), alike in groupby(tasks, lambda task: LOADED(SETTINGS[task[0]])):
        tidy()
        loading = Loading(options.model, options.device, dtype, attention, EngineConfig(speculation=False), "default")
        bench = Bench(load_parts(loading), facts, meter, base_bytes)
        bench.run(Setting("a warm-up"), Work("", tokens=3), WORK_SECONDS)
        for name, work in alike:
            if (left := deadline - time.monotonic()) <= 0:
                return
            asked = replace(WORKS[work], tokens=3, images=1) if options.small else WORKS[work]
            try:
                record = bench.run(SETTINGS[name], asked, min(left, WORK_SECONDS))
            except Exception:  # What one setting breaks leaves the others to be measured.
                traceback.print_exc()
                continue
            if left >= WORK_SECONDS or not record["cut"]:  # Cut for want of time: not reached.
                print(json.dumps({"setting": name, "work": work, **record}), flush=True)
        del bench


def tidy() -> None:
    """What the recipes do around every image."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Peaks(Monitor):
    """Keeps the most that tensors and mapped pages took; the engine resets torch's own peak with every step."""

    def __init__(self, pool: PagePool | None) -> None:
        super().__init__()
        self._pool = pool if pool is not None and pool.is_mapped else None  # Torch itself counts any other.
        self.peak_bytes: int | None = None

    def note(self, kind: str, predicted_bytes: int, observed_bytes: int) -> str | None:
        taken = torch.cuda.max_memory_allocated() + (self._pool.mapped_bytes if self._pool else 0)
        self.peak_bytes = max(self.peak_bytes or 0, taken)
        return super().note(kind, predicted_bytes, observed_bytes)


@dataclass
class Bench:
    """One model, and an engine of its own for every work, so that nothing is found in a cache."""

    parts: Parts
    facts: DeviceFacts
    meter: Meter | None
    base_bytes: int
    """What the device had in use before this process."""

    def run(self, setting: Setting, work: Work, limit_seconds: float) -> dict[str, Any]:
        """Time and memory of one work; cut where it took longer than it may, by closing the engine."""
        model, config = self.parts.model, EngineConfig(kv_cache=setting.kv_cache, speculation=False)
        tidy()
        plan = make_plan(model.config, self.facts, config, model.dtype.itemsize)
        engine = Engine(model, self.parts.tokenizer, config, plan)
        gauge, calls = engine.loop.runner.gauge, [_requests(work, number) for number in range(work.calls)]
        gauge.monitor = peaks = Peaks(engine.loop.runner.pool)
        with sampled(self.meter) as seen:
            results, seconds = _answer(engine, calls, setting.tidies, limit_seconds)
        weights_bytes = plan.weights_bytes
        return _timing(work, results) | {
            "seconds": seconds,
            "cut": seconds >= limit_seconds,
            "weights_bytes": weights_bytes,
            "peak_allocated_bytes": peaks.peak_bytes,
            "peak_above_weights_bytes": peaks.peak_bytes and peaks.peak_bytes - weights_bytes,
            "peak_reserved_bytes": gauge.peak_bytes(),
            "peak_device_bytes": seen.base_bytes + seen.peak_bytes - self.base_bytes if seen.samples else None,
            "device_bytes_from": seen.source,
            "rungs": dict(engine.stats.rungs),
        }


def _requests(work: Work, seed: int) -> list[Request]:
    """Requests about pictures of noise, none of them twice."""
    pixels = np.random.default_rng(seed).integers(0, 256, (work.requests, work.images, *SIZE, 3), np.uint8)
    sampling = SamplingParams(max_tokens=work.tokens, ignore_eos=True)
    return [Request.ask("Describe it.", [image_media(image) for image in group], None, sampling) for group in pixels]


def _answer(
    engine: Engine, calls: Sequence[list[Request]], tidies: bool, limit_seconds: float
) -> tuple[list[list[Result]], float]:
    """The results of the calls that were begun in time, and the seconds of all; what is late is cut."""
    results, timer, started = list[list[Result]](), threading.Timer(limit_seconds, engine.close), time.perf_counter()
    timer.start()
    for requests in calls:
        if time.perf_counter() - started < limit_seconds:
            if tidies:
                tidy()
            results.append(engine.generate(requests))
            if tidies:
                tidy()
    seconds = time.perf_counter() - started
    timer.cancel()
    engine.close()
    return results, seconds


def _timing(work: Work, results: Sequence[Sequence[Result]]) -> dict[str, Any]:
    """tokens_per_second is the pace after the first token of each call."""
    begun = [told for call in results if (told := [result for result in call if result.ids])]
    tokens = sum(len(result.ids) for call in begun for result in call)
    decoding = sum(max(r.seconds for r in call) - min(r.first_token_seconds for r in call) for call in begun)
    first = min(result.first_token_seconds for result in begun[0]) if begun else None
    pace = (tokens - sum(map(len, begun))) / decoding if decoding else None
    figures: dict[str, Any] = {"tokens": tokens, "first_token_seconds": first, "tokens_per_second": pace}
    if (work.calls, work.requests, work.images) == (1, 1, 1) and tokens < RECIPE_TOKENS and first and pace:
        # Not measured: the first token as it was, and the others at the pace measured.
        figures["extrapolated_to_250_tokens_seconds"] = first + (RECIPE_TOKENS - 1) / pace
    return figures


def with_table(page: str, document: Mapping[str, Any]) -> str:
    """The page with the document's figures between its marks."""
    head = ["setting", "work", "first token, s", "tokens/s", "above the weights, GiB", "device, GiB", "all, s"]
    records = {(record["setting"], record["work"]): record for record in document["measured"]}
    rows = [_row(records[task]) for task in EVERY if task in records]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    source = f"{document['device']}, torch {document['torch']}, commit {document['commit']}, {document['date']}."
    missing = f" Not measured: {'; '.join(document['not_reached'])}." if document["not_reached"] else ""
    return f"{page.partition(BEGIN)[0]}{BEGIN}\n{table}\n\n{source}{missing}\n{END}{page.partition(END)[2]}"


def _row(record: Mapping[str, Any]) -> list[str]:
    sizes = [record[name] and record[name] / GIB for name in ("peak_above_weights_bytes", "peak_device_bytes")]
    figures = [record["first_token_seconds"], record["tokens_per_second"], *sizes]
    seconds = f"{record['seconds']:.2f}" + (f", cut after {record['tokens']} tokens" if record["cut"] else "")
    if more := record.get("extrapolated_to_250_tokens_seconds"):
        seconds += f"; 250 tokens, extrapolated: {more:.0f}"
    shown = ["" if figure is None else f"{figure:.2f}" for figure in figures]
    return [SETTINGS[record["setting"]].says, WORKS[record["work"]].says, *shown, seconds]


if __name__ == "__main__":
    sys.exit(main())
