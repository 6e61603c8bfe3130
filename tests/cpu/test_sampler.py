"""Choosing tokens: filters, penalties, draws keyed by seed and position."""

import math

import pytest
import torch

from memphi.request import SamplingParams
from memphi.sampling.sampler import Draw, _choose, sample, uniform

VOCABULARY = 50


def choose(logits, position=3, seed=0, forbidden=(), ids=None, **sampling):
    mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mask[list(forbidden)] = True
    return sample(logits[None], [Draw(SamplingParams(seed=seed, **sampling), ids or range(position))], mask)[0]


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
    assert together[1] == alone
    assert len({choose(logits, position, seed=5, temperature=3.0) for position in range(1, 40)}) > 5
    assert len({choose(logits, 9, seed=seed, temperature=3.0) for seed in range(40)}) > 5


def test_a_repetition_penalty_lowers_what_occurred(logits):
    best = int(logits.argmax())
    assert choose(logits, ids=[best], repetition_penalty=50.0) != best
    flat = torch.tensor([2.0, 1.9, -1.0])
    assert choose(flat, ids=[0], repetition_penalty=1.2) == 1
    assert choose(-flat, ids=[2], repetition_penalty=1.2) == 2


def test_forbidden_ids_are_never_drawn(logits):
    forbidden = logits.argsort(descending=True)[:40].tolist()
    drawn = {choose(logits, i, forbidden=forbidden, temperature=50.0) for i in range(1, 300)}
    assert not drawn & set(forbidden)


def test_a_choice_keeps_nothing_else_alive(logits):
    drawn = _choose(logits, Draw(SamplingParams(temperature=1.0), range(3)))
    assert drawn.untyped_storage().nbytes() == drawn.element_size()


def test_uniform_numbers_are_uniform():
    values = [uniform(seed, position) for seed in (0, 1, 2**63) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert math.isclose(sum(values) / len(values), 0.5, abs_tol=0.02)
    assert len(set(values)) == len(values)
