"""What each sequence may take and holds, in pages; the budget's accounts follow. Integers only.

A sequence first reserves pages (`promised`), then holds them (`pages`). Pages that sequences share are charged once,
and idle ones not at all: so the two accounts together never exceed the pool, and a promise can always be kept.
"""

from collections.abc import Iterable, Sequence

from memphi.cache.pages import Pages
from memphi.engine.sequence import Sequence as Running
from memphi.memory.budget import Budget

PROMISED, HELD = "promised pages", "pages"


class Reservations:
    """The sequences' claims on one pool of pages."""

    def __init__(self, pages: Pages, budget: Budget, page_bytes: int) -> None:
        self.pages = pages
        self.budget = budget
        self._page_bytes = page_bytes

    @property
    def available_pages(self) -> int:
        """Pages that nobody holds and nobody was promised."""
        return max(self.budget.available_bytes, 0) // self._page_bytes

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.page_tokens)

    def reserve(self, sequence: Running, pages: int) -> bool:
        """Promise so many pages in all, those that it holds included; False, and no change, where there are too few."""
        more = pages - sequence.reserved_pages
        if more <= 0:
            return True
        if not self.budget.charge(PROMISED, more * self._page_bytes):
            return False
        sequence.reserved_pages = pages
        return True

    def hold(self, sequence: Running, pages: int) -> None:
        """Take so many of the promised pages in all."""
        more = pages - len(sequence.pages)
        if more <= 0:
            return
        assert pages <= sequence.reserved_pages, "a sequence takes more pages than it was promised"
        sequence.pages += tuple(self.pages.allocate(more))
        self.budget.move(PROMISED, HELD, more * self._page_bytes)

    def share(self, sequence: Running, keys: Sequence[bytes]) -> None:
        """Take pages whose content exists, in place of promised ones; those in use already are free of charge."""
        assert len(keys) <= sequence.reserved_pages, "a sequence finds more pages than it was promised"
        used = self.pages.used_pages
        sequence.pages += tuple(self.pages.share(keys))
        newly_used = self.pages.used_pages - used
        self.budget.move(PROMISED, HELD, newly_used * self._page_bytes)
        self.budget.release(PROMISED, (len(keys) - newly_used) * self._page_bytes)

    def give_back(self, sequence: Running) -> None:
        """Release the pages that a sequence holds and promise it as many; fewer where sharers keep too many of them."""
        reserved = sequence.reserved_pages
        self.release(sequence)
        self.reserve(sequence, min(reserved, self.available_pages))

    def release(self, sequence: Running) -> None:
        """Release all that a sequence holds and was promised."""
        used = self.pages.used_pages
        self.budget.release(PROMISED, (sequence.reserved_pages - len(sequence.pages)) * self._page_bytes)
        self.pages.release(sequence.pages)
        self.budget.release(HELD, (used - self.pages.used_pages) * self._page_bytes)
        sequence.pages = ()
        sequence.reserved_pages = 0

    @property
    def claimed_pages(self) -> int:
        """Pages held and promised."""
        return (self.budget.accounts().get(PROMISED, 0)) // self._page_bytes + self.pages.used_pages

    def resize(self, capacity_pages: int) -> None:
        """Grow or shrink the pool, to no less than is claimed; idle pages go first."""
        assert capacity_pages >= self.claimed_pages, "the pool would be smaller than what is claimed of it"
        before = self.pages.capacity
        self.pages.drop_idle(before - capacity_pages - self.pages.free_pages)
        self.pages.resize(capacity_pages)
        self.budget.resize(self.budget.total_bytes + (self.pages.capacity - before) * self._page_bytes)

    def check(self, sequences: Iterable[Running]) -> None:
        """Raise AssertionError unless pages, promises and accounts agree."""
        self.pages.check()
        self.budget.check()
        accounts = self.budget.accounts()
        claims = list(sequences)
        promised = sum(s.reserved_pages - len(s.pages) for s in claims)
        assert all(s.reserved_pages >= len(s.pages) for s in claims), "a sequence holds more than it was promised"
        assert accounts.get(PROMISED, 0) == promised * self._page_bytes, "the promised pages are not the sequences'"
        held = {page for s in claims for page in s.pages}
        assert len(held) == self.pages.used_pages, "a page is in use by no sequence"
        assert accounts.get(HELD, 0) == len(held) * self._page_bytes, "the pages held are not those in use"
        assert promised + len(held) <= self.pages.capacity, "more was promised than there is"
