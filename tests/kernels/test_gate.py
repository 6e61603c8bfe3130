"""The gate equals its definition."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memphi.model.kernels.gate import gate, plain_gate
from memphi.model.kernels.rounding import make_bytes, room_in_e4m3, room_in_two_bytes
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
@given(rows=st.integers(1, 9), size=st.integers(1, 1500), dtype=DTYPES, seed=SEEDS)
@example(rows=1, size=8192, dtype=torch.bfloat16, seed=0)
def test_gate_equals_its_definition(device, rows, size, dtype, seed):
    gate_up = strided(20 * normal(rows, 2 * size, dtype=dtype, device=device, seed=seed))
    expected = torch.empty(rows, size, dtype=dtype, device=device)
    out = strided(unwritten(rows, size, dtype=dtype, device=device))
    plain_gate(gate_up, expected)
    gate(gate_up, out)
    assert_rounded_alike(out, expected, steps=16 if dtype == torch.float32 else 2)  # Another exponential.


@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gated_may_come_in_parts(device, dtype, in_bytes):
    """They are summed in fp32, one after another, and rounded once."""
    found = strided(normal(3 * 5, 2 * 700, dtype=torch.float32, device=device, seed=0)).unflatten(0, (3, 5))
    out, expected = (torch.empty(5, 700, dtype=dtype, device=device) for _ in range(2))
    made, plain = (room_in_e4m3(5, 700, out) if in_bytes else None for _ in range(2))
    plain_gate(found, expected, plain)
    gate(found, out, made)
    assert_rounded_alike(out, expected, steps=16 if dtype == torch.float32 else 2)
    if in_bytes:
        assert_near_bytes(made, plain)


@pytest.mark.parametrize("room", [room_in_e4m3, room_in_two_bytes])
@pytest.mark.parametrize("rows", [5, 64])
def test_what_gates_let_through_is_there_in_bytes_too(device, room, rows):
    gate_up = strided(normal(rows, 2 * 700, dtype=torch.bfloat16, device=device, seed=0))
    out = torch.empty(rows, 700, dtype=torch.bfloat16, device=device)
    made, expected, plain = (room(rows, 700, out) for _ in range(3))
    plain_gate(gate_up, torch.empty_like(out), plain)
    gate(gate_up, out, made)
    make_bytes(out, expected)
    assert_same_bytes(made, expected)
    assert_near_bytes(made, plain)


@pytest.mark.parametrize("room", [room_in_e4m3, room_in_two_bytes])
def test_what_gates_let_through_may_be_there_in_bytes_alone(device, room):
    gate_up = strided(normal(5, 2 * 700, dtype=torch.bfloat16, device=device, seed=0))
    before, out = gate_up.clone(), torch.empty(5, 700, dtype=torch.bfloat16, device=device)
    alone, both, plain = (room(5, 700, out) for _ in range(3))
    gate(gate_up, None, alone)
    gate(gate_up, out, both)
    plain_gate(gate_up, None, plain)
    assert_same_bytes(alone, both)
    assert_near_bytes(alone, plain)
    assert torch.equal(gate_up, before)


def test_extreme_gates_shut_or_open(device):
    gate_up = torch.tensor([[-1e4, 1e4, float("nan"), 3.0, 3.0, 3.0]], dtype=torch.float32, device=device)
    out = torch.empty(1, 3, device=device)
    gate(gate_up, out)
    assert out[0, :2].tolist() == [0.0, 3e4]
    assert out[0, 2].isnan()
