"""What passes between those who ask and the loop that answers, through a queue in one process or a pipe between two.

Plain data, and the mailboxes that it ends in. Imports no torch.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memphi.config import EngineConfig
from memphi.engine.pressure import Part
from memphi.engine.settings import AllocatorName
from memphi.engine.stats import Stats
from memphi.errors import WorkerError
from memphi.request import Delta, Result

if TYPE_CHECKING:
    from memphi.engine.device import DtypeName
    from memphi.model.attention import AttentionName


@dataclass(frozen=True)
class Loading:
    """Which model is to be loaded, and how."""

    model: str
    device: str
    dtype: "DtypeName"
    attention: "AttentionName"
    config: EngineConfig
    allocator: AllocatorName
    engines: int = 1
    """How many are loaded side by side, this one among them: they share the host's memory."""


@dataclass(frozen=True)
class Progressed:
    """Weights are being read: so many bytes are done."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Submission:
    """A request that was measured and, as far as the caller knows, fits."""

    id: int
    part: Part
    started: float = field(default_factory=time.perf_counter)
    """When it was handed over; the clock is the machine's, so another process reads the same."""


@dataclass(frozen=True)
class Cancellation:
    """A request's caller has gone away."""

    id: int


class Wake:
    """A prompt has become ready."""


class Close:
    """No more work: end."""


@dataclass  # Not frozen, though nobody changes it: one is made for every token, three times as fast so.
class Event:
    """What a step brought to one request: a piece of its answer, its end, or the error that ended it."""

    id: int
    delta: Delta | None = None
    result: Result | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Report:
    """All that one round brought, to whomever, and the counters after it."""

    events: Sequence[Event]
    stats: Stats


Mailbox = Callable[[Event], None]


class Mailboxes:
    """Who hears of which request; once shut, nobody is left waiting and nobody can begin to."""

    def __init__(self) -> None:
        self._open: dict[int, Mailbox] = {}
        self._gate = threading.Lock()
        self._reason: WorkerError | None = None

    def add(self, number: int, mailbox: Mailbox) -> None:
        """Events of this request go to the mailbox, from the thread that delivers. Raises WorkerError once shut."""
        with self._gate:
            if self._reason is not None:
                raise _again(self._reason)
            self._open[number] = mailbox

    def deliver(self, events: Sequence[Event]) -> None:
        """Hand events out; a request's last one closes its mailbox."""
        for event in events:
            mailbox = self._open[event.id]
            if event.delta is None:
                del self._open[event.id]
            mailbox(event)

    def fail(self, number: int, error: WorkerError) -> None:
        """Tell one who waits, if anybody still does; from any thread."""
        mailbox = self._open.pop(number, None)
        if mailbox is not None:
            mailbox(Event(number, error=error))

    def shut(self, reason: WorkerError) -> None:
        """Tell everybody who still waits, and whoever comes later, why there will be no answer."""
        with self._gate:
            self._reason = reason
        for number in list(self._open):
            self.fail(number, _again(reason))


def _again(error: WorkerError) -> WorkerError:
    """The same error for another thread to raise: a raised one grows a traceback."""
    copy = type(error)(str(error))
    copy.__cause__ = error.__cause__
    return copy
