"""The process of single steps: what each takes, and CUDA's context, against what is predicted."""

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.dials.child import Notes, held_memory, load_engine
from benchmarks.dials.lines import say, tell
from benchmarks.dials.meter import Meter, find_meter
from benchmarks.dials.requests import make_sound
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import EngineConfig
from memphi.inputs.media import image_media
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.monitor import Monitor
from memphi.request import Footprint, InputMode, Prompt, Request

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.engine.step import EncodeSlice, PlannedRow, StepPlan


@dataclass(frozen=True)
class RowCase:
    """A step of rows: (tokens, past) of each, all of one mode."""

    name: str
    rows: tuple[tuple[int, int], ...]
    mode: InputMode = InputMode.VISION


@dataclass(frozen=True)
class SliceCase:
    """An encoder pass over so many units of the one picture or clip that there is."""

    name: str
    kind: str
    units: int


DECODING = (1, 999)
ROW_CASES = (
    *(RowCase(f"prefill {tokens}", ((tokens, 0),)) for tokens in (512, 2048, 8192)),
    RowCase("prefill 2048, no adapter", ((2048, 0),), InputMode.TEXT),
    RowCase("prefill 2048, speech", ((2048, 0),), InputMode.SPEECH),
    RowCase("prefill 4 x 2048", ((2048, 0),) * 4),
    *(RowCase(f"prefill {tokens} after 8192", ((tokens, 8192),)) for tokens in (512, 2048, 8192)),
    *(RowCase(f"decode {rows} x 1000", (DECODING,) * rows) for rows in (1, 16, 64)),
    RowCase("decode 64 x 1000, no adapter", (DECODING,) * 64, InputMode.TEXT),
    RowCase("decode 16 x 1000 beside prefill 512", (*(DECODING,) * 16, (512, 0))),
    RowCase("decode 16 x 1000 beside prefill 496 after 8192", (*(DECODING,) * 16, (496, 8192))),
    RowCase("prefill 2048 after 65536", ((2048, 65536),)),
    RowCase("decode 1 x 65536", ((1, 65535),)),
)
CROPS, WINDOWS = (1, 8, 37), (1, 8)
PASSES = {"image": "crops_per_pass", "audio": "windows_per_pass"}
"""The plan's limit of a kind's units."""


def work_calibrate(options: argparse.Namespace) -> None:
    """Measure CUDA's context, load, and run every case twice until time is up; tells each by a line."""
    deadline = time.monotonic() + options.seconds
    meter = find_meter(options.device)
    with ThreadPoolExecutor(1) as preparing:
        prepared = preparing.submit(prepare_media, options.model)
        _measure_context(options, meter)
        dial_bytes = options.dial[0] if options.dial else None
        config = EngineConfig(memory_bytes=dial_bytes, speculation=False, scheme=options.scheme)
        engine, notes = load_engine(options, config)
        engine.close()  # What runs from here on runs in this thread; the loop has nothing to do.
        steps = Steps(engine, notes, prepared.result())
    for case in steps.cases():
        late = time.monotonic() > deadline
        tell("case", case=case.name, **({"skipped": "no time left"} if late else steps.run(case)))
    if engine.model.device.type == "cuda":
        tell("stage", stage="after all steps", **held_memory(engine, meter))
    tell("end")


def prepare_media(model: str) -> Prompt:
    """A picture of the most crops and a clip of the most windows, on the host."""
    folder = locate(model).folder
    config = read_config(folder)
    size, most = config.vision.crop_size, config.vision.max_crops
    rows = next(n for n in range(math.isqrt(most), 0, -1) if most % n == 0)
    pixels = np.random.default_rng(0).integers(0, 256, (rows * size, most // rows * size, 3), np.uint8)
    frames = max(WINDOWS) * config.audio.window_tokens * config.audio.compression
    media = [image_media(pixels, "picture"), make_sound(np.random.default_rng(0), frames / 100 + 0.015)]
    # Far beyond a tiny model's context, which does not matter here.
    roomy = replace(config, language=replace(config.language, max_tokens=1 << 20))
    return prepare(Request.ask("", media), roomy, Tokenizer.from_folder(folder))


def _measure_context(options: argparse.Namespace, meter: Meter | None) -> None:
    """Tell what the device has in use once CUDA has started, and after each library's first use."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    if options.device == "cpu" or not torch.cuda.is_available() or meter is None:
        return
    gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    stages: dict[str, Callable[[], Any]] = {
        "after the first tensor": lambda: torch.zeros(1, **gpu),
        "after cuBLAS": lambda: torch.ones(2048, 3072, **gpu) @ torch.ones(3072, 5120, **gpu),
        "after cuDNN": lambda: F.conv2d(torch.ones(1, 64, 128, 80, **gpu), torch.ones(64, 64, 3, 3, **gpu)),
        "after attention": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 8, 512, 128, **gpu),) * 3),
    }
    for name, work in stages.items():
        work()
        torch.cuda.synchronize()
        facts = {"held_bytes": torch.cuda.memory_reserved(), "free_bytes": torch.cuda.mem_get_info()[0]}
        tell("stage", stage=name, used_bytes=meter.used_bytes(), **facts)
    torch.cuda.empty_cache()


class Steps:
    """Runs single steps through an engine's runner."""

    def __init__(self, engine: "Engine", notes: Notes, prompt: Prompt) -> None:
        self._engine, self._notes, self._prompt = engine, notes, prompt
        self._runner, self._plan, self._config = engine.loop.runner, engine.plan, engine.model.config
        self._numbers = count()

    def cases(self) -> list[RowCase | SliceCase]:
        crops = [min(n, self._config.vision.max_crops + 1) for n in CROPS]
        vision = [SliceCase(f"vision pass {n}", "image", n) for n in dict.fromkeys(crops)]
        audio = [SliceCase(f"audio pass {n}", "audio", n) for n in WINDOWS]
        return [*vision, *audio, *ROW_CASES]

    def run(self, case: RowCase | SliceCase) -> dict[str, Any]:
        """What one step takes, the first time and again, against its price; or why it was skipped."""
        obstacle = self._obstacle(case)
        if obstacle:
            return {"skipped": obstacle}
        plan = self.step(case)
        kind, predicted_bytes = self._price(plan)
        runs = [self._measure(plan) for _ in range(2)]
        facts = {"kind": kind, "predicted_bytes": predicted_bytes, "runs": runs}
        observed = [run["observed_bytes"] for run in runs if run.get("observed_bytes") is not None]
        facts |= weigh(predicted_bytes, max(observed)) if observed else {}
        say(f"{case.name}: {json.dumps(facts)}")
        return facts

    def _obstacle(self, case: RowCase | SliceCase) -> str | None:
        """The limit of the plan that a case is beyond."""
        plan = self._plan
        if isinstance(case, SliceCase):
            asked = {f"{case.kind} units": (case.units, getattr(plan, PASSES[case.kind]))}
        else:
            pages = sum(_pages(row, plan.page_tokens) for row in case.rows)
            asked = {
                "tokens": (sum(tokens for tokens, _ in case.rows), plan.step_tokens),
                "rows": (len(case.rows), plan.rows),
                "pages": (pages, plan.pages),
                "keys": (max(map(sum, case.rows)), plan.context_tokens),
            }
        return next((f"{n} {name}, the plan allows {most}" for name, (n, most) in asked.items() if n > most), None)

    def _measure(self, plan: "StepPlan") -> dict[str, Any]:
        """Run a step once; the allocator's growth counts from a state without unused blocks."""
        import torch

        on_gpu = self._engine.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            before_bytes = torch.cuda.memory_reserved()
        noted, started = len(self._notes.noted), time.monotonic()
        try:
            self._runner.run(plan)
        except Exception as error:  # a step that fails tells as much as one that does not
            return {"failed": f"{type(error).__name__}: {error}"}
        if not on_gpu:
            return {"seconds": round(time.monotonic() - started, 4)}
        torch.cuda.synchronize()
        return {
            "seconds": round(time.monotonic() - started, 4),
            "observed_bytes": self._notes.noted[noted][2],
            "allocator_growth_bytes": torch.cuda.max_memory_reserved() - before_bytes,
        }

    def _price(self, plan: "StepPlan") -> tuple[str, int]:
        from memphi.engine.prices import price_rows, price_slices

        model = self._engine.model
        if plan.slices:
            return price_slices(plan.slices, self._config, model.dtype.itemsize)
        sizes = (self._config, model.dtype.itemsize, model.device.type != "cuda", model.adapter_form)
        return price_rows(plan, *sizes, cache_format=self._plan.cache_format)

    def step(self, case: RowCase | SliceCase) -> "StepPlan":
        """The plan of a case; puts memory behind its pages."""
        from memphi.engine.step import StepPlan

        if isinstance(case, SliceCase):
            return StepPlan((), (self._slice(case),))
        pages, rows = 0, []
        for row in case.rows:
            rows.append(self._row(row, case.mode, pages))
            pages += _pages(row, self._plan.page_tokens)
        self._map(pages)
        return StepPlan(tuple(rows))

    def _map(self, pages: int) -> None:
        """Put memory behind all pages: those of a row's past would have been written to before."""
        if self._runner.pool is not None:
            self._runner.gauge.make_room(self._runner.pool.missing_bytes(range(pages)))
            self._runner.pool.ensure(range(pages))
            self._runner.gauge.cap()

    def _row(self, row: tuple[int, int], mode: InputMode, first_page: int) -> "PlannedRow":
        from memphi.engine.sequence import Sequence as Running
        from memphi.engine.step import PlannedRow

        (tokens, past), language = row, self._config.language
        number = next(self._numbers)
        ids = np.random.default_rng(number).integers(0, language.vocab_size // 2, tokens + past).tolist()
        footprint = Footprint(mode, len(ids), (), ())
        sequence = Running(number, Request.ask(""), footprint, 1, ids=ids)
        sequence.prompt = Prompt(tuple(ids), (), (), (), footprint)
        sequence.long = language.is_long(len(ids))
        pages = range(first_page, first_page + _pages(row, self._plan.page_tokens))
        return PlannedRow(sequence, past, tokens, tuple(pages))

    def _slice(self, case: SliceCase) -> "EncodeSlice":
        from memphi.cache.media import MediaEntry, MediaKey
        from memphi.engine.sequence import Sequence as Running
        from memphi.engine.step import EncodeSlice

        prompt, language = self._prompt, self._config.language
        sequence = Running(next(self._numbers), Request.ask(""), prompt.footprint, 1, prompt=prompt)
        span = next(span for span in prompt.spans if span.kind == case.kind)
        n_bytes = span.tokens * language.hidden_size * self._engine.model.dtype.itemsize
        key = MediaKey(case.name, "auto", 0, "", "")
        entry: MediaEntry[Any] = MediaEntry(key, span.tokens, n_bytes, case.units)
        return EncodeSlice(sequence, entry, span.kind, 0, 0, case.units)


def _pages(row: tuple[int, int], page_tokens: int) -> int:
    return -(-sum(row) // page_tokens)


def weigh(predicted_bytes: int, observed_bytes: int) -> dict[str, Any]:
    """One step's prediction against the truth, by the monitor's own measure."""
    monitor = Monitor()
    sentence = monitor.note("it", predicted_bytes, observed_bytes)
    record = monitor.records()["it"]
    verdict = "below the truth" if record.above else "far above the truth" if record.below else "good"
    return {"ratio": round(record.highest_ratio, 4), "verdict": verdict, "sentence": sentence}
