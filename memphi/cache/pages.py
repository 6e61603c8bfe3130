"""Page book-keeping in integers: which pages are free, which are in use and by how many, which are kept under a key.

A page holds the keys and values of `page_tokens` tokens in all layers. Nothing here touches that memory, which is the
pool's; the scheduler asks for pages, shares and releases them.
"""

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class OutOfPagesError(Exception):
    """More pages were asked for than are free or idle; whoever asks looks at `available_pages` first."""


class Pages:
    """Pages by number: free, in use, or idle (used by nobody, the content kept under a key).

    Every number ever given out lies below the largest capacity so far.
    """

    def __init__(self, capacity: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._numbers = capacity  # The numbers that exist are range(_numbers).
        self._free = list(range(capacity))  # A heap, as is _retired: what shrinking took.
        self._retired: list[int] = []
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # The next one to be forgotten comes first.
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def capacity(self) -> int:
        return self._numbers - len(self._retired)

    @property
    def free_pages(self) -> int:
        """How many hold nothing of use."""
        return len(self._free)

    @property
    def idle_pages(self) -> int:
        """How many are used by nobody and kept under a key."""
        return len(self._idle)

    @property
    def used_pages(self) -> int:
        return len(self._users)

    @property
    def available_pages(self) -> int:
        """How many can be allocated; sharing an idle page takes one of them."""
        return len(self._free) + len(self._idle)

    def users(self, page: int) -> int:
        """How many use a page; 0 for one that is free or idle."""
        return self._users.get(page, 0)

    def kept(self) -> set[int]:
        """The pages whose content counts, used or idle: what the pool must not give back."""
        return self._users.keys() | self._idle.keys()

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys have a page; changes nothing."""
        return next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of these keys, each with one user more; KeyError, and no change, where a key has no page."""
        pages = [self._pages[key] for key in keys]
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return pages

    def allocate(self, count: int) -> list[int]:
        """Pages for one user: the lowest free numbers, then the idle ones released longest ago, which are forgotten.

        Raises OutOfPagesError, and changes nothing, where there are too few.
        """
        if count > self.available_pages:
            raise OutOfPagesError(f"{count} pages asked for, {self.available_pages} of {self.capacity} available")
        self.drop_idle(count - len(self._free))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._users.update(dict.fromkeys(pages, 1))
        return pages

    def upcoming(self, count: int) -> list[int]:
        """The free pages that would be allocated next, so many if there are as many; changes nothing."""
        return heapq.nsmallest(count, self._free)

    def register(self, page: int, key: bytes) -> None:
        """Offer a page in use, whose content is complete, under its key; a key that exists keeps its first page."""
        assert page in self._users, f"page {page} is not in use"
        if key not in self._pages:
            assert page not in self._keys, f"page {page} has another key"
            self._keys[page] = key
            self._pages[key] = page

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each, given in the order of their tokens; who loses the last is idle with a key, else free.

        Of pages released together the later ones are forgotten first: without its parents a page is of no use.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                if page in self._keys:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._free, page)

    def drop_idle(self, count: int | None = None) -> int:
        """Forget so many idle pages (None: all), those released longest ago first; returns how many there were."""
        dropped = len(self._idle) if count is None else min(max(count, 0), len(self._idle))
        for _ in range(dropped):
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
            heapq.heappush(self._free, page)
        return dropped

    def resize(self, capacity: int) -> int:
        """Grow, or give up free pages, the highest first, as far as there are any; returns how many were given up.

        What growing adds are first the numbers given up before.
        """
        for _ in range(capacity - self.capacity):
            heapq.heappush(self._free, self._new_number())
        surplus = min(self.capacity - capacity, len(self._free))
        if surplus > 0:
            self._free.sort()
            self._retired = sorted(self._retired + self._free[-surplus:])
            del self._free[-surplus:]
        return surplus

    def check(self) -> None:
        """Raise AssertionError unless every page is in exactly one state and every key belongs to one page."""
        places = Counter(self._free) + Counter(self._retired) + Counter(self._users.keys()) + Counter(self._idle.keys())
        assert places == Counter(range(self._numbers)), "a page is in two states, or in none"
        assert all(users > 0 for users in self._users.values()), "a page is used by nobody"
        assert self._pages == {key: page for page, key in self._keys.items()}, "keys and pages disagree"
        assert self._idle.keys() <= self._keys.keys() <= self.kept(), "an idle page without a key, or a free one with"
        for heap in (self._free, self._retired):
            assert all(heap[(i - 1) // 2] <= heap[i] for i in range(1, len(heap))), "the lowest number is not first"

    def _new_number(self) -> int:
        if self._retired:
            return heapq.heappop(self._retired)
        self._numbers += 1
        return self._numbers - 1


@dataclass(frozen=True)
class MediaMark:
    """Where a prompt's medium stands; `digest` is of all that decides its embeddings (MediaKey.fingerprint)."""

    start: int
    tokens: int
    digest: bytes


def root_key(adapter: str | None, audio_head: str | None, long: bool, cache_format: str) -> bytes:
    """What the first page of a sequence has for a parent: all that keys and values depend on besides the prompt.

    `adapter` is the adapter's name (None: none), `long` the rope regime, `cache_format` how pages store numbers. They
    live no longer than the weights.
    """
    return _digest(repr((adapter, audio_head, long, cache_format)).encode())


def page_key(parent: bytes, start: int, ids: Sequence[int], media: Iterable[MediaMark]) -> bytes:
    """The key of one full page that begins at token `start` of its sequence and holds `ids`."""
    content = array("q", (len(parent), len(ids), *ids)).tobytes() + parent
    for mark in media:
        first, end = max(mark.start, start), min(mark.start + mark.tokens, start + len(ids))
        if first < end:
            place = (first - start, end - start, first - mark.start, len(mark.digest))
            content += array("q", place).tobytes() + mark.digest
    return _digest(content)


def page_keys(root: bytes, ids: Sequence[int], media: Sequence[MediaMark], page_tokens: int) -> list[bytes]:
    """The keys of a sequence's full pages, each of which depends on all before it."""
    marks: defaultdict[int, list[MediaMark]] = defaultdict(list)
    for mark in media:
        for page in range(mark.start // page_tokens, -(-(mark.start + mark.tokens) // page_tokens)):
            marks[page].append(mark)
    keys: list[bytes] = []
    parent = root
    for page in range(len(ids) // page_tokens):
        start = page * page_tokens
        parent = page_key(parent, start, ids[start : start + page_tokens], marks[page])
        keys.append(parent)
    return keys


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=32).digest()
