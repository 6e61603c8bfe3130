"""Encoder outputs by what they were made from, bounded in bytes: who asks for the same medium again shares them.

Knows sizes, users and progress; what a value is (a tensor on some device) is the engine's business.
"""

import hashlib
from collections import OrderedDict
from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class MediaKey:
    """All that an encoder's output depends on."""

    digest: str
    """A hash of the content."""
    detail: str | int
    preprocessing: int
    """The version of what turns content into the encoder's input."""
    scheme: str
    """How the encoder's weights are stored."""
    head: str
    """For audio the projector: speech, or vision where images accompany it."""

    def fingerprint(self) -> bytes:
        """The key as bytes, for the key of a page in which the medium stands."""
        return hashlib.blake2b(repr(astuple(self)).encode(), digest_size=32).digest()


@dataclass(eq=False)
class MediaEntry(Generic[T]):
    """One medium's embeddings, finished or being made; whoever makes them sets `value` and counts `done` up."""

    key: MediaKey
    tokens: int
    n_bytes: int
    units: int
    """Crops, or windows of a clip, to be encoded in all."""
    done: int = 0
    users: int = 0
    value: T | None = None

    @property
    def ready(self) -> bool:
        return self.done == self.units


class MediaCache(Generic[T]):
    """Entries in use are always kept; idle ones (finished, used by nobody) as far as the limit allows."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: dict[MediaKey, MediaEntry[T]] = {}
        self._idle: OrderedDict[MediaKey, MediaEntry[T]] = OrderedDict()  # The one released longest ago comes first.
        self._held_bytes = 0
        self._idle_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all entries; one that is not encoded yet counts in full. Above the limit only while in use."""
        return self._held_bytes

    @property
    def idle_bytes(self) -> int:
        return self._idle_bytes

    def acquire(self, key: MediaKey, tokens: int, n_bytes: int, units: int) -> MediaEntry[T]:
        """The entry of a key, with one user more; a new one where there is none, for which idle ones may have to go."""
        entry = self._entries.get(key)
        if entry is None:
            entry = MediaEntry(key, tokens, n_bytes, units)
            self._shrink_to(self.limit_bytes - n_bytes)
            self._entries[key] = entry
            self._held_bytes += n_bytes
        assert (entry.tokens, entry.n_bytes, entry.units) == (tokens, n_bytes, units), f"{key} has another size"
        if self._idle.pop(key, None):
            self._idle_bytes -= n_bytes
        entry.users += 1
        return entry

    def release(self, entry: MediaEntry[T]) -> None:
        """One user less; without any, an unfinished entry vanishes and a finished one is idle, while there is room."""
        assert entry.users > 0, f"{entry.key} is released more often than acquired"
        entry.users -= 1
        if entry.users == 0 and entry.ready:
            self._idle[entry.key] = entry
            self._idle_bytes += entry.n_bytes
        elif entry.users == 0:
            self._forget(entry)
        self._shrink_to(self.limit_bytes)

    def drop_idle(self) -> int:
        """Forget all idle entries; returns their bytes."""
        dropped_bytes = self._idle_bytes
        self._shrink_to(0)
        return dropped_bytes

    def check(self) -> None:
        """Raise AssertionError unless sums, states and the limit hold."""
        assert self._held_bytes == sum(entry.n_bytes for entry in self._entries.values()), "held bytes are wrong"
        assert self._idle_bytes == sum(entry.n_bytes for entry in self._idle.values()), "idle bytes are wrong"
        assert self._held_bytes <= self.limit_bytes or not self._idle, "idle entries are held above the limit"
        for key, entry in self._entries.items():
            assert entry.key == key, "an entry lies under another's key"
            assert 0 <= entry.done <= entry.units, f"{entry.done} of {entry.units} units are done"
            assert (entry.users == 0) == (self._idle.get(key) is entry), "idle means: nobody uses it"
            assert entry.users > 0 or entry.ready, "an unfinished entry is used by nobody"
        assert self._idle.keys() <= self._entries.keys(), "an idle entry is not held"

    def _shrink_to(self, n_bytes: int) -> None:
        """Forget idle entries, the one released longest ago first, until no more than this is held or none is idle."""
        while self._idle and self._held_bytes > n_bytes:
            _, entry = self._idle.popitem(last=False)
            self._idle_bytes -= entry.n_bytes
            self._forget(entry)

    def _forget(self, entry: MediaEntry[T]) -> None:
        del self._entries[entry.key]
        self._held_bytes -= entry.n_bytes
        entry.value = None  # Whoever still holds the entry does not hold its memory.
