"""Encoder outputs in use are kept, idle ones within the limit, and what differs never shares an entry."""

from collections import OrderedDict
from dataclasses import fields, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memphi.cache.media import MediaCache, MediaKey

KEY = MediaKey("digest", "auto", 1, "bf16", "speech")
OTHERS = {"digest": "other", "detail": 12, "preprocessing": 2, "scheme": "int8", "head": "vision"}


def numbered(number):
    return replace(KEY, digest=str(number))


def finished(cache, number, n_bytes=10):
    """An entry that somebody made and still uses."""
    entry = cache.acquire(numbered(number), 1, n_bytes, 1)
    entry.done, entry.value = 1, "embeddings"
    return entry


class MediaMachine(RuleBasedStateMachine):
    """Users come and go; `uses` is one entry for each, `idle` what should be kept, longest unused first."""

    def __init__(self):
        super().__init__()
        self.cache = MediaCache(30)
        self.uses = []
        self.idle = OrderedDict()  # key -> bytes

    def held_bytes(self):
        return sum(entry.n_bytes for entry in {id(e): e for e in self.uses}.values()) + sum(self.idle.values())

    def evict(self, room=0):
        while self.idle and self.held_bytes() + room > self.cache.limit_bytes:
            self.idle.popitem(last=False)

    def pick(self, data):
        return data.draw(st.sampled_from(range(len(self.uses))))

    @rule(number=st.integers(0, 9))
    def acquire(self, number):
        key, n_bytes, units = numbered(number), 3 * number + 1, number % 3 + 1
        using = next((entry for entry in self.uses if entry.key == key), None)
        was_idle = self.idle.get(key)
        if using is None and was_idle is None:
            self.evict(room=n_bytes)
        entry = self.cache.acquire(key, number, n_bytes, units)
        self.idle.pop(key, None)
        assert using is None or entry is using
        assert (entry.value is not None) == (entry.done > 0)
        assert was_idle is None or entry.ready
        self.uses.append(entry)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def encode(self, data):
        entry = self.uses[self.pick(data)]
        entry.done, entry.value = min(entry.done + 1, entry.units), "embeddings"

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def release(self, data):
        entry = self.uses.pop(self.pick(data))
        self.cache.release(entry)
        if entry not in self.uses and entry.ready:
            self.idle[entry.key] = entry.n_bytes
        self.evict()
        assert entry in self.uses or entry.key in self.idle or entry.value is None

    @rule()
    def drop(self):
        assert self.cache.drop_idle() == sum(self.idle.values())
        self.idle.clear()

    @invariant()
    def all_is_well(self):
        self.cache.check()
        assert self.cache.held_bytes == self.held_bytes()
        assert self.cache.idle_bytes == sum(self.idle.values())
        for entry in self.uses:
            assert entry.users == self.uses.count(entry)


MediaMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestMedia = MediaMachine.TestCase


def test_a_finished_entry_is_found_again():
    cache = MediaCache(100)
    entry = finished(cache, 1)
    cache.release(entry)
    assert (cache.held_bytes, cache.idle_bytes) == (10, 10)
    assert cache.acquire(numbered(1), 1, 10, 1) is entry
    assert (entry.value, cache.idle_bytes) == ("embeddings", 0)


def test_an_unfinished_entry_vanishes_with_its_last_user():
    cache = MediaCache(100)
    entry = cache.acquire(KEY, 1, 10, 2)
    assert cache.acquire(KEY, 1, 10, 2) is entry
    entry.done, entry.value = 1, "half of it"
    cache.release(entry)
    assert cache.held_bytes == 10
    cache.release(entry)
    assert (cache.held_bytes, entry.value) == (0, None)
    assert cache.acquire(KEY, 1, 10, 2).done == 0


def test_what_was_released_longest_ago_goes_first():
    cache = MediaCache(30)
    entries = [finished(cache, i) for i in range(3)]
    for i in (1, 0, 2):
        cache.release(entries[i])
    cache.release(cache.acquire(numbered(1), 1, 10, 1))
    finished(cache, 3)
    assert [entry.value for entry in entries] == [None, "embeddings", "embeddings"]


def test_what_is_in_use_stays_above_the_limit():
    cache = MediaCache(5)
    used, more = finished(cache, 1), finished(cache, 2)
    assert (cache.held_bytes, used.value, more.value) == (20, "embeddings", "embeddings")
    cache.release(more)
    assert (cache.held_bytes, more.value) == (10, None)


def test_an_entry_released_too_often_is_told():
    cache = MediaCache(100)
    entry = finished(cache, 1)
    cache.release(entry)
    with pytest.raises(AssertionError):
        cache.release(entry)


def test_a_key_has_one_size():
    cache = MediaCache(100)
    cache.acquire(KEY, 1, 10, 1)
    with pytest.raises(AssertionError):
        cache.acquire(KEY, 1, 20, 1)


def test_every_ingredient_is_tested():
    assert OTHERS.keys() == {field.name for field in fields(MediaKey)}


@pytest.mark.parametrize("name", OTHERS)
def test_every_ingredient_of_a_key_makes_another_entry_and_fingerprint(name):
    cache = MediaCache(100)
    other = replace(KEY, **{name: OTHERS[name]})
    assert cache.acquire(KEY, 1, 10, 1) is not cache.acquire(other, 1, 10, 1)
    assert KEY.fingerprint() != other.fingerprint()


def test_a_number_of_crops_is_no_word():
    assert replace(KEY, detail=12).fingerprint() != replace(KEY, detail="12").fingerprint()
