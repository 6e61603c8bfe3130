"""What callers see of an engine, wherever its loop runs: measure, generate, stream, submit, close.

Prices and refuses requests, hands them to a worker and turns what comes back into answers; callers of any threads and
of asyncio share one. Imports no torch.
"""

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from functools import partial
from itertools import count
from typing import Literal, Protocol, overload

from memphi.config import ModelConfig
from memphi.engine.messages import Event, Mailbox, Submission
from memphi.engine.posts import Letterbox, Posts
from memphi.engine.pressure import Bounds, Listing, Measured, Part, endless, relieve
from memphi.engine.stats import Stats
from memphi.inputs.chat import lay_out
from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits
from memphi.inputs.prompt import encode, measure, measure_encoded
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.plan import MemoryPlan
from memphi.request import Delta, Footprint, Request, Result
from memphi.sampling.grammar import Grammars


class Worker(Protocol):
    """Whoever steps the loop: a thread, or a process."""

    @property
    def bounds(self) -> Bounds:
        """What one request may take."""
        ...

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        """Hand a request over, without waiting; its events go to the mailbox, from another thread."""
        ...

    def cancel(self, number: int) -> None:
        """End a request; its mailbox gets the result so far."""
        ...

    def close(self) -> None:
        """End all requests and the worker."""
        ...


EngineState = Literal["ready", "loading", "failed"]
"""Whether an engine answers now; once it is loaded, be it again; or not, for it has ended too often of late."""


class DeviceEngine(Protocol):
    """What runs on one device, as whoever watches it sees it."""

    @property
    def device(self) -> str: ...
    @property
    def plan(self) -> MemoryPlan: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def state(self) -> EngineState: ...


class Facade:
    """Answers requests of any input modes, many at once."""

    def __init__(self, worker: Worker, model_config: ModelConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._model_config = model_config
        self._worker = worker
        self._grammars = Grammars(tokenizer, model_config)
        self._ids = count()
        self._posts: weakref.ref[Posts] | None = None
        """Those of the loop that was heard of last, as long as somebody waits there."""
        weakref.finalize(self, worker.close)

    @property
    def bounds(self) -> Bounds:
        """What one request may take."""
        return self._worker.bounds

    def measure(self, request: Request) -> Footprint:
        """What a request costs in tokens, crops and seconds, from headers alone."""
        return measure(request, self._model_config, self.tokenizer)

    def accept(self, request: Request, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[Part, ...]:
        """What is to be run for a request, each with its footprint: it alone, or its shares; `submit` takes them.

        Raises RequestError or MediaError for bad input and DoesNotFitError for what can never fit.
        """
        self._grammars.check(request.sampling)
        may_change = request.on_pressure in ("shrink-images", "one-by-one")
        config = endless(self._model_config) if may_change else self._model_config
        vision, bounds = config.vision, self._worker.bounds

        def measure_once(each: Request) -> Measured:
            ids = encode(lay_out(each), self.tokenizer)
            return measure_encoded(each, ids, config, limits), tuple(ids)

        return relieve(request, measure_once, bounds, vision)

    @overload
    def generate(self, requests: Request) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def generate(self, requests: Request | Sequence[Request]) -> Result | list[Result]:
        """Answer one request, or several of any modes at once; each result equals the same request's alone.

        Raises RequestError or MediaError for bad input and DoesNotFitError for what can never fit, before anything is
        computed where headers tell, and WorkerError where the engine has stopped; an error of one request ends the
        others of the same call. Where a request's on_pressure let it be changed, its result says how (`degraded`).
        """
        if isinstance(requests, Request):
            return self.generate([requests])[0]
        accepted = [self.accept(request) for request in requests]
        results = iter(self._collect([part for parts in accepted for part in parts]))
        return [_listing(parts).result([next(results) for _ in parts]) for parts in accepted]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; the last piece has the finish reason. Closing the iterator ends it."""
        return self._listed_pieces(self.accept(request))

    async def submit(self, request: Request | tuple[Part, ...]) -> AsyncGenerator[Delta, None]:
        """The same for asyncio: `async for delta in engine.submit(request)`; closing it ends the request.

        Takes what was accepted too, and does not measure that again. Pieces that come faster than they are taken are
        joined, so that a slow reader does not fall behind.
        """
        parts = request if isinstance(request, tuple) else await asyncio.to_thread(self.accept, request)
        listing = _listing(parts)
        for part in parts:
            async with aclosing(self._posted_pieces(part)) as pieces:
                async for delta in pieces:
                    yield listing.add(delta)

    def cancel(self, number: int) -> None:
        """End a request; its mailbox gets the result so far."""
        self._worker.cancel(number)

    def close(self) -> None:
        """End all requests and the engine's thread or process; a model in this process stays as long as it is used."""
        self._worker.close()

    def hand_over(self, part: Part, mailbox: Mailbox) -> int:
        """Submit what was accepted, without waiting; its events go to the mailbox, from another thread.

        Returns the number by which `cancel` knows it.
        """
        number = next(self._ids)
        self._worker.submit(Submission(number, part), mailbox)
        return number

    def _collect(self, parts: Sequence[Part]) -> list[Result]:
        """Run parts to their ends; results in their order."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        results: dict[int, Result] = {}
        open_ids: set[int] = set()
        try:
            for part in parts:
                open_ids.add(self.hand_over(part, events.put))
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
                self.cancel(number)
        return [results[number] for number in sorted(results)]

    def _listed_pieces(self, parts: Sequence[Part]) -> Iterator[Delta]:
        """The answers of all parts, one after another."""
        listing = _listing(parts)
        for part in parts:
            with closing(self._pieces(part)) as pieces:
                yield from map(listing.add, pieces)

    def _pieces(self, part: Part) -> Generator[Delta, None, None]:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        number = self.hand_over(part, events.put)
        event: Event | None = None
        try:
            while (event := events.get()).delta is not None:
                yield event.delta
            if event.error is not None:
                raise event.error
        finally:
            if event is None or event.delta is not None:
                self.cancel(number)

    def _posts_here(self) -> Posts:
        """The way into the running event loop: one for all who wait there."""
        loop = asyncio.get_running_loop()
        posts = self._posts() if self._posts else None
        if posts is None or posts.loop is not loop:
            posts = Posts(loop)
            self._posts = weakref.ref(posts)
        return posts

    async def _posted_pieces(self, part: Part) -> AsyncGenerator[Delta, None]:
        mailbox: Letterbox = asyncio.Queue()
        number = self.hand_over(part, partial(self._posts_here().send, mailbox))
        event: Event | None = None
        try:
            while (event := await mailbox.get()).delta is not None:
                delta = event.delta
                while not mailbox.empty() and (event := mailbox.get_nowait()).delta is not None:
                    delta = delta.followed_by(event.delta)
                yield delta
                if event.delta is None:
                    break
            if event.error is not None:
                raise event.error
        finally:
            if event is None or event.delta is not None:
                self.cancel(number)


def _listing(parts: Sequence[Part]) -> Listing:
    return Listing([part.request for part in parts])
