"""What steps cost the host by itself, in seconds of its thread: a forward pass of prompts beside answers under every
set of adapters, and whole rounds of the loop, of answers alone and with prompts beside them.

Shapes are tiny, so that what is computed counts for little. A forward pass has as many layers as the official model;
rounds have none: what they cost beyond the layers is the figure. memphi's kernels and flash attention are left out:
launching those is not in the figures. Runs without a GPU.
Usage: python -m benchmarks.host_steps --out FILE
"""

import argparse
import importlib
import pkgutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.document import write_document
from memphi.cache.pool import PagePool, make_pool
from memphi.engine.graphs import Graphs
from memphi.model import kernels, phi4mm
from memphi.model.attention import sdpa
from memphi.model.decode import DecodeStep
from memphi.model.kernels import launch
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_config, tiny_model
from tests.scenes import Stage, tiny_tokenizer

LAYERS = 32
SETS: dict[str, tuple[str | None, ...]] = {
    "none": (None,),
    "vision": ("vision",),
    "none, vision, speech": (None, "vision", "speech"),
}
ROUNDS = ((64, 0), (256, 0), (200, 8))
"""Answers, and new prompts beside them."""
PROMPT_TOKENS, MOST_TOKENS = 500, 8192
"""Of a prompt's text, and of a sequence and a step at most."""
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
    rounds = [measure_round(answers, prompts, options.repeats) for answers, prompts in ROUNDS]
    for figure in rounds:
        print(f"a round of {figure['answers']} answers, {figure['prompts']} prompts: {figure['milliseconds']:.2f} ms")
    write_document(options.out, CPU, options.commit, {"layers": LAYERS, "figures": figures, "rounds": rounds})
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


def make_model(layers: int, **sizes: int) -> Phi4MM:
    source = tiny_model(tiny_config(layers=layers, **sizes))
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


def measure_round(answers: int, prompts: int, repeats: int) -> dict[str, Any]:
    """The median of so many rounds of answers, each with so many new prompts in its step."""
    seconds = list[float]()
    with without_kernels(), without_layers():
        stage = make_stage(answers + prompts)
        for number in range(answers):
            stage.submit(ask(f"answer {number}", MOST_TOKENS - 2 * PROMPT_TOKENS))
        while any(not sequence.answer_tokens for sequence in stage.scheduler.sequences):
            stage.step()
        for number in range(repeats):
            stage.step()  # A step is in flight again.
            for prompt in range(prompts):
                stage.submit(ask(f"prompt {prompt} of {number}", 1))
            stage.step()  # They are let in and prepared.
            started = time.thread_time()
            stage.loop.step()
            seconds.append(time.thread_time() - started)
    return {"answers": answers, "prompts": prompts, "milliseconds": 1000 * statistics.median(seconds)}


@contextmanager
def without_layers() -> Iterator[None]:
    """Prompts go through no layer of the decoder, and answers' graphs are not launched."""
    with (
        patch.object(DecodeStep, "run", lambda step: step.logits),
        patch.object(phi4mm, "compute", lambda language, embeddings, packing, cache: embeddings),
    ):
        yield


def make_stage(rows: int) -> Stage:
    """A loop of so many rows, whose steps have room for all prompts, and its graphs."""
    model = make_model(1, short_tokens=MOST_TOKENS // 2, max_tokens=MOST_TOKENS)
    stage = Stage(model, tiny_tokenizer(), pages=rows * MOST_TOKENS // 16, rows=rows)
    runner, scheduler = stage.loop.runner, stage.scheduler
    assert runner.pool is not None
    model.use_kernels(True)
    runner.graphs = Graphs(model, runner.pool, rows, MOST_TOKENS, capture=False, forbidden=runner.forbidden)
    scheduler.limits = replace(scheduler.limits, step_tokens=MOST_TOKENS, shared_step_tokens=MOST_TOKENS)
    return stage


def ask(beginning: str, tokens: int) -> Request:
    """A prompt that begins unlike any other, and so many tokens of an answer to it."""
    text = f"{beginning} " + "x" * PROMPT_TOKENS
    return Request.ask(text, sampling=SamplingParams(max_tokens=tokens, ignore_eos=True))


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
                if isinstance(value, launch.Kernel):
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
