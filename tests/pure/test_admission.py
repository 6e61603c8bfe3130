"""What a request's price is, and what is said to one that can never fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.engine.admission import (
    STRETCH_TOKENS,
    Admit,
    Refuse,
    Room,
    Wait,
    admit,
    computed_at_most,
    refuse,
    stretched,
)
from memphi.engine.sequence import Sequence
from tests.pure.engine_simulation import make_config, text

sizes = st.integers(1, 2000)


def sequence(prompt_tokens, max_tokens, answered=0):
    case = text(0, max_tokens=max_tokens)
    footprint = case.footprint.__class__(case.footprint.mode, prompt_tokens, (), ())
    ids = [7] * (prompt_tokens + answered) if answered else []
    return Sequence(0, case.request, footprint, make_config().language, max_tokens, ids=ids)


def test_a_request_enters_with_its_prompt_and_a_first_stretch():
    assert admit(sequence(100, 1000), Room(50, 50, 16)) == Admit(-(-(100 + STRETCH_TOKENS) // 16))


def test_a_short_answer_is_reserved_whole_but_for_its_last_token():
    """Nobody reads the keys and values of the last one."""
    assert admit(sequence(12, 5), Room(50, 50, 16)) == Admit(1)
    assert admit(sequence(12, 6), Room(50, 50, 16)) == Admit(2)


def test_one_that_was_paused_enters_with_its_answer_so_far():
    assert admit(sequence(100, 1000, answered=60), Room(50, 50, 16)) == Admit(-(-(160 + STRETCH_TOKENS) // 16))
    assert admit(sequence(100, 70, answered=60), Room(50, 50, 16)) == Admit(-(-169 // 16))


@pytest.mark.parametrize(("available", "answer"), [(0, Wait()), (6, Wait()), (7, Admit(7)), (50, Admit(7))])
def test_what_others_claim_is_waited_for(available, answer):
    assert admit(sequence(100, 10), Room(50, available, 16)) == answer


@given(sizes, sizes, st.data())
def test_a_stretch_covers_what_is_known_and_no_more_than_there_will_ever_be(prompt, most, data):
    answered = data.draw(st.integers(0, most - 1))
    some = sequence(prompt, most, answered)
    assert prompt + answered == some.length <= stretched(some) <= computed_at_most(some) == prompt + most - 1
    assert stretched(some) - some.length <= STRETCH_TOKENS


@given(sizes, st.none() | sizes, sizes)
def test_what_is_not_refused_fits_alone(prompt, most, pages):
    room = Room(pages, pages, 16)
    if refuse(prompt, most, room.tokens) is None:
        assert isinstance(admit(sequence(prompt, most or room.tokens + 1 - prompt), room), Admit)


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
