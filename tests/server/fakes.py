"""An engine without a model: it measures like the real one and says what it is told to."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import EngineConfig
from memphi.engine.facade import DeviceEngine, EngineState, Facade
from memphi.engine.messages import Event, Mailbox, Submission
from memphi.engine.pressure import Bounds
from memphi.engine.stats import Stats
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.devices import DeviceFacts
from memphi.memory.planner import make_plan
from memphi.request import Delta, FinishReason, Request

GIB = 1 << 30
PIECE_SECONDS = 0.002
Say = Callable[[Request], Sequence[Delta | Exception]]
"""What is answered to a request; without a last piece that has a finish reason or an error it goes on for ever."""


def said(text: str, reason: FinishReason = FinishReason.STOP, pieces: int = 3) -> list[Delta]:
    """An answer of so many pieces."""
    size = -(-len(text) // pieces) or 1
    deltas = [Delta(text[at : at + size], (at,)) for at in range(0, len(text), size)] or [Delta("", ())]
    return [*deltas[:-1], replace(deltas[-1], finish_reason=reason)]


class FakeWorker:
    """Answers in the event loop that asks."""

    def __init__(self, say: Say, bounds: Bounds) -> None:
        self.say = say
        self.bounds = bounds
        self.requests: list[Request] = []
        self.cancelled: list[int] = []

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        request = submission.part.request
        self.requests.append(request)
        events = self._events(submission.id, request)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # A thread of the test's own.
            for event in events:
                mailbox(event)
            return
        self._post(loop, mailbox, list(events))

    def _post(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox, events: Sequence[Event]) -> None:
        """Each once the one before was there for a while, however busy the loop, so that none is joined to another."""
        for event in events[:1]:
            mailbox(event)
            loop.call_later(PIECE_SECONDS, self._post, loop, mailbox, events[1:])

    def _events(self, number: int, request: Request) -> Iterator[Event]:
        for piece in self.say(request):
            if isinstance(piece, Exception):
                yield Event(number, error=piece)
                continue
            yield Event(number, piece)
            if piece.finish_reason is not None:
                yield Event(number)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def close(self) -> None:
        pass


class FakeEngine(Facade):
    """A facade over a FakeWorker, with the demo's config and tokenizer."""

    def __init__(self, say: Say = lambda request: said("It is a fake.")) -> None:
        folder = locate("demo").folder
        config = read_config(folder)
        self.plan = make_plan(config, DeviceFacts("cpu", "no machine", 16 * GIB, 16 * GIB), EngineConfig(), 4)
        self.stats = Stats()
        self.worker = FakeWorker(say, Bounds(self.plan.context_tokens, config.language.max_tokens))
        self.device = "cpu"
        self.state: EngineState = "ready"
        self.others: tuple[DeviceEngine, ...] = ()
        """Engines on further devices, for who watches them."""
        super().__init__(self.worker, config, Tokenizer.from_folder(folder))

    @property
    def engines(self) -> tuple[DeviceEngine, ...]:
        return (self, *self.others)

    @property
    def requests(self) -> list[Request]:
        """All that was handed over, in order."""
        return self.worker.requests
