"""The residual sum and the norm after it equal their definition."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memphi.model.kernels.norm import add_norm, plain_add_norm
from memphi.model.kernels.rounding import make_bytes, room_in_e4m3, room_in_two_bytes
from memphi.model.language import RMSNorm
from tests.kernels.samples import (
    DTYPES,
    FEW,
    SEEDS,
    assert_near_bytes,
    assert_rounded_alike,
    assert_same_bytes,
    normal,
    strided,
    unwritten,
)


@FEW
@given(rows=st.integers(1, 9), size=st.integers(1, 700), dtype=DTYPES, adds=st.booleans(), seed=SEEDS)
@example(rows=2, size=3072, dtype=torch.bfloat16, adds=True, seed=0)
def test_add_norm_equals_its_definition(device, rows, size, dtype, adds, seed):
    x, delta = (strided(normal(rows, size, dtype=dtype, device=device, seed=seed + i)) for i in (0, 1))
    weight = normal(size, dtype=dtype, device=device, seed=seed + 2)
    x_plain, expected = x.clone(), torch.empty_like(x)
    out = strided(unwritten(rows, size, dtype=dtype, device=device))
    plain_add_norm(x_plain, delta if adds else None, weight, 1e-5, expected)
    add_norm(x, delta if adds else None, weight, 1e-5, out)
    assert torch.equal(x, x_plain)
    assert_rounded_alike(out, expected, steps=4 if dtype == torch.float32 else 2)  # Sums in another order.


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_may_come_in_parts(device, parts, dtype):
    """They are summed in fp32, one after another, and rounded once."""
    x, weight = (normal(*shape, dtype=dtype, device=device, seed=1) for shape in ((7, 300), (300,)))
    found = strided(normal(parts * 7, 300, dtype=torch.float32, device=device, seed=2)).unflatten(0, (parts, 7))
    x_plain, out, expected = x.clone(), torch.empty_like(x), torch.empty_like(x)
    plain_add_norm(x_plain, found, weight, 1e-5, expected)
    add_norm(x, found, weight, 1e-5, out)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close((x, out), (x_plain, expected), rtol=2 * tolerance, atol=tolerance)


@pytest.mark.parametrize("room", [room_in_e4m3, room_in_two_bytes])
@pytest.mark.parametrize("rows", [5, 64])
def test_what_is_normed_is_there_in_bytes_too(device, room, rows):
    x, delta = (strided(normal(rows, 700, dtype=torch.bfloat16, device=device, seed=i)) for i in (0, 1))
    weight = normal(700, dtype=torch.bfloat16, device=device, seed=2)
    out, (made, expected, plain) = torch.empty_like(x), (room(rows, 700, x) for _ in range(3))
    plain_add_norm(x.clone(), delta, weight, 1e-5, torch.empty_like(x), plain)
    add_norm(x, delta, weight, 1e-5, out, made)
    make_bytes(out, expected)
    assert_same_bytes(made, expected)
    assert_near_bytes(made, plain)


@pytest.mark.parametrize("room", [room_in_e4m3, room_in_two_bytes])
def test_what_is_normed_may_be_there_in_bytes_alone(device, room):
    x, delta = (normal(5, 700, dtype=torch.bfloat16, device=device, seed=i) for i in (0, 1))
    weight = normal(700, dtype=torch.bfloat16, device=device, seed=2)
    x_alone, x_plain, out = x.clone(), x.clone(), torch.empty_like(x)
    alone, both, plain = (room(5, 700, x) for _ in range(3))
    add_norm(x_alone, delta, weight, 1e-5, None, alone)
    add_norm(x, delta, weight, 1e-5, out, both)
    plain_add_norm(x_plain, delta, weight, 1e-5, None, plain)
    assert_same_bytes(alone, both)
    assert_near_bytes(alone, plain)
    assert torch.equal(x_alone, x)


def test_the_definition_is_the_models(device):
    norm = RMSNorm(72, 1e-5).to(device, torch.bfloat16)
    norm.weight.data = normal(72, dtype=torch.bfloat16, device=device, seed=0)
    x, delta = (normal(5, 72, dtype=torch.bfloat16, device=device, seed=i) for i in (1, 2))
    expected, out = norm(x + delta), torch.empty_like(x)
    plain_add_norm(x, delta, norm.weight.data, 1e-5, out)
    assert torch.equal(out, expected)
