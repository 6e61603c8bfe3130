"""An engine in a process of its own, with the face of one in this process: for what serves and for jobs.

This process measures and refuses, so it needs no torch; the child (`engine.child`) loads the model and steps the loop.
A child that dies fails what was asked of it with one sentence and is started again. Imports no torch.
"""

import atexit
import logging
import queue
import signal
import threading
import time
from collections import deque
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import DEFAULT_MODEL, EngineConfig, ModelConfig
from memphi.engine.facade import DeviceEngine, EngineState, Facade
from memphi.engine.messages import (
    Cancellation,
    Close,
    Loading,
    Mailbox,
    Mailboxes,
    Progressed,
    Report,
    Submission,
)
from memphi.engine.pressure import Bounds, bounds_of
from memphi.engine.settings import AllocatorName
from memphi.engine.stats import Stats
from memphi.errors import LostError, MemphiError, WorkerError
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.plan import MemoryPlan

if TYPE_CHECKING:
    from memphi.checkpoint.reader import Progress
    from memphi.engine.device import DtypeName
    from memphi.model.attention import AttentionName

RESTARTS, RESTART_SECONDS = 3, 60.0
"""A child that dies is started again at once, but not more often than this in so many seconds."""
CLOSED = "the engine is closed"
GRACE_SECONDS = 30.0
"""How long a child may take to end by itself."""


class EngineProcess(Facade):
    """A loaded model in another process; the same calls as Engine's."""

    def __init__(self, worker: "ProcessWorker", model_config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(worker, model_config, tokenizer)
        self._process = worker

    @property
    def config(self) -> EngineConfig:
        return self._process.loading.config

    @property
    def plan(self) -> MemoryPlan:
        """The plan of the process that runs now; one that is started again plans with what is free then."""
        return self._process.plan

    @property
    def stats(self) -> Stats:
        """What the process that runs now had done when it last sent something."""
        return self._process.stats

    @property
    def pid(self) -> int | None:
        """The process that runs now; None while there is none."""
        return self._process.pid

    @property
    def engines(self) -> tuple[DeviceEngine]:
        """The one there is, for who watches it."""
        return (self._process,)


def start(
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    dtype: "DtypeName" = "bf16",
    attention: "AttentionName" = "auto",
    config: EngineConfig | None = None,
    allocator: AllocatorName = "default",
    progress: "Progress | None" = None,
) -> EngineProcess:
    """Load a model in a process of its own and return the engine there; takes and raises what `memphi.load` does.

    The child imports the program's main module, as `multiprocessing` does: a script that calls this needs
    `if __name__ == "__main__":`. Raises WorkerError where the process ends before the model is loaded.
    """
    location = locate(model)
    model_config = read_config(location.folder)
    loading = Loading(model, device, dtype, attention, config or EngineConfig(), allocator)
    worker = ProcessWorker(loading, model_config)
    try:
        tokenizer = Tokenizer.from_folder(location.folder)  # While the child imports torch.
        worker.load(progress)
    except BaseException:
        worker.close()
        raise
    return EngineProcess(worker, model_config, tokenizer)


class ProcessWorker:
    """Keeps one child running, hands it what is asked, and hands out what it answers."""

    plan: MemoryPlan

    def __init__(self, loading: Loading, model_config: ModelConfig, device: str | None = None) -> None:
        """device is what the device is called where not as in loading."""
        self.loading = loading
        self.device = device or loading.device
        self._model_config = model_config
        self._gate = threading.RLock()  # A collected engine may close its worker from any thread, at any moment.
        self._ends: deque[float] = deque(maxlen=RESTARTS + 1)
        self._closed = False
        self._trouble: WorkerError | None = None
        self._thread: threading.Thread | None = None
        self._child: _Child | None = _Child(loading)
        atexit.register(self.close)  # Before multiprocessing waits for the child: its SIGTERM does not end that.

    @property
    def bounds(self) -> Bounds:
        """What one request may take, by the newest plan."""
        return bounds_of(self.plan, self.loading.config, self._model_config)

    @property
    def stats(self) -> Stats:
        child = self._child
        return child.stats if child else Stats()

    @property
    def pid(self) -> int | None:
        child = self._child
        return child.pid if child else None

    @property
    def state(self) -> EngineState:
        with self._gate:
            child = self._child
            if child is None:
                return "loading" if self._may_start() else "failed"  # Whoever asks next starts it.
            return "ready" if child.loaded else "loading"

    def load(self, progress: "Progress | None") -> None:
        """Wait until the first child has loaded the model; called once. Raises what went wrong there."""
        assert self._child is not None
        self.plan = self._child.load(progress)
        self._supervise(self._child)

    def revive(self) -> None:
        """Start the process again where there is none, and it has not ended too often of late."""
        with self._gate:
            if self._child is None and (successor := self._start_again()):
                with suppress(RuntimeError):  # As where there is no room for the process.
                    self._supervise(successor)
                    self._child = successor

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        """Send a request, after the model is loaded again where need be. Raises WorkerError where it will not be."""
        with self._gate:
            self.revive()
            child, trouble = None if self._closed else self._child, self._trouble
        if child is None:
            raise WorkerError(str(trouble or CLOSED))
        child.submit(submission, mailbox)

    def cancel(self, number: int) -> None:
        """End a request; nothing where it has ended already."""
        child = self._child
        if child is not None:
            child.send(Cancellation(number))

    def end(self) -> None:
        """Tell the process to end, and do not wait for it; nothing is started any more."""
        with self._gate:
            self._closed, self._trouble = True, None
            child = self._child
        if child is not None:
            child.close()

    def close(self) -> None:
        """End all requests and the process."""
        self.end()
        atexit.unregister(self.close)
        with self._gate:
            child, thread = self._child, self._thread
        if child is None:
            return
        if thread is None:
            child.wait()
            child.shut(WorkerError(CLOSED))
        elif thread is not threading.current_thread():
            try:
                thread.join(GRACE_SECONDS)
            finally:  # Also where a Ctrl-C comes: at its exit multiprocessing waits for a child that is there.
                child.kill()
            thread.join()

    def _supervise(self, child: "_Child") -> None:
        """Follow a child; raises RuntimeError, and ends the child, where the system has no room for another thread."""
        thread = threading.Thread(target=self._follow, args=(child,), name="memphi-process", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            child.abandon()
            raise
        self._thread = thread

    def _follow(self, child: "_Child | None") -> None:
        """Hand out what one child after another answers, until there is none."""
        while child is not None:
            try:
                if not child.loaded:
                    self.plan = child.load()
                child.hand_out()
            except Exception as error:
                child = self._succeed(child, error)

    def _succeed(self, child: "_Child", cause: Exception) -> "_Child | None":
        """The child after one that has ended; who waited for that one is told, whatever becomes of this."""
        reason = WorkerError(str(cause))
        try:
            child.kill()
            child.wait()  # Its memory is free only when it is gone.
            with self._gate:
                self._ends.append(time.monotonic())
                self._child = successor = self._start_again()
                self._trouble = trouble = None if self._closed else self._tell(child, cause)
            if trouble is not None:
                logging.getLogger(__name__).error("%s", trouble)
            reason = trouble or WorkerError(CLOSED)
            return successor
        finally:
            child.shut(reason)

    def _start_again(self) -> "_Child | None":
        try:
            return _Child(self.loading) if self._may_start() else None
        except (OSError, RuntimeError):  # The system has no room for another process; a later request tries again.
            return None

    def _may_start(self) -> bool:
        return not self._closed and self._recent_ends <= RESTARTS

    @property
    def _recent_ends(self) -> int:
        return sum(time.monotonic() - end < RESTART_SECONDS for end in self._ends)

    def _tell(self, child: "_Child", cause: Exception) -> LostError:
        """Why requests get no answer, in one sentence, and what would work."""
        what = str(cause) if child.loaded else f"the engine could not be started again: {cause}"
        if self._child is not None:
            return LostError(f"{what}; it is being started again: send the request once more")
        if self._may_start():
            return LostError(f"{what}; the system has no room for another process now: send the request again later")
        again = f"it has now ended {self._recent_ends} times within {RESTART_SECONDS:.0f} seconds and is left alone"
        return LostError(f"{what}; {again}: a request after as long starts it again")


class _Child:
    """One child process from its start to its end, and who waits for it."""

    def __init__(self, loading: Loading) -> None:
        """Start it. Raises OSError, or RuntimeError where the system has no room for another thread."""
        self.loaded = False
        self.stats = Stats()
        self._name = "the engine's process" + ("" if loading.device == "auto" else f" on {loading.device}")
        self._mailboxes = Mailboxes()
        self._burial = threading.Lock()
        self._outbox: queue.SimpleQueue[Submission | Cancellation | Close | None] = queue.SimpleQueue()
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_begin, args=(theirs, loading), name="memphi-engine", daemon=True)
        self._process.start()
        theirs.close()  # So that the pipe ends when the child does.
        try:
            threading.Thread(target=self._write, name="memphi-outbox", daemon=True).start()
        except BaseException:
            self.abandon()
            raise

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def load(self, progress: "Progress | None" = None) -> MemoryPlan:
        """Wait until the model is loaded; raises what went wrong, WorkerError where the process has ended."""
        while not isinstance(message := self._receive(), MemoryPlan):
            if isinstance(message, Progressed) and progress is not None:
                progress(message.done_bytes, message.total_bytes)
        self.loaded = True
        return message

    def hand_out(self) -> None:
        """Hand out events until the process ends, which raises WorkerError."""
        while True:
            report = self._receive()
            assert isinstance(report, Report)
            self.stats = report.stats
            self._mailboxes.deliver(report.events)

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        self._mailboxes.add(submission.id, mailbox)
        self._outbox.put(submission)

    def send(self, message: Cancellation | Close) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        """Let it end: at once while it loads, else after its requests have got what there is of their answers."""
        if self.loaded:
            self.send(Close())
        else:
            self.kill()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        """Wait until the process is gone, with all that it held; from any threads."""
        with self._burial:  # Of two that reap it at once, multiprocessing tells one that there is nobody to reap.
            self._process.join(GRACE_SECONDS)
            self.kill()
            self._process.join()

    def abandon(self) -> None:
        """End it before anybody has asked it anything."""
        self.kill()
        self.wait()
        self.shut(WorkerError(CLOSED))

    def shut(self, reason: WorkerError) -> None:
        """Tell who still waits; the process is gone."""
        self._mailboxes.shut(reason)
        self._outbox.put(None)

    def _receive(self) -> object:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            self.wait()
            raise WorkerError(f"{self._name} {_end(self._process.exitcode)}") from None
        if isinstance(message, MemphiError):
            raise message
        return message

    def _write(self) -> None:
        """Pickle and send what is asked, beside its askers: nobody else waits for a full pipe."""
        for message in iter(self._outbox.get, None):
            try:
                self._connection.send(message)
            except OSError:  # The process is gone, as whoever reads from it will see.
                return
            except Exception as error:
                assert isinstance(message, Submission)
                sentence = f"the request cannot be sent to the engine's process: {error}"
                self._mailboxes.fail(message.id, WorkerError(sentence))


def _begin(connection: Connection, loading: Loading) -> None:
    """What the child does first: a terminal's Ctrl-C and a service's end reach it too, and are the parent's to act on.

    The parent ends it by a Close, by SIGKILL, or by ending itself, which ends the pipe.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from memphi.engine.child import run

    run(connection, loading)


def _end(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return "has ended" if exit_code is None else f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    system = ", which is also how the system ends a process when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{system}"
