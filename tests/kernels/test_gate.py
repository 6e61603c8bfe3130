"""The gate equals its definition."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memphi.model.kernels.gate import gate, plain_gate
from tests.kernels.samples import DTYPES, FEW, SEEDS, assert_rounded_alike, normal, strided, unwritten


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


def test_extreme_gates_shut_or_open(device):
    gate_up = torch.tensor([[-1e4, 1e4, float("nan"), 3.0, 3.0, 3.0]], dtype=torch.float32, device=device)
    out = torch.empty(1, 3, device=device)
    gate(gate_up, out)
    assert out[0, :2].tolist() == [0.0, 3e4]
    assert out[0, 2].isnan()
