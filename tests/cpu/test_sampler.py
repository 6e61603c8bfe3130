"""Choosing tokens: filters, penalties, draws keyed by seed and position."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.request import Request, SamplingParams, TokenLogprob
from memphi.sampling.sampler import Draw, _choose, sample, uniform
from tests.scenes import GREEDY, alone, mixed_requests

VOCABULARY = 50


def choice(logits, position=3, seed=0, forbidden=(), ids=None, prompt_tokens=0, allowed=None, **sampling):
    draw = Draw(SamplingParams(seed=seed, **sampling), ids or range(position), prompt_tokens, allowed)
    return sample(logits[None], [draw], flags(forbidden, logits.shape[-1]))[0]


def choose(logits, *arguments, **named):
    return choice(logits, *arguments, **named).id


def flags(ids, size=VOCABULARY):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(ids)] = True
    return mask


def packed(ids):
    """A grammar's mask that allows these ids alone."""
    bits = np.zeros(64, np.bool_)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.fixture
def logits():
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))


def test_greedy_takes_the_likeliest_allowed_token(logits):
    order = logits.argsort(descending=True).tolist()
    assert choose(logits) == order[0]
    assert choose(logits, forbidden=order[:2]) == order[2]


def test_draws_follow_the_softmax(logits):
    expected = (logits / 0.7).softmax(-1)
    drawn = torch.zeros(VOCABULARY)
    count = 4000
    for position in range(1, count + 1):
        drawn[choose(logits, position, temperature=0.7)] += 1
    deviation = (count * expected * (1 - expected)).sqrt() + 1
    assert ((drawn - count * expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 3}, 3),
        ({"top_p": 0.5}, None),
        ({"min_p": 0.5}, None),
        ({"top_k": 1}, 1),
    ],
)
def test_filters_leave_only_the_likeliest(logits, sampling, allowed):
    probabilities, order = logits.softmax(-1).sort(descending=True)
    if "top_p" in sampling:
        allowed = int((probabilities.cumsum(-1) < sampling["top_p"]).sum()) + 1
    if "min_p" in sampling:
        allowed = int((probabilities >= sampling["min_p"] * probabilities[0]).sum())
    drawn = {choose(logits, position, temperature=1.0, **sampling) for position in range(1, 500)}
    assert drawn == set(order[:allowed].tolist())


def test_a_draw_depends_on_seed_and_position_alone(logits):
    alone = choose(logits, 9, seed=5, temperature=1.0)
    others = torch.randn(3, VOCABULARY)
    params = SamplingParams(seed=5, temperature=1.0)
    draws = [Draw(SamplingParams(temperature=2.0), range(4)), Draw(params, range(9)), Draw(SamplingParams(), range(2))]
    together = sample(torch.stack((others[0], logits, others[1])), draws, torch.zeros(VOCABULARY, dtype=torch.bool))
    assert together[1].id == alone
    assert len({choose(logits, position, seed=5, temperature=3.0) for position in range(1, 40)}) > 5
    assert len({choose(logits, 9, seed=seed, temperature=3.0) for seed in range(40)}) > 5


def test_a_repetition_penalty_lowers_what_occurred(logits):
    best = int(logits.argmax())
    assert choose(logits, ids=[best], repetition_penalty=50.0) != best
    flat = torch.tensor([2.0, 1.9, -1.0])
    assert choose(flat, ids=[0], repetition_penalty=1.2) == 1
    assert choose(-flat, ids=[2], repetition_penalty=1.2) == 2


def test_presence_and_frequency_count_in_the_answer_alone():
    flat = torch.tensor([2.0, 1.5, 0.0])
    assert choose(flat, ids=[0, 0, 1], prompt_tokens=2, presence_penalty=2.0) == 0
    assert choose(flat, ids=[0, 0, 1], prompt_tokens=2, presence_penalty=1, frequency_penalty=1) == 0
    assert choose(flat, ids=[1, 0, 0], prompt_tokens=1, presence_penalty=0.6) == 1
    assert choose(flat, ids=[1, 0, 0], prompt_tokens=1, presence_penalty=0.4) == 0
    assert choose(flat, ids=[0, 1, 0], prompt_tokens=1, frequency_penalty=1.0) == 0
    assert choose(flat, ids=[1, 0, 0], prompt_tokens=1, frequency_penalty=0.3) == 1
    assert choose(flat, ids=[1, 0, 0], prompt_tokens=1, frequency_penalty=0.2) == 0
    assert choose(flat, ids=[1, 0], prompt_tokens=0, presence_penalty=-2.0, frequency_penalty=2.0) == 0
    assert choose(flat, ids=[1, 2, 2], prompt_tokens=1, frequency_penalty=-2.0) == 2


def test_a_bias_is_added_and_nothing_forbidden_comes_back(logits):
    order = logits.argsort(descending=True).tolist()
    assert choose(logits, logit_bias=((order[0], -100.0),)) == order[1]
    assert choose(logits, logit_bias=((order[0], -100),)) == order[1]
    assert choose(logits, logit_bias=((order[-1], 100.0), (order[5], 50.0))) == order[-1]
    assert choose(logits, forbidden=[order[-1]], logit_bias=((order[-1], 100.0),)) == order[0]
    assert choose(logits, allowed=packed(order[3:5]), logit_bias=((order[-1], 100.0),)) == order[3]
    drawn = {choose(logits, i, temperature=2.0, logit_bias=((order[0], -100.0),)) for i in range(1, 200)}
    assert order[0] not in drawn
    assert len(drawn) > 5


@pytest.mark.parametrize("allowed", [{0}, {31}, {32, 49}, {0, 1, 30, 33, 48}])
def test_only_what_a_grammar_allows_is_chosen(logits, allowed):
    best = max(allowed, key=lambda number: logits[number].item())
    assert choose(logits, allowed=packed(allowed)) == best
    assert choose(logits, allowed=packed(allowed), ids=[best, best], repetition_penalty=1.0001) in allowed
    assert {choose(logits, i, allowed=packed(allowed), temperature=50.0) for i in range(1, 200)} == allowed
    few = {choose(logits, i, allowed=packed(allowed), temperature=50.0, top_k=2) for i in range(1, 100)}
    assert few == set(sorted(allowed, key=lambda number: -logits[number].item())[:2])


def test_of_equals_the_first_is_the_likeliest():
    flat = torch.tensor([1.0, 3.0, 3.0, 3.0])
    told = choice(flat, top_logprobs=3)
    assert told.id == 1
    assert [number for number, _ in told.logprob.top] == [1, 2, 3]


def test_logprobs_are_those_of_the_raw_scores(logits):
    """Whatever the request does to them; ids without a token count for nothing."""
    order = logits.argsort(descending=True).tolist()
    forbidden, left = order[:1], order[1:]
    wanted = logits.masked_fill(flags(forbidden), -math.inf).log_softmax(-1)
    for sampling in (
        {},
        {"temperature": 5.0, "top_k": 4},
        {"logit_bias": ((left[9], 100.0),)},
        {"allowed": packed(left[20:30]), "repetition_penalty": 3.0, "presence_penalty": 1.0},
    ):
        told = choice(logits, forbidden=forbidden, top_logprobs=3, **sampling)
        assert told.logprob.id == told.id
        assert told.logprob.logprob == pytest.approx(wanted[told.id].item(), abs=1e-5)
        assert [number for number, _ in told.logprob.top] == left[:3]
        assert [value for _, value in told.logprob.top] == pytest.approx(wanted[left[:3]].tolist(), abs=1e-5)


def test_no_more_logprobs_are_told_than_asked_for_and_than_there_are(logits):
    assert choice(logits).logprob is None
    assert choice(logits, top_logprobs=0).logprob.top == ()
    few = torch.tensor([1.0, 0.0, 2.0])
    told = choice(few, forbidden=[2], top_logprobs=20)
    assert [number for number, _ in told.logprob.top] == [0, 1]
    assert told.logprob.logprob == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)


DRAWS = st.builds(
    lambda sampling, ids, prompt_tokens, allowed: Draw(sampling, ids, prompt_tokens, allowed and packed(allowed)),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.0, 0.7, 2.0]),
        top_p=st.sampled_from([1.0, 0.5]),
        top_k=st.none() | st.integers(1, 60),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        logit_bias=st.lists(st.tuples(st.integers(0, 49), st.floats(-5, 5)), max_size=3).map(tuple),
        top_logprobs=st.none() | st.integers(0, 5),
        seed=st.integers(0, 9),
    ),
    st.lists(st.integers(0, 49), min_size=1, max_size=9),
    st.integers(0, 9),
    st.none() | st.sets(st.integers(0, 44), min_size=1),
)


@given(st.lists(DRAWS, min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=80)
def test_a_row_is_chosen_as_it_would_be_alone(draws, seed, dtype):
    logits = torch.randn(len(draws), VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(dtype)
    forbidden = flags(range(45, 50))
    together = sample(logits, draws, forbidden)
    assert together == [sample(logits[i : i + 1], draws[i : i + 1], forbidden)[0] for i in range(len(draws))]
    for row, (made, draw) in enumerate(zip(together, draws, strict=True)):
        assert made.id < 45
        assert (made.logprob is None) is (draw.sampling.top_logprobs is None)
        if draw.is_plain:
            assert made.id == int(logits[row, :45].argmax())


def test_forbidden_ids_are_never_drawn(logits):
    forbidden = logits.argsort(descending=True)[:40].tolist()
    drawn = {choose(logits, i, forbidden=forbidden, temperature=50.0) for i in range(1, 300)}
    assert not drawn & set(forbidden)


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-45, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_temperature_next_to_nothing_leaves_the_likeliest(logits, temperature, scale):
    logits = scale * logits.round(decimals=1)
    best = set((logits == logits.max()).nonzero().flatten().tolist())
    assert {choose(logits, i, temperature=temperature, top_p=0.9) for i in range(1, 50)} <= best


def test_scores_that_are_no_numbers_end_nobody_else_s_step(logits):
    rows = torch.stack([torch.full_like(logits, torch.nan), logits])
    draws = [Draw(SamplingParams(temperature=temperature), range(3)) for temperature in (1.0, 0.0)]
    broken, whole = sample(rows, draws, flags(()))
    assert 0 <= broken.id < VOCABULARY
    assert whole.id == int(logits.argmax())


def test_a_choice_keeps_nothing_else_alive(logits):
    drawn = _choose(logits, Draw(SamplingParams(temperature=1.0), range(3)))
    assert drawn.untyped_storage().nbytes() == drawn.element_size()


def test_uniform_numbers_are_uniform():
    values = [uniform(seed, position) for seed in (0, 1, 2**63) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert math.isclose(sum(values) / len(values), 0.5, abs_tol=0.02)
    assert len(set(values)) == len(values)


# --- through the engine ----------------------------------------------------------------------------------------------


def test_an_answer_s_logprobs_come_with_its_ids_also_where_text_is_held_back(model, tokenizer, stage):
    """However pieces are cut: a stop string that never comes holds back what begins like it."""
    text = alone(model, tokenizer, mixed_requests()[:1])[0].text
    told = replace(GREEDY, top_logprobs=2, stop=(text[2:5] + "never", text[-3:]))
    for request in mixed_requests(told):
        playing = stage()
        number = playing.submit(request)
        playing.run()
        result, deltas = playing.result(number), playing.deltas[number]
        assert [entry.id for entry in result.logprobs] == list(result.ids)
        for delta in deltas:
            assert tuple(entry.id for entry in delta.logprobs) == delta.ids
        assert tuple(entry for delta in deltas for entry in delta.logprobs) == result.logprobs
        for entry in result.logprobs:
            assert entry.top[0] == (entry.id, entry.logprob)
            assert entry.top[1][1] <= entry.logprob < 0


def test_logprobs_do_not_depend_on_company_or_pauses(model, tokenizer, stage):
    requests = mixed_requests(replace(GREEDY, top_logprobs=1))
    wanted = alone(model, tokenizer, requests)
    playing = stage(step_tokens=64)
    numbers = [playing.submit(request) for request in [*requests, *mixed_requests()]]
    while playing.loop.has_work:
        playing.step()
        if playing.steps in (9, 14, 20) and playing.scheduler.active:
            playing.scheduler.pause(playing.scheduler.active[0])
    assert playing.loop.stats.pauses == 3
    for number, alike in zip(numbers, wanted, strict=False):
        result = playing.result(number)
        assert result.ids == alike.ids
        assert [entry.logprob for entry in result.logprobs] == pytest.approx(
            [entry.logprob for entry in alike.logprobs], abs=1e-4
        )
    assert all(playing.result(number).logprobs == () for number in numbers[len(wanted) :])
    assert all(isinstance(entry, TokenLogprob) for entry in wanted[0].logprobs)


def test_the_engine_counts_the_answer_and_not_the_prompt(stage):
    """Two ids are all but forced, and take turns; the one that fills the prompt would never come if that counted."""
    forced = replace(GREEDY, logit_bias=((97, 100.0), (98, 100.0)), frequency_penalty=2.0)
    (answer,) = stage().ids([Request.ask("a" * 100, sampling=forced)])
    assert set(answer) == {97, 98}
