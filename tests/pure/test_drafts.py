"""What is proposed is what followed, it is found in an index that grows with the ids, and it stops where it does not
pay."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.engine import drafts
from memphi.engine.drafts import MOST_DRAFTS, NGRAMS, RETRY_TOKENS, TOKEN_COST, Drafts

texts = st.lists(st.integers(0, 3), max_size=60) | st.lists(st.integers(0, 200_000), max_size=60)


def followed(ids, most):
    """By plain search: the latest earlier occurrence of the last ids, three or else two."""
    for n in NGRAMS:
        for place in range(len(ids) - 1, n - 1, -1):
            if len(ids) >= n and ids[place - n : place] == ids[-n:]:
                known = list(ids)
                while len(known) < place + most:
                    known.append(known[place + len(known) - len(ids)])
                return tuple(known[place : place + most])
    return ()


def eager():
    """Drafts that always pay."""
    some = Drafts()
    some._worth = lambda length: MOST_DRAFTS
    return some


@given(texts, st.integers(-2, 20))
def test_what_is_proposed_is_what_followed(ids, most):
    wanted = followed(ids, min(most, MOST_DRAFTS)) if most > 0 else ()
    assert eager().propose(ids, most) == wanted


@given(texts, st.lists(st.integers(1, 9), max_size=20))
def test_an_index_that_grows_finds_what_a_new_one_does(ids, strides):
    growing, end = eager(), 0
    for stride in strides:
        end += stride
        assert growing.propose(ids[:end], 8) == eager().propose(ids[:end], 8)
        assert growing.propose(ids[:end], 8) == eager().propose(ids[:end], 8), "asking changes nothing"


@given(texts, st.sets(st.integers(0, 3), max_size=2))
def test_some_ids_are_never_proposed(ids, never):
    some = Drafts(frozenset(never))
    some._worth = lambda length: MOST_DRAFTS
    proposed = some.propose(ids, 12)
    assert not never & set(proposed)
    assert followed(ids, 12)[: len(proposed)] == proposed


def test_a_long_prompt_is_learnt_over_several_steps(monkeypatch):
    monkeypatch.setattr(drafts, "LEARNT_AT_ONCE", 100)
    ids = [*range(1, 500), 1, 2, 3]
    some = eager()
    calls = 1
    while not some.learn(ids):
        calls += 1
    assert calls == 5
    assert some.propose(ids, 4) == (4, 5, 6, 7)


def test_the_longer_match_counts_and_of_equal_ones_the_latest():
    some = eager()
    assert some.propose([7, 1, 2, 50, 8, 1, 2, 60, 9, 1, 2, 70, 8, 1, 2], 1) == (60,)
    assert eager().propose([1, 2, 50, 1, 2, 60, 5, 1, 2], 2) == (60, 5)


def test_a_period_goes_on():
    assert eager().propose([5, 1, 2, 3, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)
    assert eager().propose([4, 4, 4], 5) == (4,) * 5


REPEATING = [1, 2, 3] * 20


def proposed(some, length):
    """How many drafts are made at this length of a text that repeats itself."""
    return len(some.propose((REPEATING * (length // 60 + 1))[:length], 99))


def test_drafts_that_are_right_become_more():
    some, numbers, length = Drafts(), [], 20
    for _ in range(30):
        numbers.append(proposed(some, length))
        length += numbers[-1] + 1
        some.note(numbers[-1], numbers[-1], length)
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (3, MOST_DRAFTS)


def test_drafts_that_are_wrong_end_and_are_tried_again_from_time_to_time():
    some, tries = Drafts(), {}
    for length in range(20, 500):
        if number := proposed(some, length):
            tries[length] = number
            some.note(number, 0, length + 1)
    first, later = list(tries)[:8], list(tries)[-8:]
    assert first[0] == 20
    assert first[5] < 20 + 8 + RETRY_TOKENS
    assert [b - a for a, b in pairwise(later)] == [RETRY_TOKENS + 1] * 7
    assert set(list(tries.values())[-8:]) == {1}
    assert sum(tries.values()) < 0.05 * 480
    # What repeats itself from here on is found.
    length = 520
    while proposed(some, length) < 8:
        some.note(proposed(some, length), proposed(some, length), length := length + 1)
        assert length < 600


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_so_many_are_proposed_as_are_worth_their_cost(share):
    """With each right by this chance, in every step the last draft is kept about as often as it costs of a step."""
    some = Drafts()
    some._kept, some._tried = share * 100, 100.0
    number = proposed(some, 30)
    assert share**number >= TOKEN_COST
    assert number == MOST_DRAFTS or share ** (number + 1) < TOKEN_COST


def test_guessing_imports_no_torch():
    code = "import sys, memphi.engine.drafts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
