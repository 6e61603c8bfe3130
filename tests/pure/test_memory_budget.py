"""The ledger: nothing is granted twice, nothing gets lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memphi.memory.budget import Budget

ACCOUNTS = st.sampled_from(["pages", "media", "weights"])


def test_what_fits_is_granted_and_what_does_not_changes_nothing():
    budget = Budget(100)
    assert budget.charge("weights", 60)
    assert not budget.charge("pages", 41)
    assert budget.charge("pages", 40)
    assert (budget.held_bytes, budget.available_bytes) == (100, 0)
    assert budget.accounts() == {"weights": 60, "pages": 40}


def test_an_account_never_gives_back_more_than_it_holds():
    budget = Budget(100)
    budget.charge("pages", 10)
    for wrong in (lambda: budget.release("pages", 11), lambda: budget.release("media", 1)):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(AssertionError):
        budget.move("media", "pages", 1)
    assert budget.accounts() == {"pages": 10}
    budget.check()


def test_after_shrinking_nothing_is_granted_until_enough_is_back():
    budget = Budget(100)
    budget.charge("pages", 80)
    budget.resize(50)
    assert budget.available_bytes == -30
    assert not budget.charge("pages", 1)
    assert budget.charge("pages", 0)
    budget.release("pages", 40)
    assert budget.charge("media", 10)
    assert not budget.charge("media", 1)


@given(st.integers(0, 1000), st.lists(st.integers(0, 300), max_size=20))
def test_never_more_than_the_total_is_held(total, sizes):
    budget = Budget(total)
    granted = [size for size in sizes if budget.charge("pages", size)]
    assert budget.held_bytes == sum(granted) <= total


class Ledger(RuleBasedStateMachine):
    """Any order of calls, compared with a plain dictionary."""

    def __init__(self):
        super().__init__()
        self.budget, self.total, self.model = Budget(1000), 1000, {}

    @rule(account=ACCOUNTS, size=st.integers(0, 700))
    def charge(self, account, size):
        fits = sum(self.model.values()) + size <= self.total or size == 0
        assert self.budget.charge(account, size) == fits
        if fits:
            self.model[account] = self.model.get(account, 0) + size

    @rule(account=ACCOUNTS, share=st.floats(0, 1))
    def release(self, account, share):
        size = int(self.model.get(account, 0) * share)
        self.budget.release(account, size)
        self.model[account] = self.model.get(account, 0) - size

    @rule(source=ACCOUNTS, to=ACCOUNTS, share=st.floats(0, 1))
    def move(self, source, to, share):
        size = int(self.model.get(source, 0) * share)
        held = self.budget.held_bytes
        self.budget.move(source, to, size)
        self.model[source] = self.model.get(source, 0) - size
        self.model[to] = self.model.get(to, 0) + size
        assert self.budget.held_bytes == held

    @rule(total=st.integers(0, 2000))
    def resize(self, total):
        self.budget.resize(total)
        self.total = total

    @invariant()
    def sums_are_right(self):
        self.budget.check()
        assert self.budget.accounts() == {name: size for name, size in self.model.items() if size}
        assert (
            self.budget.available_bytes
            == self.total - sum(self.model.values())
            == (self.budget.total_bytes - self.budget.held_bytes)
        )


TestLedger = Ledger.TestCase
