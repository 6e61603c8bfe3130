"""Run requests on the engine for one client: several at once, piece by piece or whole, ended when the client leaves."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from memphi.engine.pressure import Part
from memphi.errors import DoesNotFitError, MemphiError
from memphi.request import Delta, FinishReason, Footprint, Request, TokenLogprob
from memphi.server.errors import ApiError, ClientLeftError
from memphi.server.service import Service

logger = logging.getLogger("memphi.server")
T = TypeVar("T")
Run = tuple[Part, ...]
"""What was accepted of one request."""
Piece = tuple[int, Delta | MemphiError]
"""What a run brought, by its number: more of its answer, or the error that ended it."""


@dataclass
class Answer:
    """One answer as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


class Work:
    """What one client asked for: some requests, each answered so many times."""

    def __init__(self, service: Service, accepted: Sequence[Run | MemphiError], choices: int, arrived: float) -> None:
        """arrived is when it was asked (time.perf_counter); runs are the first request's choices, then the next's."""
        self.runs = [_with_seed(run, choice) for run in accepted for choice in range(choices)]
        self.errors = [run for run in accepted if isinstance(run, MemphiError)]
        parts = [part for run in accepted if isinstance(run, tuple) for part in run]
        self.footprints = [part.footprint for part in parts]
        """Of all that is asked, each once however often it is answered."""
        self.degraded = dict.fromkeys(sentence for part in parts for sentence in part.degraded)
        """What memory pressure changes, one sentence each: a dict, since several answers tell the same."""
        self.answer_tokens = 0
        self.cached_tokens = 0
        """Of the prompts, each once as well."""
        self._service = service
        self._choices = choices
        self._arrived = arrived
        self._first_token_seconds: float | None = None
        self._seconds = 0.0

    @property
    def price(self) -> dict[str, int]:
        """What the prompts take."""
        page_tokens = self._service.page_tokens
        return {
            "prompt_tokens": sum(footprint.prompt_tokens for footprint in self.footprints),
            "image_tokens": sum(footprint.image_tokens for footprint in self.footprints),
            "audio_tokens": sum(footprint.audio_tokens for footprint in self.footprints),
            "crops": sum(footprint.crops for footprint in self.footprints),
            "pages": sum(-(-footprint.prompt_tokens // page_tokens) for footprint in self.footprints),
        }

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI counts it."""
        price = self.price
        return {
            "prompt_tokens": price["prompt_tokens"],
            "completion_tokens": self.answer_tokens,
            "total_tokens": price["prompt_tokens"] + self.answer_tokens,
            "prompt_tokens_details": {
                "audio_tokens": price["audio_tokens"],
                "image_tokens": price["image_tokens"],
                "text_tokens": price["prompt_tokens"] - price["audio_tokens"] - price["image_tokens"],
                "cached_tokens": self.cached_tokens,
            },
        }

    def news(self, ignored: Sequence[str]) -> dict[str, Any]:
        """What memphi tells beside OpenAI's answer."""
        first = self._first_token_seconds or self._seconds
        return {
            "ignored": list(ignored),
            "degraded": list(self.degraded),
            "price": self.price,
            "timings": {"first_token_seconds": round(first, 6), "seconds": round(self._seconds, 6)},
        }

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What the runs bring, as it comes; closing this ends them. Raises ApiError where too many wait already."""
        with self._service.places(len(self.runs)):
            source = self._run(0) if len(self.runs) == 1 else self._merge()
            async with aclosing(source) as pieces:
                async for piece in pieces:
                    yield piece

    async def collect(self) -> list[Answer]:
        """The answers of all runs; raises the error of one that fails."""
        answers = [Answer() for _ in self.runs]
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                if isinstance(piece, MemphiError):
                    raise piece
                answers[number].add(piece)
        return answers

    async def _run(self, number: int) -> AsyncGenerator[Piece, None]:
        run = self.runs[number]
        if isinstance(run, MemphiError):
            yield number, run
            return
        first, tokens, texts = 0.0, 0, list[str]()
        try:
            async with aclosing(self._service.engine.submit(run)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason is FinishReason.CANCELLED:
                        raise ApiError.later(503, "the server is shutting down", "server_draining")
                    self._note(number, delta)
                    first = first or self._seconds
                    tokens += len(delta.ids)
                    texts.append(delta.text)
                    yield number, delta
        except MemphiError as error:
            yield number, error
            return
        self._service.metrics.note_answer(first, self._seconds, tokens)
        if self._service.settings.log_requests:
            logger.info("answered: %r", "".join(texts))

    async def _merge(self) -> AsyncGenerator[Piece, None]:
        """All runs at once."""
        mailbox: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def post(number: int) -> None:
            try:
                async with aclosing(self._run(number)) as pieces:
                    async for piece in pieces:
                        mailbox.put_nowait(piece)
                mailbox.put_nowait(None)
            except Exception as error:
                mailbox.put_nowait(error)

        tasks = [asyncio.create_task(post(number)) for number in range(len(self.runs))]
        left = len(tasks)
        try:
            while left:
                piece = await mailbox.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()

    def _note(self, number: int, delta: Delta) -> None:
        self._seconds = time.perf_counter() - self._arrived
        self._first_token_seconds = self._first_token_seconds or self._seconds
        self.answer_tokens += len(delta.ids)
        self.cached_tokens += delta.cached_tokens if number % self._choices == 0 else 0
        self.degraded |= dict.fromkeys(delta.degraded)


async def accept(
    service: Service, requests: Sequence[Request | MemphiError], choices: int = 1, tolerant: bool = False
) -> Work:
    """Measure requests and hold them against the server's limits; raises MemphiError.

    tolerant: the error of one of them, or one in its place, does not end the others, it comes in its answer's place.
    """
    arrived = time.perf_counter()
    if service.settings.log_requests:
        for request in requests:
            logger.info("asked: %r", request if isinstance(request, MemphiError) else request.messages)
    accepted = await asyncio.to_thread(lambda: [_accept(service, request, tolerant) for request in requests])
    return Work(service, accepted, choices, arrived)


def _accept(service: Service, request: Request | MemphiError, tolerant: bool) -> Run | MemphiError:
    engine, settings = service.engine, service.settings
    try:
        if isinstance(request, MemphiError):
            raise request
        run = engine.accept(request, settings.limits.media)
        for part in run:
            _check_length(part.footprint, settings.limits.prompt_tokens)
    except MemphiError as error:
        if tolerant:
            return error
        raise
    return tuple(_with_end(part, settings.max_tokens, engine.bounds.answer_tokens(part.footprint)) for part in run)


def _check_length(footprint: Footprint, most: int | None) -> None:
    if most is not None and footprint.prompt_tokens > most:
        raise DoesNotFitError(
            f"the prompt has {footprint.prompt_tokens} tokens and this server takes {most}; shorten the text, send "
            "fewer or smaller attachments"
        )


def _with_end(part: Part, most: int | None, room: int) -> Part:
    """The server's own limit on the answer, where the request has none."""
    if most is None or part.request.sampling.max_tokens is not None:
        return part
    sampling = replace(part.request.sampling, max_tokens=min(most, room))
    return replace(part, request=replace(part.request, sampling=sampling))


def _with_seed(run: Run | MemphiError, choice: int) -> Run | MemphiError:
    """The same with the seed of a further choice."""
    if isinstance(run, MemphiError) or not choice:
        return run
    return tuple(
        replace(part, request=replace(part.request, sampling=replace(sampling, seed=(sampling.seed + choice) % 2**64)))
        for part in run
        for sampling in (part.request.sampling,)
    )


async def unless_left(http: HttpRequest, work: Awaitable[T]) -> T:
    """Do something for a client as long as it is there; ClientLeftError, and the work is cancelled, once it leaves."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leave(http))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leave(http: HttpRequest) -> None:
    """Wait until the client has left; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
