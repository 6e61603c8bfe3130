"""One loop behind an inbox: callers of any threads and of asyncio share one engine.

`work` steps a loop as the messages in its inbox say. Here it runs in a thread of the caller's process; `engine.child`
runs the same in a process of its own.
"""

import gc
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from memphi.engine.device import current
from memphi.engine.loop import Loop
from memphi.engine.messages import Cancellation, Close, Event, Mailbox, Mailboxes, Submission, Wake
from memphi.engine.preparation import THREAD_NAME as PREPARATION_NAME
from memphi.engine.pressure import Bounds, too_large
from memphi.engine.sequence import Sequence as Running
from memphi.errors import WorkerError

LONGEST_WAIT_SECONDS = 1.0
"""How long a loop that can do nothing waits before it looks again at the memory there is."""
THREAD_NAME = "memphi-engine"

Inbox = queue.SimpleQueue[object]


class ThreadWorker:
    """The thread that steps a loop whenever there is work."""

    def __init__(self, loop: Loop, inbox: Inbox, bounds: Bounds) -> None:
        self.bounds = bounds
        self._loop = loop
        self._inbox = inbox
        self._mailboxes = Mailboxes()
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        """Hand a request over; its events go to the mailbox, from the worker's thread. Raises WorkerError."""
        self._mailboxes.add(submission.id, mailbox)
        self._inbox.put(submission)

    def cancel(self, number: int) -> None:
        """End a request; its mailbox gets the result so far."""
        self._inbox.put(Cancellation(number))

    def close(self) -> None:
        """End all requests and the thread; an engine's threads, in which one may be collected, do not wait for that."""
        if self._thread.is_alive():
            self._inbox.put(Close())
            if not threading.current_thread().name.startswith((THREAD_NAME, PREPARATION_NAME)):
                self._thread.join()

    def _work(self) -> None:
        failure: Exception | None = None
        try:
            work(self._loop, self._inbox, self.bounds, self._mailboxes.deliver)
        except Exception as error:
            failure = error
        self._mailboxes.shut(stopped(failure, "; load the model again"))


def work(loop: Loop, inbox: Inbox, bounds: Bounds, deliver: Callable[[Sequence[Event]], None]) -> None:
    """Step a loop whenever there is work, until a Close has been read.

    deliver gets what each round brought, also where that is nothing: the counters may have changed.
    """
    closed = busy = rehearsing = False
    with current(loop.runner.model.device), ExitStack() as stack:
        stack.callback(gc.unfreeze)  # Also where the loop fails.
        stack.callback(loop.runner.gauge.uncap)
        while not closed:
            messages = _take(inbox, waits=loop.stalled and not rehearsing)
            rehearsing = not messages and loop.stalled and loop.rehearse()
            closed = any(isinstance(message, Close) for message in messages)
            events = [event for message in messages for event in _obey(message, loop, bounds)]
            events += loop.close() if closed else loop.step()
            if busy != loop.has_work:
                busy = loop.has_work
                _spare_what_is_there(busy)
            deliver(events)


def _spare_what_is_there(busy: bool) -> None:
    """Have collections of garbage look at nothing that is older than the work, until it is done: to look at a model and
    its vocabulary takes a tenth of a second, and many rows bring one about every few rounds."""
    if busy:
        gc.freeze()
    else:
        gc.unfreeze()


def _take(inbox: Inbox, waits: bool) -> list[object]:
    """All messages that are there; waits a while for one where the loop can do nothing else."""
    messages: list[object] = []
    try:
        messages.append(inbox.get(waits, LONGEST_WAIT_SECONDS))
        while True:
            messages.append(inbox.get_nowait())
    except queue.Empty:
        return messages


def _obey(message: object, loop: Loop, bounds: Bounds) -> list[Event]:
    if isinstance(message, Cancellation):
        return loop.cancel(message.id)
    if not isinstance(message, Submission):
        return []
    part = message.part
    if bounds.refuse(part.footprint, part.request.sampling) is not None:  # Who accepted it may have known other bounds.
        return [Event(message.id, error=too_large(part, bounds))]
    return loop.add(_sequence(message, bounds), message.started)


def _sequence(submission: Submission, bounds: Bounds) -> Running:
    """The sequence of a request that fits."""
    part = submission.part
    wanted, room = part.request.sampling.max_tokens, bounds.answer_tokens(part.footprint)
    max_tokens = room if wanted is None else min(wanted, room)
    return Running(submission.id, part.request, part.footprint, max_tokens, text_ids=part.ids, degraded=part.degraded)


def wake(inbox: Inbox) -> Callable[[], None]:
    """What tells a loop that a prompt has become ready."""
    return lambda: inbox.put(Wake())


def stopped(failure: Exception | None, advice: str = "") -> WorkerError:
    """The error of who asks a loop that has ended."""
    cause = f" after {type(failure).__name__}: {failure}" if failure else ""
    error = WorkerError(f"the engine has stopped{cause}{advice}")
    error.__cause__ = failure
    return error
