"""Small models that say different things, requests of every mode, and loops that a test steps by itself."""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path

import numpy as np

from memphi.config import EngineConfig, ModelConfig
from memphi.engine.device import device_facts
from memphi.engine.engine import make_loop
from memphi.engine.loop import Event, Loop
from memphi.engine.sequence import Sequence as Running
from memphi.inputs.media import audio_media, image_media
from memphi.inputs.prompt import measure
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.plan import MemoryPlan
from memphi.memory.planner import make_plan
from memphi.model.phi4mm import Phi4MM
from memphi.request import Delta, Media, Message, Request, Result, SamplingParams
from tests.checkpoints import tiny_config, tiny_model, write_tokenizer

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
MOST_STEPS = 20_000
"""No test needs so many: a loop that does is going round in circles."""


def picture(seed: int, width: int = 150, height: int = 100) -> Media:
    return image_media(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), f"picture {seed}")


def clip(seed: int, seconds: float = 0.7) -> Media:
    return audio_media(np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds)), 16000, f"clip {seed}")


def mixed_requests(sampling: SamplingParams = GREEDY) -> list[Request]:
    """One of each mode, and one with two pictures."""
    return [
        Request.ask("What is the sum of one and two?", sampling=sampling),
        Request.ask("Describe this.", [picture(1)], sampling=sampling),
        Request.ask("Write it down.", [clip(1)], system="Be brief.", sampling=sampling),
        Request.ask("", [picture(2, 120, 240), clip(2, 0.3)], sampling=sampling),
        Request.ask("Compare.", [picture(3), picture(4, 60, 60)], sampling=sampling),
    ]


def conversation(turns: int, sampling: SamplingParams = GREEDY, system: str = "Be brief and kind.") -> Request:
    """A picture and so many questions about it; each turn begins like the one before."""
    messages = [Message("system", (system,)), Message("user", (picture(9), "What is it?"))]
    for turn in range(1, turns):
        messages += [Message("assistant", (f"Answer {turn}.",)), Message("user", (f"And question {turn}?",))]
    return Request(tuple(messages), sampling)


def lively_model(config: ModelConfig | None = None) -> Phi4MM:
    """A random model in fp32 whose answers vary: a tied one by itself would only repeat its last token."""
    model = tiny_model(config or tiny_config(short_tokens=4096, max_tokens=8192))
    for name, weight in model.language.layers.named_parameters():
        if weight.dim() == 2 and not name.endswith(".b"):
            weight.mul_(6)
    return model


def tiny_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Tokenizer.from_folder(Path(folder))


def plan_of(model: Phi4MM, settings: EngineConfig | None = None, pages: int | None = None) -> MemoryPlan:
    """The model's plan on this machine; with so many pages, where given, and the media that belong to them."""
    settings = replace(settings or EngineConfig(), scheme=model.config.scheme)
    facts = device_facts(model.device)
    plan = make_plan(model.config, facts, settings, model.dtype.itemsize, placement=model.placement)
    if pages is None:
        return plan
    pool_bytes = pages * plan.page_bytes
    media_bytes = plan.media_bytes * pages // plan.pages
    return replace(
        plan,
        pages=pages,
        pool_bytes=pool_bytes,
        media_bytes=media_bytes,
        budget_bytes=plan.budget_bytes - plan.pool_bytes - plan.media_bytes + pool_bytes + media_bytes,
        context_tokens=min(pages * plan.page_tokens, plan.context_tokens),
    )


class AtOnce(Executor):
    """Does what it is given before it returns, so that a loop's steps are the same every time."""

    def submit(self, work: Callable, /, *arguments, **named) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Stage:
    """A loop without a thread, and what each request has heard from it."""

    def __init__(
        self,
        model: Phi4MM,
        tokenizer: Tokenizer,
        pages: int | None = None,
        executor: Executor | None = None,
        **settings: int | bool,
    ) -> None:
        """settings are EngineConfig's; executor does the preparation."""
        config = EngineConfig(**settings)
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan_of(model, config, pages)
        self.room_tokens = self.plan.context_tokens if config.kv_cache else self.plan.step_tokens
        self.loop: Loop = make_loop(model, tokenizer, self.plan, config, lambda: None)
        self.loop._preparation._threads.shutdown()
        self.loop._preparation._threads = executor or AtOnce()
        self.deltas: dict[int, list[Delta]] = {}
        self.ends: dict[int, Result | Exception] = {}
        self.steps = 0
        self._next_id = 0

    @property
    def scheduler(self):
        return self.loop.scheduler

    @property
    def pool(self):
        return self.loop.runner.pool

    def submit(self, request: Request) -> int:
        """Hand a request over; returns its number."""
        footprint = measure(request, self.model.config, self.tokenizer)
        room = min(self.room_tokens + 1, self.model.config.language.max_tokens) - footprint.prompt_tokens
        assert room >= 1, "a test's request must fit alone"
        wanted = request.sampling.max_tokens
        number, self._next_id = self._next_id, self._next_id + 1
        most = room if wanted is None else min(wanted, room)
        self.deltas[number] = []
        self.loop.add(Running(number, request, footprint, most), time.perf_counter())
        return number

    def step(self) -> list[Event]:
        self.steps += 1
        return self._hear(self.loop.step())

    def cancel(self, number: int) -> list[Event]:
        return self._hear(self.loop.cancel(number))

    def run(self) -> None:
        """Step until every request has ended."""
        for _ in range(MOST_STEPS):
            if not self.loop.has_work:
                return
            self.step()
        raise AssertionError(f"after {MOST_STEPS} steps there is still work")

    def answer(self, requests: Iterable[Request]) -> list[Result]:
        """Answer requests together."""
        numbers = [self.submit(request) for request in requests]
        self.run()
        return [self.result(number) for number in numbers]

    def ids(self, requests: Iterable[Request]) -> list[tuple[int, ...]]:
        return [result.ids for result in self.answer(requests)]

    def result(self, number: int) -> Result:
        end = self.ends[number]
        if isinstance(end, Exception):
            raise end
        return end

    def check_empty(self) -> None:
        """Raise AssertionError unless all is free, idle or given back."""
        scheduler = self.scheduler
        scheduler.check()
        assert not scheduler.sequences
        assert not self.loop.has_work
        assert scheduler.reservations.claimed_pages == 0
        assert scheduler.media.held_bytes == scheduler.media.idle_bytes
        if self.pool is not None:
            scheduler.reservations.pages.drop_idle()
            self.pool.trim(scheduler.reservations.pages.kept())
            granules = len(set(self.pool._granules_of(0)))
            assert self.pool.mapped_bytes <= granules * self.pool._memory.granule_bytes  # page 0 stays

    def _hear(self, events: Sequence[Event]) -> list[Event]:
        for event in events:
            assert event.id not in self.ends, "a request hears something after its end"
            if event.delta is not None:
                self.deltas[event.id].append(event.delta)
            else:
                end = event.result or event.error
                assert end is not None
                self.ends[event.id] = end
        return list(events)


def alone(model: Phi4MM, tokenizer: Tokenizer, requests: Iterable[Request]) -> list[Result]:
    """Each request answered by a loop of its own: what every other way must equal."""
    return [Stage(model, tokenizer).answer([request])[0] for request in requests]
