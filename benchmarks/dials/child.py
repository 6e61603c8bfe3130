"""The process with a model: loads it under a dial, answers the mix, and tells how each request ended."""

import argparse
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from benchmarks.dials.lines import say, tell
from benchmarks.dials.meter import Meter, find_meter
from benchmarks.dials.options import dial_name
from benchmarks.dials.requests import SMALL, Sizes, make_request
from memphi.config import EngineConfig, ModelConfig
from memphi.errors import DoesNotFitError, WorkerError
from memphi.memory import costs
from memphi.memory.costs import size_text
from memphi.memory.monitor import Monitor
from memphi.memory.plan import MemoryPlan
from memphi.request import Footprint, Request

if TYPE_CHECKING:
    from memphi.engine.engine import Engine

IN_FLIGHT = 64
BUILDERS = 4
MOST_SENTENCES = 200


@dataclass
class Notes(Monitor):
    """A monitor that keeps every step: (kind, predicted bytes, observed bytes)."""

    noted: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, kind: str, predicted_bytes: int, observed_bytes: int) -> str | None:
        self.noted.append((kind, predicted_bytes, observed_bytes))
        return super().note(kind, predicted_bytes, observed_bytes)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Each kind's record, with the steps whose predictions were furthest below and above the truth."""
        return {kind: asdict(record) | self._extremes(kind) for kind, record in self.records().items()}

    def _extremes(self, kind: str) -> dict[str, Any]:
        steps = sorted((p - o, p, o) for noted, p, o in self.noted if noted == kind)
        names = ("predicted_bytes", "observed_bytes")
        ends = {"most_below": steps[0], "most_above": steps[-1]}
        return {name: dict(zip(names, step[1:], strict=True)) for name, step in ends.items()}


class Sentences(logging.Handler):
    """Keeps what is logged, each sentence once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if sentence in self.kept or len(self.kept) < MOST_SENTENCES:
            self.kept[sentence] = self.kept.get(sentence, 0) + 1


class PoolSizes(logging.Handler):
    """Tells of every change of the pool's size, as soon as it is logged."""

    def __init__(self, engine: "Engine") -> None:
        super().__init__(logging.INFO)
        self._pool = engine.loop.runner.pool

    def emit(self, record: logging.LogRecord) -> None:
        before_pages, after_pages = cast("tuple[int, int]", record.args)
        mapped_bytes = self._pool.mapped_bytes if self._pool else 0
        tell("pool", before_pages=before_pages, after_pages=after_pages, mapped_bytes=mapped_bytes)


def work_dial(options: argparse.Namespace) -> None:
    """Answer a mix of requests under one dial until all have ended or time is up; tells each by a line."""
    deadline = time.monotonic() + options.seconds
    sizes, dial_bytes = SMALL if options.small else Sizes(), options.dial[0]
    if dial_bytes is None:
        _compute_exactly()
    import_module("memphi.engine.engine")  # Torch is imported much faster while no other thread needs Python's lock.
    builders = ThreadPoolExecutor(BUILDERS)
    requests = [builders.submit(make_request, i, options.seed, sizes) for i in range(options.requests)]
    try:
        config = EngineConfig(memory_bytes=dial_bytes, speculation=False, scheme=options.scheme)
        engine, notes = load_engine(options, config)
    except DoesNotFitError as refusal:
        tell("no plan", sentence=str(refusal))
        return
    sentences = Sentences()
    logging.getLogger("memphi").addHandler(sentences)
    logging.getLogger("memphi").setLevel(logging.INFO)
    if dial_bytes is None:
        logging.getLogger("memphi.engine.elastic").addHandler(PoolSizes(engine))
    _Mix(engine, dial_bytes, deadline).run(requests)
    builders.shutdown(wait=False, cancel_futures=True)
    tell(
        "end",
        stats=vars(engine.stats),
        kinds=notes.kinds(),
        log=sentences.kept,
        **held_memory(engine, find_meter(options.device)),
    )


def _compute_exactly() -> None:
    """Without this, cuDNN rounds fp32 inputs to 10 bits, and what shares a step could change an answer."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def load_engine(options: argparse.Namespace, config: EngineConfig) -> tuple["Engine", Notes]:
    from memphi.engine.engine import load

    started = time.monotonic()
    engine = load(options.model, options.device, options.dtype, config=config)
    notes = Notes()
    engine.loop.runner.gauge.monitor = notes
    seconds = time.monotonic() - started
    plan = {name: value for name, value in asdict(engine.plan).items() if name not in ("reasons", "costs")}
    tell("plan", load_seconds=round(seconds, 2), card=_card(engine), plan=plan)
    say(f"{options.model} is loaded after {seconds:.1f} s; {size_text(engine.plan.budget_bytes)}")
    return engine, notes


def _card(engine: "Engine") -> str:
    import torch

    device = engine.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def held_memory(engine: "Engine", meter: Meter | None) -> dict[str, Any]:
    """What is in use at the end, by the meter and by torch and the pool, and the most that these two held."""
    import torch

    if engine.model.device.type != "cuda":
        return {"peak_bytes": engine.loop.runner.gauge.peak_bytes()}
    torch.cuda.synchronize()
    pool = engine.loop.runner.pool
    return {
        "peak_bytes": engine.loop.runner.gauge.peak_bytes(),
        "used_bytes": meter.used_bytes() if meter else None,
        "held_bytes": torch.cuda.memory_reserved() + (pool.mapped_bytes if pool else 0),
        "free_bytes": torch.cuda.mem_get_info()[0],
    }


class _Mix:
    """Requests on their way through one engine."""

    def __init__(self, engine: "Engine", dial_bytes: int | None, deadline: float) -> None:
        self._engine, self._name, self._deadline = engine, dial_name(dial_bytes), deadline
        self._tells_ids = dial_bytes is None
        self._over = threading.Event()
        self._ended = 0
        self._started = time.monotonic()

    def run(self, requests: Sequence[Future[Request]]) -> None:
        """Send all, 64 at a time; what has not ended when time is up is cancelled."""
        senders = ThreadPoolExecutor(IN_FLIGHT)
        sent = [senders.submit(self._send, index, request) for index, request in enumerate(requests)]
        wait(sent, max(self._deadline - time.monotonic(), 0.0))
        tell("closing")
        self._over.set()
        for request in requests:
            request.cancel()
        self._engine.close()
        senders.shutdown(cancel_futures=True)

    def _send(self, index: int, request: Future[Request]) -> None:
        if request.cancelled() or self._over.is_set():
            return
        record = self._answer(request.result())
        if record["outcome"] != "not run":
            self._ended += 1
            say(f"{self._name}: {self._ended} ended after {time.monotonic() - self._started:.1f} s")
        tell("request", index=index, **record)

    def _answer(self, request: Request) -> dict[str, Any]:
        """How a request ended, and whether it should have."""
        record: dict[str, Any] = {"mode": request.mode.name.lower(), "new_tokens": request.sampling.max_tokens}
        try:
            footprint = self._engine.measure(request)
        except DoesNotFitError as refusal:  # beyond the model's own context
            return record | {"fits": False, "outcome": "refused", "sentence": str(refusal)}
        record |= _describe(footprint) | {"fits": fits_alone(request, footprint, self._engine.plan, self._config)}
        return record | self._outcome(request)

    @property
    def _config(self) -> ModelConfig:
        return self._engine.model.config

    def _outcome(self, request: Request) -> dict[str, Any]:
        from memphi.engine.recovery import is_out_of_memory

        try:
            result = self._engine.generate(request)
        except DoesNotFitError as refusal:
            return {"outcome": "refused", "sentence": str(refusal)}
        except Exception as error:  # whatever escapes is what this is about
            if isinstance(error, WorkerError) and self._over.is_set():
                return {"outcome": "not run"}
            said = f"{type(error).__name__}: {error}"
            return {"outcome": "failed", "sentence": said, "out_of_memory": is_out_of_memory(error)}
        if result.finish_reason.value == "cancelled":
            return {"outcome": "not run", "tokens_so_far": len(result.ids)}
        whole = len(result.ids) == request.sampling.max_tokens
        return {
            "outcome": "answered" if whole else "failed",
            "sentence": None if whole else f"it ended after {len(result.ids)} tokens",
            "seconds": round(result.seconds, 2),
            "first_token_seconds": round(result.first_token_seconds, 2),
            "degraded": list(result.degraded),
            **({"ids": " ".join(map(str, result.ids))} if self._tells_ids else {}),
        }


def _describe(footprint: Footprint) -> dict[str, Any]:
    return {
        "prompt_tokens": footprint.prompt_tokens,
        "images": len(footprint.images),
        "crops": footprint.crops,
        "seconds_of_sound": round(sum(clip.seconds for clip in footprint.clips), 1),
    }


def fits_alone(request: Request, footprint: Footprint, plan: MemoryPlan, config: ModelConfig) -> bool:
    """Whether a request's price fits a plan if nothing else runs; the last token's keys and values are never needed."""
    answer_tokens = (request.sampling.max_tokens or 1) - 1
    within = footprint.prompt_tokens + answer_tokens <= config.language.max_tokens
    price = costs.price_request(footprint, config, answer_tokens, cache_format=plan.cache_format)
    return within and price.pages <= plan.pages
