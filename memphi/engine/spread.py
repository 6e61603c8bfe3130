"""One engine for each of several devices, with the face of one: every request goes to the one with the least to do.

A conversation's next turn, and another question about the same attachment, go where the last one went, as long as what
that spares is worth the wait. A request whose engine ends before it has said anything is asked of another. Knows
processes by what they tell of themselves; imports no torch.
"""

import queue
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import ModelConfig
from memphi.engine.facade import EngineState, Facade, Worker
from memphi.engine.messages import Event, Loading, Mailbox, Submission
from memphi.engine.pressure import Bounds
from memphi.engine.process import ProcessWorker
from memphi.errors import BusyError, DeviceError, DoesNotFitError, LostError, RequestError, WorkerError
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Media, Request

if TYPE_CHECKING:
    from memphi.checkpoint.reader import Progress

ANSWER_TOKENS = 512
"""What an answer counts for beside its prompt's tokens: nobody knows how long it will be, and while it runs it costs a
GPU about as much as a prompt of some hundred tokens."""
MOST_HOMES = 8192
"""Conversations of which is kept where they were last."""
PREFERENCE: dict[EngineState, int] = {"ready": 0, "loading": 1, "failed": 2}


class StatefulWorker(Worker, Protocol):
    """A worker that may end, and be started again."""

    @property
    def state(self) -> EngineState: ...

    def revive(self) -> None:
        """Start it again where it has ended and may be started."""
        ...

    def end(self) -> None:
        """Tell it to end, and do not wait for it."""
        ...


class SpreadEngine(Facade):
    """A loaded model on several devices, in a process for each; the same calls as Engine's."""

    def __init__(self, workers: Sequence[ProcessWorker], model_config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(Spread(workers), model_config, tokenizer)
        self.engines = tuple(workers)
        """Each device's, in the order in which they were given, for who watches them."""


def start(loadings: Sequence[Loading], progress: "Progress | None" = None) -> SpreadEngine:
    """Load a model once for each of these, at the same time, and return the engine over all.

    They differ in their device alone; where two have the same, a dial (EngineConfig.memory_bytes) has to leave room for
    both. progress is called with the bytes of all together. Raises what `memphi.load` does for the first that fails;
    the others are ended then. As for `engine.process.start`, a script needs `if __name__ == "__main__":`.
    """
    if not loadings:
        raise RequestError("the list of devices is empty; name one, or several, as in cuda:0")
    location = locate(loadings[0].model)
    model_config = read_config(location.folder)
    workers = list[ProcessWorker]()
    try:
        for loading, name in zip(loadings, _names([loading.device for loading in loadings]), strict=True):
            workers.append(ProcessWorker(replace(loading, engines=len(loadings)), model_config, name))
        tokenizer = Tokenizer.from_folder(location.folder)  # While the processes import torch.
        _load(workers, progress)
    except BaseException:
        _close(workers)
        raise
    return SpreadEngine(workers, model_config, tokenizer)


def find_gpus() -> tuple[str, ...]:
    """All CUDA devices that torch sees here, asked in a process of its own; raises DeviceError where there are none."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not said.isdigit() or said == "0":
        raise DeviceError("this machine has no cuda device that torch can use; use cpu")
    return tuple(f"cuda:{index}" for index in range(int(said)))


def _names(devices: Sequence[str]) -> Iterator[str]:
    """What each device is called, so that no two are called the same."""
    for place, device in enumerate(devices):
        before = devices[:place].count(device)
        yield f"{device} #{before + 1}" if before else device


def _load(workers: Sequence[ProcessWorker], progress: "Progress | None") -> None:
    """Wait until all have loaded the model; raises what went wrong with the first that fails."""
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    sizes, gate = dict.fromkeys(workers, (0, 0)), threading.Lock()

    def note(worker: ProcessWorker, done_bytes: int, total_bytes: int) -> None:
        with gate:
            sizes[worker] = done_bytes, total_bytes
            if progress is not None:
                done, total = map(sum, zip(*sizes.values(), strict=True))
                progress(done, total)

    def load(worker: ProcessWorker) -> None:
        try:
            worker.load(partial(note, worker))
        except BaseException as error:
            outcomes.put(error if len(workers) == 1 else _placed(error, worker.device))
        else:
            outcomes.put(None)

    for worker in workers:  # Daemons: whoever is interrupted meanwhile does not wait for them.
        threading.Thread(target=load, args=(worker,), name="memphi-load", daemon=True).start()
    for _ in workers:
        if (error := outcomes.get()) is not None:
            raise error


def _placed(error: BaseException, device: str) -> BaseException:
    """An error that says where it happened, where that matters and it does not say so itself."""
    return DoesNotFitError(f"{device}: {error}") if isinstance(error, DoesNotFitError) else error


def _close(workers: Sequence[StatefulWorker]) -> None:
    for worker in workers:  # All end at the same time.
        worker.end()
    for worker in workers:
        worker.close()


@dataclass(eq=False)
class _Errand:
    """One request, and where it is."""

    submission: Submission
    mailbox: Mailbox
    place: int | None = None
    """Whose it is, by its place among the workers."""
    begun: bool = False
    """Whether anything of the answer has been heard: then nobody else can give it."""
    asked: set[int] = field(default_factory=set)
    """The places that it was handed to."""
    lost: bool = False
    """Whether one of them was lost, and it with that."""
    cancelled: bool = False

    @cached_property
    def prompt_tokens(self) -> int:
        return self.submission.part.footprint.prompt_tokens

    @cached_property
    def beginning(self) -> int:
        return beginning_of(self.submission.part.request)


class Spread:
    """Hands each request to one of several workers; a Worker itself.

    Called from any threads, and without a lock of its own: every load is counted from what is open.
    """

    def __init__(self, workers: Sequence[StatefulWorker]) -> None:
        """All must have loaded their model."""
        self._workers = workers
        self._open: dict[int, _Errand] = {}
        self._homes: OrderedDict[int, int] = OrderedDict()
        self._waiting = [dict[int, int]() for _ in workers]
        """The work that is left to each, in prompt tokens, by request."""
        self._taken = [0] * len(workers)

    @property
    def bounds(self) -> Bounds:
        """What fits somewhere: cards need not be equal."""
        return max((worker.bounds for worker in self._workers), key=lambda bounds: bounds.tokens)

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        """Hand a request to whoever has the least to do. Raises WorkerError where nobody takes it."""
        for worker in self._workers:
            worker.revive()
        errand, places = _Errand(submission, mailbox), range(len(self._workers))
        # Where it fits nowhere any more, whoever gets it says so.
        self._send(errand, [place for place in places if self._fits(errand, place)] or places)

    def cancel(self, number: int) -> None:
        """End a request, wherever it is; nothing where it has ended already."""
        errand = self._open.get(number)
        if errand is not None:
            errand.cancelled = True  # Should it be on its way to another, it is cancelled there.
            if errand.place is not None:
                self._workers[errand.place].cancel(number)

    def close(self) -> None:
        """End all requests and all workers."""
        _close(self._workers)

    def _send(self, errand: _Errand, places: Sequence[int]) -> None:
        """Hand a request to the best of these that takes it; raises the WorkerError of the best where none does."""
        number, refusal = errand.submission.id, None
        ranked = self._ranked(errand, places)
        self._open[number] = errand
        for place in ranked:
            errand.place = place
            errand.asked.add(place)
            self._waiting[place][number] = errand.prompt_tokens + ANSWER_TOKENS
            try:
                self._workers[place].submit(errand.submission, partial(self._hear, errand))
            except WorkerError as error:
                del self._waiting[place][number]
                refusal = refusal or error
                continue
            self._taken[place] += 1
            self._settle(errand.beginning, place)
            if errand.cancelled:
                self._workers[place].cancel(number)
            return
        del self._open[number]
        raise refusal or WorkerError("there is no other engine with room for it")

    def _ranked(self, errand: _Errand, places: Sequence[int]) -> list[int]:
        """Places, the best for a request first.

        The best answers now, and has the least to do before: the work that waits there, and the request's own prompt,
        unless the same beginning was there last. Among equals it is who has been given the fewest.
        """
        home = self._homes.get(errand.beginning)

        def cost(place: int) -> tuple[int, int, int]:
            waiting = sum(list(self._waiting[place].values()))
            anew = 0 if place == home else errand.prompt_tokens
            return PREFERENCE[self._workers[place].state], waiting + anew, self._taken[place]

        return sorted(places, key=cost)

    def _fits(self, errand: _Errand, place: int) -> bool:
        part = errand.submission.part
        return self._workers[place].bounds.refuse(part.footprint, part.request.sampling) is None

    def _settle(self, beginning: int, place: int) -> None:
        """Remember where a conversation is."""
        self._homes.pop(beginning, None)
        self._homes[beginning] = place
        if len(self._homes) > MOST_HOMES:
            self._homes.popitem(last=False)

    def _hear(self, errand: _Errand, event: Event) -> None:
        """Pass on what a worker tells; called from its thread."""
        assert errand.place is not None
        if event.delta is None:
            self._waiting[errand.place].pop(event.id, None)
            if self._may_move(errand, event.error):
                errand.lost |= isinstance(event.error, LostError)
                if self._move(errand):
                    return
            self._open.pop(event.id, None)
        elif not errand.begun:
            errand.begun = True
            self._waiting[errand.place][event.id] = ANSWER_TOKENS
        errand.mailbox(event)

    def _may_move(self, errand: _Errand, error: Exception | None) -> bool:
        """Whether another may answer what this one has lost, or has no room for now.

        What was lost only once: it may be the request itself that ends whoever computes it.
        """
        if errand.begun or errand.cancelled:
            return False
        return isinstance(error, BusyError) or (isinstance(error, LostError) and not errand.lost)

    def _move(self, errand: _Errand) -> bool:
        """Ask another that has not been asked; whether one takes it."""
        others = [place for place in range(len(self._workers)) if place not in errand.asked]
        try:
            self._send(errand, [place for place in others if self._fits(errand, place)])
        except WorkerError:
            return False
        return True


def beginning_of(request: Request) -> int:
    """A hash of what the turns of a conversation share, and questions about one attachment.

    That is all that stands before the end of the first attachment, or else of the first user's message.
    """
    parts = list[object]()
    for message in request.messages:
        for part in message.content:
            if isinstance(part, Media):
                return hash((*parts, part.digest, part.detail))
            parts.append(part)
        if message.role == "user":
            break
    return hash(tuple(parts))
