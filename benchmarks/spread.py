"""What further GPUs bring: an engine on the first device, then one on each, all with the same work for every device.

That is decode-64 of `memphi bench`, so twice as many devices have twice as many requests. Only the ends of answers are
waited for: what handing out every piece costs is server_overhead's to measure.
Usage: python -m benchmarks.spread --model random --device cuda:0,cuda:1 --out FILE
"""

import argparse
import queue
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from memphi.bench.workloads import WORKLOADS, Words, draw
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import EngineConfig
from memphi.engine.messages import Event, Loading
from memphi.engine.spread import SpreadEngine, start
from memphi.request import Request

WORKLOAD = "decode-64"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, random, a folder or a hub name")
    parser.add_argument("--device", required=True, help="the devices, with commas between")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--memory-gib", type=float, help="each device's dial")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is done; the middle counts")
    parser.add_argument("--scale", type=float, default=1.0, help="the workload's share, as of memphi bench")
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    config = EngineConfig(memory_bytes=int(arguments.memory_gib * 2**30) if arguments.memory_gib else None)
    one = Loading(arguments.model, "", arguments.dtype, "auto", config, "default")
    loadings = [replace(one, device=device) for device in arguments.device.split(",")]
    figures: dict[str, Any] = {"model": arguments.model, "dtype": arguments.dtype, "scale": arguments.scale}
    figures["runs"] = [measure(some, arguments.repeats, arguments.scale) for some in (loadings[:1], loadings)]
    paces = [run["tokens_per_second"] for run in figures["runs"]]
    figures["times_one"] = round(paces[1] / paces[0], 3)
    print(f"{len(loadings)} devices answer {figures['times_one']} times as much as one", file=sys.stderr)
    if arguments.out:
        import torch

        from benchmarks.document import write_document

        write_document(arguments.out, torch.device(loadings[0].device), arguments.commit, figures)
    return 0


def measure(loadings: Sequence[Loading], repeats: int, scale: float) -> dict[str, Any]:
    """Generated tokens a second of an engine on each of these devices, and how the requests were spread."""
    workload = WORKLOADS[WORKLOAD].scaled(scale)
    workload = replace(workload, requests=workload.requests * len(loadings))
    with closing(start(loadings)) as engine:
        words = Words(engine.tokenizer, read_config(locate(loadings[0].model).folder).language.vocab_size)
        drafts = [draw(workload, words, seed) for seed in range(repeats + 1)]
        times = [answer(engine, [draft.request() for draft in some]) for some in drafts][1:]  # The first warms up.
        tokens = workload.requests * workload.answer_tokens
        told = {
            "devices": [each.device for each in engine.engines],
            "requests": workload.requests,
            "tokens": tokens,
            "tokens_per_second": round(median(tokens / seconds for seconds in times), 1),
            "runs_tokens_per_second": [round(tokens / seconds, 1) for seconds in times],
            "ended": [each.stats.ended.total() for each in engine.engines],
        }
    print(told, file=sys.stderr)
    return told


def answer(engine: SpreadEngine, requests: Sequence[Request]) -> float:
    """Seconds to answer all at once."""
    ends: queue.SimpleQueue[Event] = queue.SimpleQueue()
    parts = [part for request in requests for part in engine.accept(request)]
    started = time.perf_counter()
    for part in parts:
        engine.hand_over(part, lambda event: None if event.delta else ends.put(event))
    for _ in parts:
        event = ends.get()
        if event.error is not None:
            raise event.error
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
