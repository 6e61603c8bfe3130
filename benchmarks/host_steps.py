"""What a step of prompts beside answers costs the host by itself, under every set of adapters: seconds of its thread.

Shapes are tiny, so that what is computed counts for little, but there are as many layers as the official model has.
memphi's kernels and flash attention are left out: launching those is not in the figures. Runs without a GPU.
Usage: python -m benchmarks.host_steps --out FILE
"""

import argparse
import importlib
import pkgutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.document import write_document
from memphi.cache.pool import PagePool, make_pool
from memphi.model import kernels, phi4mm
from memphi.model.attention import sdpa
from memphi.model.kernels import launch
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from tests.checkpoints import tiny_config, tiny_model

LAYERS = 32
SETS: dict[str, tuple[str | None, ...]] = {
    "none": (None,),
    "vision": ("vision",),
    "none, vision, speech": (None, "vision", "speech"),
}
CPU = torch.device("cpu")


class Launches:
    """Stands for every kernel: counts what is launched, and does nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: object) -> "Launches":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        self.count += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="how often each step is done; the quickest counts")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    options = parser.parse_args()
    figures = measure(LAYERS, options.repeats)
    for figure in figures:
        print(f"{figure['adapters']}: {figure['milliseconds']:.1f} ms, {figure['launches']} launches left out")
    write_document(options.out, CPU, options.commit, {"layers": LAYERS, "figures": figures})
    return 0


def measure(layers: int, repeats: int) -> list[dict[str, Any]]:
    """The quickest of so many steps under each set of adapters."""
    model = make_model(layers)
    pool = make_pool(model.config.language, 200, model.dtype, CPU, 16)
    pool.ensure(range(200))
    with without_kernels() as launches:
        model.use_kernels(True)
        return [
            {"adapters": name, **measure_step(model, pool, rows_of(SETS[name]), repeats, launches)} for name in SETS
        ]


def make_model(layers: int) -> Phi4MM:
    source = tiny_model(tiny_config(layers=layers))
    model = Phi4MM(source.config)
    model.load_state_dict(source.state_dict())
    model.keep_adapters(packed=True, merge=None)
    return model.eval()


def rows_of(adapters: Sequence[str | None]) -> list[Row]:
    """Twenty answers, eight prompts and a prompt's chunk, the adapters in turn, rows of one side by side."""
    shapes = [*[(1, 37)] * 20, *[(20, 0)] * 8, (18, 21)]
    pages = count(1)
    rows = [
        Row(new, past, adapters[i % len(adapters)], pages=tuple(next(pages) for _ in range(-(-(new + past) // 16))))
        for i, (new, past) in enumerate(shapes)
    ]
    return sorted(rows, key=lambda row: row.adapter or "")


@torch.inference_mode()
def measure_step(
    model: Phi4MM, pool: PagePool, rows: Sequence[Row], repeats: int, launches: Launches
) -> dict[str, Any]:
    tokens = sum(row.tokens for row in rows)
    ids, seconds = torch.arange(tokens) % model.config.language.vocab_size, list[float]()
    for _ in range(repeats + 1):  # The first one warms up.
        launches.count = 0
        started = time.thread_time()
        model(ids, rows, cache=pool)
        seconds.append(time.thread_time() - started)
    return {"tokens": tokens, "milliseconds": 1000 * min(seconds[1:]), "launches": launches.count}


@contextmanager
def without_kernels() -> Iterator[Launches]:
    """As on a GPU of compute capability 9.0, but that kernels do nothing."""
    launches, modules = Launches(), kernel_modules()
    like_a_gpu: dict[str, object] = {
        "is_available": lambda device: True,
        "capability": lambda device: (9, 0),
        "launch_options": lambda device: {"dependent": True, "launch_pdl": True},
        "multiprocessors": lambda device: 132,
    }
    attention: dict[str, object] = {
        "_has_flash": lambda query: True,
        "_takes_cudnn": lambda *_: False,
        "varlen": lambda query, *rest: torch.empty_like(query),
    }
    with ExitStack() as stack:
        stack.callback(forget, modules)
        for module in modules:
            for name, value in vars(module).copy().items():
                if type(value).__name__ == "JITFunction":
                    stack.enter_context(patch.object(module, name, launches))
                elif name in like_a_gpu and module is not launch:
                    stack.enter_context(patch.object(module, name, like_a_gpu[name]))
        stack.enter_context(patch.object(phi4mm, "is_available", like_a_gpu["is_available"]))
        for name, value in attention.items():
            stack.enter_context(patch.object(sdpa, name, value))
        forget(modules)
        yield launches


def kernel_modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
    ]


def forget(modules: Sequence[ModuleType]) -> None:
    """What functions keep of a device is another's."""
    for function in chain.from_iterable(vars(module).values() for module in modules):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


if __name__ == "__main__":
    raise SystemExit(main())
