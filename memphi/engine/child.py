"""The child process of an engine: loads the model, then steps the loop in its main thread until it is told to end.

`engine.process` starts it and knows the other end of the pipe. Everything that one round brought is one message.
"""

import gc
import logging
import os
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from memphi.engine.engine import load_parts, make_loop
from memphi.engine.loop import Loop
from memphi.engine.messages import Close, Event, Loading, Progressed, Report
from memphi.engine.pressure import Bounds, bounds_of
from memphi.engine.worker import Inbox, stopped, wake, work
from memphi.errors import MemphiError, WorkerError


def run(connection: Connection, loading: Loading) -> None:
    """All that the process does: it sends progress, the plan, then reports; last, perhaps, the error that ended it."""
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="memphi-inbox", daemon=True).start()
    try:
        loop, bounds = _load(connection, loading, inbox)
    except Exception as error:
        _send_failure(connection, error if isinstance(error, MemphiError) else _unforeseen("loading the model", error))
        return
    try:
        work(loop, inbox, bounds, lambda events: _tell(connection, loop, events))
    except Exception as error:
        _send_failure(connection, stopped(error))


def _load(connection: Connection, loading: Loading, inbox: Inbox) -> tuple[Loop, Bounds]:
    parts = load_parts(loading, lambda done, total: connection.send(Progressed(done, total)))
    loop = make_loop(parts.model, parts.tokenizer, parts.plan, loading.config, wake(inbox), loading.engines)
    gc.collect()  # What loading left behind.
    connection.send(parts.plan)
    return loop, bounds_of(parts.plan, loading.config, parts.model.config)


def _read(connection: Connection, inbox: Inbox) -> None:
    """Unpickle what is sent, beside the loop; a parent that is gone ends this process, whatever it is doing."""
    try:
        message: object = None
        while not isinstance(message, Close):
            message = connection.recv()
            inbox.put(message)
    except Exception as error:
        if not isinstance(error, EOFError | OSError):
            logging.getLogger(__name__).error("what was sent cannot be read", exc_info=error)
        os._exit(1)


def _tell(connection: Connection, loop: Loop, events: Sequence[Event]) -> None:
    """Send what a round brought; raises where the device fails at everything from now on: a new process helps."""
    connection.send(Report([_portable(event) for event in events], loop.stats))
    device = loop.runner.model.device
    if device.type == "cuda" and any(event.error and not isinstance(event.error, MemphiError) for event in events):
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as fault:
            raise RuntimeError(str(fault).partition("\n")[0]) from None  # Below stands how to look for the cause.


def _portable(event: Event) -> Event:
    """An event whose error the parent knows; of others the traceback stays here, on stderr."""
    if event.error is None or isinstance(event.error, MemphiError):
        return event
    return Event(event.id, error=_unforeseen("this request", event.error))


def _unforeseen(work: str, error: Exception) -> WorkerError:
    logging.getLogger(__name__).error("%s failed", work, exc_info=error)
    return WorkerError(f"{work} failed in the engine's process: {type(error).__name__}: {error}")


def _send_failure(connection: Connection, error: MemphiError) -> None:
    with suppress(OSError):  # The parent may be gone too.
        connection.send(error)
