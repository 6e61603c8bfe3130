"""Read what the device really holds, keep the dial, and hold predictions against it.

The allocator's cap moves with the pool: what pages take, tensors may not. On a CPU there is nothing to cap or to read
but the process' peak.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memphi.cache.pool import PagePool
from memphi.engine.device import cap_allocator
from memphi.memory.learned import Learned, keep
from memphi.memory.monitor import Monitor


class Gauge:
    """The meter of one engine's device."""

    def __init__(
        self, device: torch.device, pool: PagePool | None, allowed_bytes: int, learned: Learned | None = None
    ) -> None:
        """allowed_bytes is what pool and allocator may take together: the dial less CUDA's own context."""
        self.monitor = Monitor()
        self._learned = learned or Learned()
        self._device = device
        self._pool = pool
        self._allowed_bytes = allowed_bytes
        self._peak_bytes = 0

    @contextmanager
    def watching(self, kind: str, predicted_bytes: int) -> Iterator[None]:
        """Note what the work inside takes at its peak, beyond what was there and what stays."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before_bytes = torch.cuda.memory_allocated(self._device)
        yield
        stays_bytes = max(before_bytes, torch.cuda.memory_allocated(self._device))
        observed_bytes = torch.cuda.max_memory_allocated(self._device) - stays_bytes
        self._note(kind, predicted_bytes, observed_bytes)
        self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_reserved(self._device) + self._pool_bytes)

    def _note(self, kind: str, predicted_bytes: int, observed_bytes: int) -> None:
        """Hold a prediction against the truth: warn once of a kind that is badly predicted, and learn from it."""
        known = kind in self.monitor.records()
        verdict = self.monitor.note(kind, self._learned.price(kind, predicted_bytes), observed_bytes)
        if verdict:
            logging.getLogger(__name__).log(logging.INFO if known else logging.WARNING, verdict)
        wiser = self._learned.seen(kind, predicted_bytes, observed_bytes)
        if wiser is not self._learned:
            self._learned = wiser
            keep(wiser)

    def make_room(self, n_bytes: int) -> None:
        """Before so much is mapped for pages: the allocator gives back what it does not use, if the dial needs it."""
        if self._device.type != "cuda":
            return
        wanted_bytes = self._pool_bytes + n_bytes
        if torch.cuda.memory_reserved(self._device) + wanted_bytes > self._allowed_bytes:
            torch.cuda.empty_cache()

    def cap(self) -> None:
        """Leave to the allocator what the pool does not hold."""
        cap_allocator(self._device, max(self._allowed_bytes - self._pool_bytes, 0))

    def peak_bytes(self) -> int | None:
        """The most that pool and allocator held so far; on the CPU, the process; None where nothing counts."""
        if self._device.type == "cuda":
            return self._peak_bytes
        try:
            import resource
        except ImportError:  # Windows does not count
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @property
    def _pool_bytes(self) -> int:
        return self._pool.mapped_bytes if self._pool else 0
