"""What adapters make of x, against its definition: every row count, masks of every kind."""

import pytest
import torch

from memphi.model.kernels import narrow
from memphi.model.kernels.narrow import Narrow
from tests.kernels.test_skinny import assert_close, numbers

MASKS = {"all": None, "some": [True, False, False, True, True], "none": [False] * 5}


def make_parts(operand, matrix, ranks, scales, masks):
    """One part for each adapter that is in use: the first's t stands before x, the second's after it.

    A matrix of codes has scales of its own.
    """
    n_in = matrix.shape[1]
    places = [(0, slice(0, ranks[0])), (ranks[0], slice(ranks[0] + n_in, ranks[0] + n_in + ranks[1]))]
    steps = torch.linspace(0.002, 0.03, len(matrix), device=matrix.device).bfloat16()
    coded = matrix.dtype is torch.int8
    return [
        Narrow(matrix[at : at + rank], scale, mask, operand[:, columns], steps[at : at + rank] if coded else None)
        for (at, columns), rank, scale, mask in zip(places, ranks, scales, masks, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 19, 35, 130, narrow.MOST_ROWS + 70])
@pytest.mark.parametrize("first", ["all", "some", "none", None])
@pytest.mark.parametrize("second", ["all", "some", "none", None])
def test_what_adapters_make_of_x(device, rows, first, second, dtype):
    if first is second is None:
        pytest.skip("no adapter")
    ranks, n_in = (6, 9), 300
    matrix = numbers(sum(ranks), n_in, device=device, dtype=torch.float32)
    matrix = matrix.mul(40).clamp(-127, 127).to(dtype) if dtype is torch.int8 else matrix
    x = numbers(rows, n_in, device=device, dtype=torch.float32, seed=1)
    results = []
    for run in (narrow.narrow, narrow.plain_narrow):
        operand = torch.full((rows, n_in + sum(ranks)), torch.nan, device=device)
        operand[:, ranks[0] : ranks[0] + n_in] = x
        masks = [
            None if name is None or MASKS[name] is None else make_mask(name, rows, device) for name in (first, second)
        ]
        parts = make_parts(operand, matrix, ranks, (2.0, 1.5), masks)
        used = [part for part, name in zip(parts, (first, second), strict=True) if name]
        run(operand[:, ranks[0] : ranks[0] + n_in], used)
        results.append(operand)
    got, expected = results
    assert torch.equal(got.isnan(), expected.isnan()), "what is not in use is not written"
    assert_close(got.nan_to_num(), expected.nan_to_num())


def make_mask(name, rows, device):
    return torch.tensor((MASKS[name] * rows)[:rows], device=device)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_an_adapter_that_no_row_uses_is_not_read(device, rows):
    """It is NaN, and so would be what is made of it."""
    matrix = numbers(15, 64, device=device, dtype=torch.float32)
    matrix[:6] = torch.nan
    operand = torch.ones(rows, 79, device=device)
    unused = torch.zeros(rows, dtype=torch.bool, device=device)
    parts = make_parts(operand, matrix, (6, 9), (1.0, 1.0), (unused, None))
    narrow.narrow(operand[:, 6:70], parts)
    assert (operand[:, :6] == 0).all()
    assert operand.isfinite().all()
