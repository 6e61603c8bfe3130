"""The choice equals its definition, and what the sampler chooses for a greedy request."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memphi.model.kernels.choice import BLOCK, choose, pieces_of, plain_choose
from memphi.request import SamplingParams
from memphi.sampling.sampler import Draw, sample
from tests.kernels.samples import DTYPES, FEW, SEEDS, normal, strided

INF, NAN = float("inf"), float("nan")


def chosen_of(logits, forbidden, lengths=None):
    """What the kernel and the definition choose, with 7 before."""
    rows, pieces, device = len(logits), pieces_of(logits.shape[1]), logits.device
    lengths = torch.ones(rows, dtype=torch.int32, device=device) if lengths is None else lengths
    best, places = (
        torch.full((rows, pieces), -1, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)
    )
    found, expected = (torch.full((rows,), 7, device=device) for _ in range(2))
    choose(logits, forbidden, lengths, best, places, found)
    plain_choose(logits, forbidden, lengths, expected)
    return found.tolist(), expected.tolist()


def none_of(size, device):
    return torch.zeros(size, dtype=torch.bool, device=device)


@FEW
@given(rows=st.integers(1, 9), size=st.integers(1, 3 * BLOCK), dtype=DTYPES, seed=SEEDS)
@example(rows=2, size=200064, dtype=torch.bfloat16, seed=0)
@example(rows=3, size=BLOCK, dtype=torch.float32, seed=1)
def test_the_choice_equals_its_definition_and_the_sampler(device, rows, size, dtype, seed):
    """In 16 bits there are many equals, far apart."""
    logits = strided(normal(rows, size, dtype=dtype, device=device, seed=seed).clamp(max=2.0))
    forbidden = normal(size, dtype=torch.float32, device=device, seed=seed + 1) > 1.0
    found, expected = chosen_of(logits, forbidden)
    assert found == expected
    assert found == [choice.id for choice in sample(logits, [Draw(SamplingParams(), ())] * rows, forbidden)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({BLOCK + 3: 1.0, 5: 1.0, 9: 1.0}, 5),
        ({2 * BLOCK + 1: 1.0, BLOCK + 1: 1.0}, BLOCK + 1),
        ({9: INF, 4: 3.0}, 9),
        ({BLOCK + 1: NAN, 4: 3.0}, BLOCK + 1),
        ({8: NAN, 6: INF}, 6),
        ({3: -0.0}, 0),
    ],
)
def test_the_first_of_equals_and_numbers_that_are_none(device, scores, expected):
    logits = torch.zeros(1, 2 * BLOCK + 10, device=device)
    for place, score in scores.items():
        logits[0, place] = score
    assert chosen_of(logits, none_of(logits.shape[1], device)) == ([expected], [expected])


def test_nothing_forbidden_is_chosen(device):
    logits = torch.full((2, BLOCK + 10), -INF, device=device)
    logits[0, 4], logits[0, BLOCK + 2] = NAN, INF
    forbidden = ~none_of(BLOCK + 10, device)
    forbidden[BLOCK + 7] = False
    logits[:, BLOCK + 7] = -5.0
    assert chosen_of(logits, forbidden) == ([BLOCK + 7] * 2,) * 2
    assert chosen_of(logits[1:] - INF, forbidden) == ([0], [0])  # As torch does: there is nothing to choose from.


def test_rows_that_fill_up_a_step_keep_what_is_there(device):
    logits = normal(3, 50, dtype=torch.float32, device=device, seed=2)
    found, expected = chosen_of(logits, none_of(50, device), torch.tensor([4, 0, 1], dtype=torch.int32, device=device))
    assert found == expected
    assert found[1] == 7
