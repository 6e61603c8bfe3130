"""What all routes share: the engine once it is loaded, the settings, what is counted, and whether new work is taken."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Literal, Protocol

from starlette.requests import Request as HttpRequest

from memphi.engine.facade import DeviceEngine
from memphi.engine.pressure import Bounds, Part
from memphi.errors import MediaError
from memphi.inputs.media import MediaLimits
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Delta, Request
from memphi.server.errors import ApiError
from memphi.server.fetch import Fetcher, HostRule
from memphi.server.metrics import Metrics
from memphi.server.settings import ServerSettings

DECODING_THREADS = 4


class ServedEngine(Protocol):
    """What the server needs of an engine, in this process or in others."""

    tokenizer: Tokenizer

    @property
    def engines(self) -> Sequence[DeviceEngine]: ...
    @property
    def bounds(self) -> Bounds: ...
    def accept(self, request: Request, limits: MediaLimits) -> tuple[Part, ...]: ...
    def submit(self, request: tuple[Part, ...]) -> AsyncGenerator[Delta, None]: ...
    def close(self) -> None: ...


Progress = Callable[[int, int], None]
Load = Callable[[Progress], ServedEngine]
"""Loads the engine, telling the bytes done and in total as it goes."""
State = Literal["loading", "ready", "draining", "failed"]


class Service:
    """One server: its state, and how much it does at once."""

    def __init__(self, engine: ServedEngine | Load, settings: ServerSettings) -> None:
        """An engine that has to be loaded yet is loaded by `start`, and closed by `stop`. Raises RequestError."""
        self.settings = settings
        self.failure: Exception | None = None
        """Why the engine could not be loaded."""
        self.on_failure: Callable[[], None] = lambda: None
        self.draining = False
        self.started = int(time.time())
        self.loaded_bytes, self.total_bytes = 0, 0
        self.open_answers = 0
        self._stopped = False
        self._load = engine if callable(engine) else None
        self._engine = None if callable(engine) else engine
        rules = tuple(map(HostRule.parse, settings.allow_urls))
        self._fetcher = Fetcher(rules, settings.limits.body_bytes) if rules else None
        self.decoding = ThreadPoolExecutor(DECODING_THREADS, "recording")
        """Decodes recordings and nothing else: hours of them keep no other work waiting."""
        self.metrics = Metrics(lambda: self.engines, lambda: self.open_answers)

    @property
    def state(self) -> State:
        if self.draining:
            return "draining"
        if self.failure is not None:
            return "failed"
        return "loading" if self._engine is None else "ready"

    @property
    def engine(self) -> ServedEngine:
        """The engine, also of a server that drains; raises ApiError where there is none yet."""
        if self._engine is None:
            raise self._closed()
        return self._engine

    def check_open(self) -> None:
        """Raise ApiError where no new work is taken, yet or any more."""
        if self.state != "ready":
            raise self._closed()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless this is the model that is served; None is."""
        own = self.settings.model
        if name not in (None, own):
            raise ApiError(404, f"there is no model {name!r} here; ask for {own!r}", "model", "model_not_found")

    @property
    def rows(self) -> int:
        """How many answers run at once, on all devices."""
        return sum(engine.plan.rows for engine in self.engine.engines)

    @property
    def most_answers(self) -> int:
        """How many answers run or wait at most."""
        return self.rows + self.settings.limits.queue

    @property
    def page_tokens(self) -> int:
        """Tokens of a page, by which prices are told; of the first device, should cards differ."""
        return self.engine.engines[0].plan.page_tokens

    @property
    def engines(self) -> Sequence[DeviceEngine]:
        """What runs on each device; nothing before it is loaded."""
        return self._engine.engines if self._engine else ()

    async def fetch(self, urls: Sequence[str]) -> Mapping[str, bytes | MediaError]:
        """What URLs hold, or why it is not here; nothing where this server fetches none."""
        return await self._fetcher.fetch(urls) if self._fetcher is not None and urls else {}

    @contextmanager
    def places(self, answers: int) -> Iterator[None]:
        """Keep room for so many answers while the block runs; raises ApiError where there is none, now or ever."""
        self._check_queue(answers)
        self.open_answers += answers
        try:
            yield
        finally:
            self.open_answers -= answers

    def check_room(self, answers: int) -> None:
        """Raise ApiError where no new work is taken, or so many answers more cannot even wait."""
        self.check_open()
        self._check_queue(answers)

    def _check_queue(self, answers: int) -> None:
        most = self.most_answers
        if answers > most:
            advice = f"at most {most} may be asked for: n, times the prompts or the attachments answered one by one"
            message = f"the request asks for {answers} answers and this server has places for {most}; {advice}"
            raise ApiError(413, message, None, "does_not_fit")
        if self.open_answers + answers > most:
            waits = f"{self.open_answers} answers run or wait, of at most {most}"
            raise ApiError.later(429, f"the queue is full: {waits}; send the request again later", "queue_full")

    def start(self) -> None:
        """Load the engine beside what is served meanwhile."""
        self._stopped = False
        if self._load is not None:
            # A daemon: whoever stops the server meanwhile does not wait for it.
            arguments = (self._load, asyncio.get_running_loop())
            threading.Thread(target=self._fetch_engine, args=arguments, name="memphi-load", daemon=True).start()

    async def stop(self) -> None:
        """Close the engine that `start` has loaded, or will have; what still runs ends."""
        self._stopped = True
        if self._load is not None and self._engine is not None:
            await asyncio.to_thread(self._engine.close)

    def _closed(self) -> ApiError:
        return ApiError.later(503, _REASONS[self.state], f"server_{self.state}")

    def _fetch_engine(self, load: Load, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._engine = load(self._note_progress)
            if self._stopped:
                self._engine.close()
        except Exception as error:
            self.failure = error
            with suppress(RuntimeError):  # The server has ended meanwhile.
                loop.call_soon_threadsafe(self.on_failure)

    def _note_progress(self, done_bytes: int, total_bytes: int) -> None:
        self.loaded_bytes, self.total_bytes = done_bytes, total_bytes


_REASONS: dict[State, str] = {
    "loading": "the model is being loaded; send the request again in a while",
    "draining": "the server is shutting down and takes no new requests",
    "failed": "the model could not be loaded; the server is shutting down",
}


def service_of(http: HttpRequest) -> Service:
    """The service of the app that a request came to."""
    service = http.app.state.service
    assert isinstance(service, Service)
    return service
