"""How much memory an engine takes while it works, read every few milliseconds."""

import mmap
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch

from memphi.engine.engine import Engine
from memphi.engine.reservations import HELD

SAMPLE_SECONDS = 0.02
MOST_SAMPLES = 200
"""What a document keeps of a trace: more are thinned out, the highest of neighbours kept."""


def taken_bytes(engine: Engine) -> Callable[[], int] | None:
    """Reads what the work takes: on a GPU tensors, weights among them, at the most of the newest step, and pages in
    use; on a CPU the whole process; None where nobody counts.

    What is only kept for later does not count: pages of earlier prompts, the allocator's unused blocks.
    """
    device, pool = engine.model.device, engine.loop.runner.pool
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # The engine does the same before each step.
        has_own_memory = pool is not None and pool.is_mapped  # Any other is a tensor, which torch counts.
        return lambda: torch.cuda.max_memory_allocated(device) + has_own_memory * engine.stats.accounts.get(HELD, 0)
    statm, page_bytes = Path("/proc/self/statm"), mmap.PAGESIZE
    return (lambda: int(statm.read_text().split()[1]) * page_bytes) if statm.exists() else None


class MemoryTrace(AbstractContextManager["MemoryTrace"]):
    """Reads memory in a thread while the block runs."""

    def __init__(self, read: Callable[[], int] | None) -> None:
        self.samples: list[tuple[float, int]] = []
        """Seconds since the block began, and bytes."""
        self._read = read
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memphi-memory", daemon=True)

    def __enter__(self) -> "MemoryTrace":
        self._started = time.perf_counter()
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._note()

    @property
    def peak_bytes(self) -> int | None:
        return max((n_bytes for _, n_bytes in self.samples), default=None)

    def thinned(self) -> list[tuple[float, int]]:
        """No more than a document keeps."""
        step = -(-len(self.samples) // MOST_SAMPLES) or 1
        groups = (self.samples[first : first + step] for first in range(0, len(self.samples), step))
        return [(round(group[0][0], 3), max(n_bytes for _, n_bytes in group)) for group in groups]

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._note()

    def _note(self) -> None:
        if self._read is not None:
            self.samples.append((time.perf_counter() - self._started, self._read()))
