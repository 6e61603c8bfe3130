"""Memory follows the work: given back when nothing is asked for a while, and when others on the card need it.

Only the pool and the allocator's unused blocks move; the weights stay.
"""

import logging
import time
from collections.abc import Callable

import torch

from memphi.cache.pool import PagePool
from memphi.engine.gauge import Gauge
from memphi.engine.graphs import Graphs
from memphi.engine.scheduler import Scheduler
from memphi.memory.sizing import reserve_bytes

LOOK_SECONDS = 0.25
"""How often the card's free memory is read."""


class Elastic:
    """Shrinks and grows one engine's pool."""

    def __init__(
        self,
        scheduler: Scheduler,
        pool: PagePool | None,
        gauge: Gauge,
        idle_seconds: float,
        free_memory: Callable[[], tuple[int, int]] | None,
        graphs: Graphs | None = None,
        workspace_bytes: int = 0,
    ) -> None:
        """free_memory tells the device's free and total bytes; None: others do not matter (there is a dial).

        workspace_bytes is what steps may take, graphs included: the pool never grows into it.
        """
        self._scheduler = scheduler
        self._pool = pool
        self._gauge = gauge
        self._idle_seconds = idle_seconds
        self._free_memory = free_memory
        self._graphs = graphs
        self._workspace_bytes = workspace_bytes
        self._most_pages = scheduler.reservations.pages.capacity
        self._idle_since = time.monotonic()
        self._rested = True
        self._next_look = 0.0

    def follow(self, busy: bool) -> None:
        """Called once a round: give memory back where that is due, or take it again."""
        now = time.monotonic()
        if busy:
            self._idle_since, self._rested = now, False
        elif not self._rested and now - self._idle_since >= self._idle_seconds:
            self.rest()
        if self._free_memory is not None and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self.make_way(*self._free_memory())

    def stir(self) -> None:
        """Memory was taken though nothing is asked for: it goes as what requests leave behind."""
        self._idle_since, self._rested = time.monotonic(), False

    def rest(self) -> None:
        """Return to the weights and little more: forget what is kept for later, and give its memory back."""
        self._rested = True
        self._scheduler.media.drop_idle()
        self._scheduler.reservations.pages.drop_idle()
        if self._graphs is not None:
            self._graphs.drop()
        self._trim()

    def make_way(self, free_bytes: int, total_bytes: int) -> None:
        """Shrink the pool where others left the card too little, and let it grow again when they are gone."""
        if self._pool is None:
            return
        pages, reserve = self._scheduler.reservations.pages, reserve_bytes(total_bytes)
        spare_bytes, page_bytes = self._spare(free_bytes), self._pool.page_bytes
        mapped_pages = min(self._pool.mapped_bytes // page_bytes, pages.capacity)

        def leaving(n_bytes: int) -> int:
            return mapped_pages + (spare_bytes - n_bytes) // page_bytes

        # Half the reserve is enough to be left in peace, so that the pool does not move with every trifle.
        wanted_pages = self._most_pages if leaving(reserve // 2) >= self._most_pages else leaving(reserve)
        if spare_bytes < reserve // 2 or pages.capacity < wanted_pages:
            self._resize(wanted_pages)

    def is_crowded(self) -> bool:
        """Whether others hold memory that this engine was planned with, so that waiting may help; never with a dial."""
        if self._free_memory is not None:
            free_bytes, total_bytes = self._free_memory()
            if self._spare(free_bytes) < reserve_bytes(total_bytes) // 2:
                return True
        return self._scheduler.reservations.pages.capacity < self._most_pages

    def _spare(self, free_bytes: int) -> int:
        """Of a card's free bytes, those beyond the work space; what the allocator keeps unused of that is free too."""
        return free_bytes + self._gauge.unused_bytes() - self._workspace_bytes

    def _resize(self, capacity_pages: int) -> None:
        """Set the pool's size; the oldest request keeps what it has, so that something always goes on."""
        before = self._scheduler.reservations.pages.capacity
        active = self._scheduler.active
        least = active[0].reserved_pages if active else 1
        self._scheduler.resize(max(capacity_pages, least))
        after = self._scheduler.reservations.pages.capacity
        if after < before:
            self._trim()
        if after != before:
            logging.getLogger(__name__).info("the pool goes from %d to %d pages", before, after)

    def _trim(self) -> None:
        if self._pool is not None:
            self._pool.trim(self._scheduler.reservations.pages.kept())
            self._gauge.cap()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
