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
        before, _ = _held(self._device, "allocated_bytes")
        yield
        after, most = _held(self._device, "allocated_bytes")
        self._note(kind, predicted_bytes, most - max(before, after))
        self._peak_bytes = max(self._peak_bytes, _held(self._device, "reserved_bytes")[1] + self._pool_bytes)

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
        if self._device.type == "cuda" and self._pool is not None and not self.has_room(n_bytes):
            torch.cuda.empty_cache()

    def has_room(self, n_bytes: int) -> bool:
        """Whether so much more can be mapped on a GPU while the allocator keeps what it holds."""
        if self._device.type != "cuda":
            return False
        return _held(self._device, "reserved_bytes")[0] + self._pool_bytes + n_bytes <= self._allowed_bytes

    def cap(self) -> None:
        """Leave to the allocator what the pool does not hold."""
        cap_allocator(self._device, max(self._allowed_bytes - self._pool_bytes, 0))

    def uncap(self) -> None:
        """Leave the device to whoever comes after: the cap is the process', and would outlast the engine."""
        cap_allocator(self._device, None)

    def unused_bytes(self) -> int:
        """What the allocator holds without a tensor in it; 0 where nothing counts."""
        if self._device.type != "cuda":
            return 0
        return _held(self._device, "reserved_bytes")[0] - _held(self._device, "allocated_bytes")[0]

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


def _held(device: torch.device, what: str) -> tuple[int, int]:
    """(now, at most) of one of the allocator's counters; torch.cuda.memory_allocated and its like sort all of them."""
    counter = torch.cuda.memory_stats_as_nested_dict(device)[what]["all"]
    return counter["current"], counter["peak"]
