"""What was promised can always be taken, and no page is paid for twice or never."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memphi.cache.pages import Pages
from memphi.engine.reservations import HELD, PROMISED, Reservations
from memphi.engine.sequence import Sequence
from memphi.memory.budget import Budget
from tests.pure.engine_simulation import text

PAGE_BYTES, OTHER_BYTES = 10, 7


def make_reservations(pages=10):
    """A pool whose budget holds other things too."""
    budget = Budget(pages * PAGE_BYTES + OTHER_BYTES)
    budget.charge("weights", OTHER_BYTES)
    return Reservations(Pages(pages, 16), budget, PAGE_BYTES)


def sequence(number=0):
    case = text(1)
    return Sequence(number, case.request, case.footprint, 1)


def keys(count, name=b"k"):
    return [name + bytes([i]) for i in range(count)]


def with_content(reservations, count, name=b"k"):
    """A sequence that holds pages with content."""
    some = sequence()
    assert reservations.reserve(some, count)
    reservations.hold(some, count)
    for page, key in zip(some.pages, keys(count, name), strict=True):
        reservations.pages.register(page, key)
    return some


class ReservationsMachine(RuleBasedStateMachine):
    """Sequences that reserve, hold, share, start over and go, in a pool that changes its size."""

    def __init__(self):
        super().__init__()
        self.reservations = make_reservations()
        self.sequences = [sequence(i) for i in range(4)]
        self.offered = set()  # Whose pages have keys, or may not get any.

    def pick(self, data):
        return data.draw(st.sampled_from(self.sequences))

    @rule(data=st.data(), pages=st.integers(0, 12))
    def reserve(self, data, pages):
        some = self.pick(data)
        available, before = self.reservations.available_pages, some.reserved_pages
        granted = self.reservations.reserve(some, pages)
        assert granted == (pages - before <= available or pages <= before)
        assert some.reserved_pages == (max(pages, before) if granted else before)
        assert self.reservations.available_pages == available - (some.reserved_pages - before)

    @rule(data=st.data(), share=st.floats(0, 1))
    def hold(self, data, share):
        some = self.pick(data)
        pages, before = int(share * some.reserved_pages), some.pages
        others = {page for s in self.sequences if s is not some for page in s.pages}
        available = self.reservations.available_pages
        self.reservations.hold(some, pages)
        assert some.pages[: len(before)] == before
        assert len(some.pages) == max(pages, len(before))
        assert not others & set(some.pages[len(before) :])
        assert self.reservations.available_pages == available

    @rule(data=st.data(), chain=st.integers(0, 1))
    def register(self, data, chain):
        """Only who computed a beginning by itself offers it."""
        some = self.pick(data)
        name = bytes([chain])
        free = all(self.reservations.pages.users(page) == 1 for page in some.pages)
        if free and some.pages and not self.reservations.pages.match(keys(1, name)) and some not in self.offered:
            for page, key in zip(some.pages, keys(len(some.pages), name), strict=True):
                if not self.reservations.pages.match([key]):
                    self.reservations.pages.register(page, key)
            self.offered.add(some)

    @rule(data=st.data(), chain=st.integers(0, 1))
    def share(self, data, chain):
        some = self.pick(data)
        names = keys(12, bytes([chain]))
        known = names[: min(self.reservations.pages.match(names), some.reserved_pages)]
        if some.pages or not known:
            return
        available, used = self.reservations.available_pages, self.reservations.pages.used_pages
        self.reservations.share(some, known)
        self.offered.add(some)
        assert len(some.pages) == len(known)
        newly_used = self.reservations.pages.used_pages - used
        assert self.reservations.available_pages - available == len(known) - newly_used

    @rule(data=st.data())
    def give_back(self, data):
        some = self.pick(data)
        reserved, kept = some.reserved_pages, sum(self.reservations.pages.users(page) > 1 for page in some.pages)
        available = self.reservations.available_pages
        self.reservations.give_back(some)
        self.offered.discard(some)
        assert some.pages == ()
        # All that only this one had comes back to it, and what is free beside makes up for what sharers keep.
        assert some.reserved_pages == min(reserved, reserved - kept + available)

    @rule(data=st.data())
    def release(self, data):
        some = self.pick(data)
        self.reservations.release(some)
        self.offered.discard(some)
        assert (some.pages, some.reserved_pages) == ((), 0)

    @rule(capacity=st.integers(0, 20))
    def resize(self, capacity):
        if capacity < self.reservations.claimed_pages:
            with pytest.raises(AssertionError, match="smaller than what is claimed"):
                self.reservations.resize(capacity)
        else:
            claimed = self.reservations.claimed_pages
            self.reservations.resize(capacity)
            assert self.reservations.pages.capacity == capacity
            assert self.reservations.available_pages == capacity - claimed

    @precondition(lambda self: any(s.reserved_pages > len(s.pages) for s in self.sequences))
    @rule()
    def every_promise_is_kept(self):
        for some in self.sequences:
            self.reservations.hold(some, some.reserved_pages)

    @invariant()
    def all_is_well(self):
        reservations = self.reservations
        reservations.check(self.sequences)
        held = {page for s in self.sequences for page in s.pages}
        promised = sum(s.reserved_pages - len(s.pages) for s in self.sequences)
        assert reservations.claimed_pages == len(held) + promised
        assert reservations.available_pages == reservations.pages.capacity - reservations.claimed_pages
        assert reservations.pages.available_pages >= promised

    def teardown(self):
        self.every_promise_is_kept()
        for some in self.sequences:
            self.reservations.release(some)
        self.all_is_well()
        assert self.reservations.budget.accounts() == {"weights": OTHER_BYTES}


ReservationsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestReservations = ReservationsMachine.TestCase


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for_tokens(tokens, pages):
    assert make_reservations().pages_for(tokens) == pages


def test_more_than_there_is_is_not_promised():
    reservations, one, other = make_reservations(10), sequence(), sequence(1)
    assert reservations.reserve(one, 6)
    assert not reservations.reserve(other, 5)
    assert other.reserved_pages == 0
    assert reservations.reserve(other, 4)
    assert reservations.available_pages == 0
    assert reservations.reserve(one, 3)  # It has more already.
    assert one.reserved_pages == 6


def test_nobody_takes_more_than_it_was_promised():
    reservations, some = make_reservations(), sequence()
    reservations.reserve(some, 2)
    with pytest.raises(AssertionError, match="more pages than it was promised"):
        reservations.hold(some, 3)


def test_idle_pages_are_there_to_be_promised():
    reservations = make_reservations(4)
    reservations.release(with_content(reservations, 4))
    assert (reservations.available_pages, reservations.pages.idle_pages) == (4, 4)
    some = sequence(1)
    assert reservations.reserve(some, 4)
    reservations.hold(some, 4)
    assert reservations.pages.idle_pages == 0


def test_a_page_that_two_use_is_paid_once():
    reservations = make_reservations(10)
    one, other = with_content(reservations, 4), sequence(1)
    reservations.reserve(other, 6)
    assert reservations.available_pages == 0
    reservations.share(other, keys(3))
    assert reservations.available_pages == 3
    assert reservations.budget.accounts() == {"weights": OTHER_BYTES, HELD: 40, PROMISED: 30}
    reservations.release(one)
    assert reservations.available_pages == 4
    reservations.release(other)
    assert reservations.claimed_pages == 0


def test_starting_over_gets_less_where_a_sharer_keeps_pages():
    reservations = make_reservations(6)
    one, other = with_content(reservations, 4), sequence(1)
    reservations.reserve(other, 2)
    reservations.share(other, keys(2))
    assert reservations.reserve(other, 4)
    reservations.give_back(one)
    assert (one.pages, one.reserved_pages, reservations.available_pages) == ((), 2, 0)


def test_a_smaller_pool_forgets_idle_pages():
    reservations = make_reservations(10)
    reservations.release(with_content(reservations, 6, b"a"))
    kept = with_content(reservations, 3, b"b")
    reservations.resize(4)
    assert reservations.pages.capacity == 4
    assert reservations.pages.match(keys(3, b"b")) == 3
    reservations.check([kept])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r, s: r.budget.charge(PROMISED, PAGE_BYTES), "promised pages are not"),
        (lambda r, s: r.budget.charge(HELD, PAGE_BYTES), "pages held are not"),
        (lambda r, s: setattr(s, "pages", s.pages[1:]), "not the sequences'"),
        (lambda r, s: setattr(s, "reserved_pages", 1), "holds more than it was promised"),
        (lambda r, s: r.pages.allocate(1), "in use by no sequence"),
    ],
    ids=["promise", "holding", "lost page", "too many", "leak"],
)
def test_the_check_finds_what_does_not_add_up(spoil, words):
    reservations = make_reservations()
    some = with_content(reservations, 3)
    reservations.check([some])
    spoil(reservations, some)
    with pytest.raises(AssertionError, match=words):
        reservations.check([some])
