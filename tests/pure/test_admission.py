"""What a request's price is, and what is said to one that can never fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.engine.admission import FIRST_ANSWER_TOKENS, Refuse, computed_at_most, refuse, stretched
from memphi.engine.sequence import Sequence
from tests.pure.engine_simulation import text

sizes = st.integers(1, 2000)


def sequence(prompt_tokens, max_tokens, answered=0):
    case = text(0, max_tokens=max_tokens)
    footprint = case.footprint.__class__(case.footprint.mode, prompt_tokens, (), ())
    ids = [7] * (prompt_tokens + answered) if answered else []
    return Sequence(0, case.request, footprint, max_tokens, ids=ids)


def test_a_request_enters_with_its_prompt_and_a_first_stretch():
    assert stretched(sequence(100, 1000)) == 100 + FIRST_ANSWER_TOKENS


def test_a_short_answer_is_reserved_whole_but_for_its_last_token():
    """Nobody reads the keys and values of the last one."""
    assert [stretched(sequence(12, most)) for most in (1, 5, 6)] == [12, 16, 17]


def test_one_that_was_paused_enters_with_its_answer_so_far():
    assert stretched(sequence(100, 1000, answered=60)) == 160 + FIRST_ANSWER_TOKENS
    assert stretched(sequence(100, 70, answered=60)) == 169


@given(sizes, sizes, st.data())
def test_a_stretch_covers_what_is_known_and_no_more_than_there_will_ever_be(prompt, most, data):
    answered = data.draw(st.integers(0, most - 1))
    some = sequence(prompt, most, answered)
    assert prompt + answered == some.length <= stretched(some) <= computed_at_most(some) == prompt + most - 1
    assert stretched(some) - some.length <= FIRST_ANSWER_TOKENS


@given(sizes, st.none() | sizes, sizes)
def test_what_is_not_refused_fits_alone(prompt, most, tokens):
    if refuse(prompt, most, tokens) is None:
        assert stretched(sequence(prompt, most or tokens + 1 - prompt)) <= tokens


@pytest.mark.parametrize(
    ("prompt", "most", "fits"),
    [(100, 1, True), (101, 1, False), (100, None, True), (101, None, False), (60, 41, True), (60, 42, False)],
)
def test_a_request_is_refused_from_one_token_too_many(prompt, most, fits):
    assert (refuse(prompt, most, 100) is None) == fits


@given(sizes, st.none() | sizes, sizes)
def test_a_refusal_tells_what_would_fit(prompt, most, tokens):
    refused = refuse(prompt, most, tokens)
    if refused is None:
        assert prompt + (most or 1) - 1 <= tokens
        return
    assert (refused.needed_tokens, refused.available_tokens) == (prompt + (most or 1) - 1, tokens)
    assert refused.needed_tokens > tokens
    advised = re.search(r"--max-tokens (\d+)", refused.advice)
    assert (advised is None) == (prompt > tokens)
    if advised:
        # The advice works, and no longer answer would.
        assert refuse(prompt, int(advised[1]), tokens) is None
        assert refuse(prompt, int(advised[1]) + 1, tokens) is not None


def test_a_prompt_that_is_too_long_is_advised_to_be_shorter():
    assert refuse(101, 5, 100) == Refuse(
        105, 100, "shorten the text, send fewer or smaller attachments, or give more --memory"
    )
    assert refuse(60, 50, 100) == Refuse(109, 100, "ask for an answer of at most 41 tokens (--max-tokens 41)")
