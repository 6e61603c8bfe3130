"""The engine: requests in, answers out. Plans the memory, loads a model, and runs the loop in a thread of its own."""

import asyncio
import logging
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import overload

import torch

from memphi.cache.media import MediaCache
from memphi.cache.pages import Pages
from memphi.cache.pool import make_pool
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
from memphi.checkpoint.random import random_model
from memphi.checkpoint.reader import Progress
from memphi.config import DEFAULT_MODEL, EngineConfig
from memphi.engine.admission import refuse
from memphi.engine.device import DtypeName, cap_allocator, device_facts, find_device, find_dtype
from memphi.engine.elastic import Elastic
from memphi.engine.gauge import Gauge
from memphi.engine.loop import Event, Loop
from memphi.engine.preparation import Preparation
from memphi.engine.recovery import LOADING_ADVICE, told_plainly
from memphi.engine.reservations import Reservations
from memphi.engine.runner import Runner
from memphi.engine.scheduler import Naming, Scheduler, StepLimits
from memphi.engine.sequence import Sequence as Running
from memphi.engine.settings import AllocatorName, use_allocator
from memphi.engine.stats import Stats
from memphi.engine.worker import Worker, wake
from memphi.errors import DoesNotFitError
from memphi.inputs.prompt import PREPROCESSING_VERSION, measure, prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.budget import Budget
from memphi.memory.costs import host_media
from memphi.memory.devices import this_machine
from memphi.memory.planner import MemoryPlan, make_plan
from memphi.model.attention import AttentionName, select_attention
from memphi.model.phi4mm import Phi4MM
from memphi.request import Delta, Footprint, Request, Result

HOST_MEDIA_SHARE = 4
"""Decoded attachments may take one part in so many of the host's free memory."""


class Engine:
    """A loaded model that answers requests of any input modes, many at once, within its plan's memory."""

    def __init__(
        self, model: Phi4MM, tokenizer: Tokenizer, config: EngineConfig | None = None, plan: MemoryPlan | None = None
    ) -> None:
        """Without a plan one is made for the device that the model is on, as `load` does before it loads."""
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config or EngineConfig()
        self.plan = plan or make_plan(model.config, device_facts(model.device), config, model.dtype.itemsize)
        inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.loop = make_loop(model, tokenizer, self.plan, config, wake(inbox))
        self._worker = Worker(self.loop, inbox)
        self._ids = count()
        weakref.finalize(self, self._worker.close)

    @property
    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self.loop.stats

    def measure(self, request: Request) -> Footprint:
        """What a request costs in tokens, crops and seconds, from headers alone."""
        return measure(request, self.model.config, self.tokenizer)

    @overload
    def generate(self, requests: Request) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def generate(self, requests: Request | Sequence[Request]) -> Result | list[Result]:
        """Answer one request, or several of any modes at once; each result equals the same request's alone.

        Raises RequestError or MediaError for bad input and DoesNotFitError for what can never fit, before anything is
        computed where headers tell; an error of one request ends the others of the same call.
        """
        if isinstance(requests, Request):
            return self.generate([requests])[0]
        sequences = [self._accept(request) for request in requests]
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return list(self._collect(sequences, events).values())

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; the last piece has the finish reason. Closing the iterator ends it."""
        sequence = self._accept(request)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        return self._pieces(sequence, events)

    async def submit(self, request: Request) -> AsyncIterator[Delta]:
        """The same for asyncio: `async for delta in engine.submit(request)`; leaving the loop ends the request."""
        sequence = await asyncio.to_thread(self._accept, request)
        mailbox: asyncio.Queue[Event] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def post(event: Event) -> None:
            with suppress(RuntimeError):  # The caller's loop is closed: nobody listens any more.
                caller.call_soon_threadsafe(mailbox.put_nowait, event)

        self._worker.submit(sequence, post)
        event: Event | None = None
        try:
            while (event := await mailbox.get()).delta is not None:
                yield event.delta
            if event.error is not None:
                raise event.error
        finally:
            if event is None or event.delta is not None:
                self._worker.cancel(sequence.id)

    def close(self) -> None:
        """End all requests and the engine's thread; the model stays loaded as long as it is referred to."""
        self._worker.close()

    def _accept(self, request: Request) -> Running:
        """Price a request; raises DoesNotFitError where it can never fit."""
        footprint = self.measure(request)
        prompt, wanted = footprint.prompt_tokens, request.sampling.max_tokens
        refused = refuse(prompt, wanted, self._room_tokens)
        if refused is not None:
            raise DoesNotFitError(
                f"the request needs {refused.needed_tokens} tokens of context, its answer included, and this engine "
                f"has memory for {refused.available_tokens}; {refused.advice}"
            )
        room = min(self._room_tokens + 1, self.model.config.language.max_tokens) - prompt
        max_tokens = room if wanted is None else min(wanted, room)
        return Running(next(self._ids), request, footprint, self.model.config.language, max_tokens)

    @property
    def _room_tokens(self) -> int:
        """The longest sequence that fits alone."""
        return (
            self.plan.context_tokens if self.config.kv_cache else min(self.plan.context_tokens, self.plan.step_tokens)
        )

    def _collect(self, sequences: Sequence[Running], events: "queue.SimpleQueue[Event]") -> dict[int, Result]:
        """Run sequences to their ends; results in the order of the sequences."""
        results: dict[int, Result] = {}
        open_ids = {sequence.id for sequence in sequences}
        try:
            for sequence in sequences:
                self._worker.submit(sequence, events.put)
            while open_ids:
                event = events.get()
                if event.error is not None:
                    open_ids.discard(event.id)
                    raise event.error
                if event.result is not None:
                    open_ids.discard(event.id)
                    results[event.id] = event.result
        finally:
            for number in open_ids:
                self._worker.cancel(number)
        return dict(sorted(results.items()))

    def _pieces(self, sequence: Running, events: "queue.SimpleQueue[Event]") -> Iterator[Delta]:
        event: Event | None = None
        try:
            self._worker.submit(sequence, events.put)
            while (event := events.get()).delta is not None:
                yield event.delta
            if event.error is not None:
                raise event.error
        finally:
            if event is None or event.delta is not None:
                self._worker.cancel(sequence.id)


def make_loop(
    model: Phi4MM, tokenizer: Tokenizer, plan: MemoryPlan, config: EngineConfig, on_ready: Callable[[], None]
) -> Loop:
    """The loop of a model under a plan; on_ready is called from other threads when `step` has something new to do."""
    language = model.config.language
    # Reserved at its largest: page numbers never go beyond. Only what is in use takes memory.
    pool = make_pool(language, plan.pages, model.dtype, model.device) if config.kv_cache else None
    embedding_bytes = language.hidden_size * model.dtype.itemsize
    scheduler = Scheduler(
        model.config,
        StepLimits(plan.rows, plan.step_tokens, plan.shared_step_tokens, plan.crops_per_pass, plan.windows_per_pass),
        _reservations(plan),
        MediaCache(plan.media_bytes),
        Naming("loaded", str(model.dtype), str(model.dtype), PREPROCESSING_VERSION),
        embedding_bytes,
        config.kv_cache,
    )
    preparation = Preparation(
        lambda request: prepare(request, model.config, tokenizer),
        lambda sequence: host_media(sequence.footprint, model.config).bytes,
        this_machine().free_bytes // HOST_MEDIA_SHARE,
        on_ready,
    )
    known = torch.from_numpy(tokenizer.known_ids(language.vocab_size))
    gauge = Gauge(model.device, pool, plan.budget_bytes - plan.context_bytes)
    gauge.cap()
    runner = Runner(model, pool, ~known.to(model.device), gauge)
    watches_others = model.device.type == "cuda" and config.memory_bytes is None
    free_memory = (lambda: torch.cuda.mem_get_info(model.device)) if watches_others else None
    elastic = Elastic(scheduler, pool, gauge, config.idle_seconds, free_memory)
    return Loop(runner, scheduler, preparation, tokenizer, elastic)


def _reservations(plan: MemoryPlan) -> Reservations:
    """The ledger of a plan: all that is not for pages is charged at once."""
    budget = Budget(plan.budget_bytes)
    fixed = {
        "context": plan.context_bytes,
        "weights": plan.weights_bytes,
        "work space": plan.workspace_bytes,
        "media embeddings": plan.media_bytes,
    }
    for account, n_bytes in fixed.items():
        budget.charge(account, n_bytes)
    return Reservations(Pages(plan.pages, plan.page_tokens), budget, plan.page_bytes)


def load(
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    dtype: DtypeName = "bf16",
    attention: AttentionName = "auto",
    config: EngineConfig | None = None,
    allocator: AllocatorName = "default",
    progress: Progress | None = None,
) -> Engine:
    """Load a model and return the engine that runs it.

    model is a folder, a hub name, `demo` or `random`; device `auto` is the GPU where there is one, else the CPU;
    config holds the dial (memory_bytes) and pins; allocator sets torch's for CUDA, before CUDA starts; progress is
    called with the bytes of weights done and in total.
    Raises CheckpointError, DeviceError, or DoesNotFitError where the dial or the device is too small.
    """
    if (own := use_allocator(allocator)) is not None:
        logging.getLogger(__name__).warning(own)
    where, number = find_device(device), find_dtype(dtype)
    location = locate(model)
    backend = select_attention(attention)
    config = config or EngineConfig()
    plan = make_plan(read_config(location.folder), device_facts(where), config, number.itemsize)
    cap_allocator(where, plan.budget_bytes - plan.context_bytes)
    with told_plainly("the model", where, LOADING_ADVICE):
        if location.random:
            network = random_model(read_config(location.folder), where, number, attention=backend, progress=progress)
        else:
            network = load_model(location.folder, where, number, backend, progress)
        return Engine(network, Tokenizer.from_folder(location.folder), config, plan)
