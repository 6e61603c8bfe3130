"""What happens when the device has no memory left; the only file that catches an out-of-memory error.

A step that failed is planned anew one rung lower, outside the `except` block, whose traceback would keep the failed
step's tensors alive. Doing a step again changes nothing, so nothing but time is lost; after quiet steps the engine
climbs back.
"""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from memphi.engine.step import StepPlan
from memphi.errors import DoesNotFitError

T = TypeVar("T")

LOADING_ADVICE = "choose another device, or a number format with fewer bytes"
NAMELESS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""What the CPU's allocator, the driver, CUDA's libraries and Triton say, which have no error class of their own."""
QUIET_STEPS = 64
"""Steps without trouble after which one rung is taken back."""


class Rung(Protocol):
    """One way to need less memory."""

    name: str
    repeats: bool
    """Whether it may be taken again and again, each time for a little more; then it is also undone as often."""

    def take(self, plan: StepPlan) -> bool:
        """Need less for what this plan was to do; False where there is nothing to gain."""
        ...

    def undo(self) -> None:
        """Take one move back."""
        ...


class Ladder:
    """Rungs, cheapest first, and how far down the engine stands."""

    def __init__(self, rungs: Sequence[Rung], counts: Counter[str]) -> None:
        self._rungs = rungs
        self._counts = counts
        self._next = 0
        self._taken: list[Rung] = []
        self._quiet_steps = 0

    def climb_down(self, plan: StepPlan) -> bool:
        """Take the next rung that helps a plan that failed; False where none is left."""
        self._quiet_steps = 0
        while self._next < len(self._rungs):
            rung = self._rungs[self._next]
            took = rung.take(plan)
            if not took or not rung.repeats:
                self._next += 1
            if took:
                if rung.repeats:  # The others leave nothing to undo.
                    self._taken.append(rung)
                self._counts[rung.name] += 1
                logging.getLogger(__name__).warning("out of memory: %s", rung.name)
                return True
        return False

    def wait(self) -> None:
        """No rung was left: the next failure begins below those that only give back what is idle, as who waits does."""
        self._next = next((i for i, rung in enumerate(self._rungs) if rung.repeats), len(self._rungs))

    def note_success(self) -> None:
        """A step went well: the next failure begins at the top, and after a while a rung is taken back."""
        self._next = 0
        if not self._taken:
            return
        self._quiet_steps += 1
        if self._quiet_steps == QUIET_STEPS:
            self._taken.pop().undo()
            self._quiet_steps = 0


def attempt(work: Callable[[], T]) -> T | None:
    """Do work; None where memory ran out, after everything that the failure held is freed."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: until here the error's traceback kept the tensors of its frames.
    gc.unfreeze()  # What is older than the work may hold memory too.
    gc.collect()
    return None


@contextmanager
def told_plainly(work: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory inside into a DoesNotFitError that says what would work."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_little(work, device, advice) from None


def too_little(work: str, device: torch.device, advice: str) -> DoesNotFitError:
    """The error that says which device has too little memory for what, and what would work."""
    return DoesNotFitError(f"{_name(device)} has too little memory for {work}{_state(device)}; {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NAMELESS):
        return True
    # To end a graph's capture that ran out of memory fails too, with other words.
    before = error.__context__ if isinstance(error, RuntimeError) else None
    return before is not None and is_out_of_memory(before)


def _name(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)


def _state(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return f" ({free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free)"
