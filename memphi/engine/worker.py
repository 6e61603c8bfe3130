"""One loop behind an inbox, in a thread of its own: callers of any threads and of asyncio share one engine.

Who submits a request gets a mailbox, into which the thread puts what each step brought.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from memphi.engine.loop import Event, Loop
from memphi.engine.sequence import Sequence
from memphi.errors import MemphiError

LONGEST_WAIT_SECONDS = 1.0
"""How long a loop that can do nothing waits before it looks again at the memory there is."""

Mailbox = Callable[[Event], None]


@dataclass(frozen=True)
class _Submission:
    sequence: Sequence
    mailbox: Mailbox
    started: float


@dataclass(frozen=True)
class _Cancellation:
    id: int


class _Wake:
    """A prompt has become ready."""


class _Close:
    """No more work: end."""


class WorkerError(MemphiError):
    """The engine has stopped; what it was doing is lost."""


class Worker:
    """The thread that steps a loop whenever there is work."""

    def __init__(self, loop: Loop, inbox: "queue.SimpleQueue[object]") -> None:
        self._loop = loop
        self._inbox = inbox
        self._mailboxes: dict[int, Mailbox] = {}
        self._failure: Exception | None = None
        self._closed = False
        self._gate = threading.Lock()  # Nothing enters the inbox once its end has been read.
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="memphi-engine", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence, mailbox: Mailbox) -> None:
        """Hand a sequence over; its events go to the mailbox, from the worker's thread."""
        with self._gate:
            if self._ended:
                raise self._stopped()
            self._inbox.put(_Submission(sequence, mailbox, time.perf_counter()))

    def cancel(self, number: int) -> None:
        """End a request; its mailbox gets the result so far."""
        self._inbox.put(_Cancellation(number))

    def close(self) -> None:
        """End all requests and the thread."""
        if self._thread.is_alive():
            self._inbox.put(_Close())
            if self._thread is not threading.current_thread():  # An engine may be collected in its own thread.
                self._thread.join()

    def _work(self) -> None:
        try:
            while not self._closed:
                self._read_inbox()
                self._deliver(self._loop.step())
        except Exception as error:
            self._failure = error
        finally:
            self._end()

    def _read_inbox(self) -> None:
        """Take all messages; waits for one where the loop can do nothing else."""
        waits = self._loop.stalled
        while True:
            try:
                message = self._inbox.get(waits, LONGEST_WAIT_SECONDS)
            except queue.Empty:
                return
            waits = False
            self._obey(message)

    def _obey(self, message: object) -> None:
        if isinstance(message, _Submission):
            self._mailboxes[message.sequence.id] = message.mailbox
            self._loop.add(message.sequence, message.started)
        elif isinstance(message, _Cancellation):
            self._deliver(self._loop.cancel(message.id))
        elif isinstance(message, _Close):
            self._closed = True

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            mailbox = self._mailboxes[event.id]
            if event.delta is None:
                del self._mailboxes[event.id]
            mailbox(event)

    def _end(self) -> None:
        """Answer everybody who still waits: nobody is left hanging."""
        with self._gate:
            self._ended = True
        if self._failure is None:
            self._deliver(self._loop.close())
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Submission):
                self._mailboxes[message.sequence.id] = message.mailbox
        for number, mailbox in self._mailboxes.items():
            mailbox(Event(number, error=self._stopped()))
        self._mailboxes.clear()

    def _stopped(self) -> WorkerError:
        cause = f" after {type(self._failure).__name__}: {self._failure}" if self._failure else ""
        error = WorkerError(f"the engine has stopped{cause}; load the model again")
        error.__cause__ = self._failure
        return error


def wake(inbox: "queue.SimpleQueue[object]") -> Callable[[], None]:
    """What tells a worker that a prompt has become ready."""
    return lambda: inbox.put(_Wake())
