"""ATen's products for a CPU against the definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memphi import load
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import EngineConfig
from memphi.errors import CheckpointError
from memphi.model.quant.host import HostInt4Weight, HostInt8Weight, use_host_products
from memphi.model.quant.swap import quantise, quantised_weights
from memphi.request import Request, SamplingParams

ROWS = st.sampled_from([1, 2, 3, 4, 5, 16, 33, 70])


def pair(n_in, n_out, scheme, seed):
    """The same weight as it is defined, and as a CPU multiplies it."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(n_in, n_out, bias=False, dtype=torch.bfloat16))
    second = nn.Sequential(nn.Linear(n_in, n_out, bias=False, dtype=torch.bfloat16))
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        quantise(model, scheme, scheme)
    use_host_products(second)
    return first[0].weight, second[0].weight


def assert_near(weight, host, x):
    exact = x.float() @ weight.dequantise(0, weight.out_features, torch.float32).t()
    errors = [float((product(x).float() - exact).norm() / exact.norm()) for product in (weight, host)]
    assert errors[1] <= errors[0] + 2e-4


@given(inputs=st.integers(1, 20), outputs=st.integers(1, 70), rows=ROWS, at=st.integers(0, 3), seed=st.integers(0, 9))
def test_int8(inputs, outputs, rows, at, seed):
    weight, host = pair(16 * inputs, outputs, "int8", seed)
    assert type(host) is HostInt8Weight
    assert_near(weight, host, torch.randn(rows, 16 * inputs + 7)[:, at : at + 16 * inputs].bfloat16())
    # As rows of a larger tensor that begin where no aligned read may.
    flat = torch.randn(rows * 16 * inputs + at).bfloat16()[at:].view(rows, 16 * inputs)
    assert_near(weight, host, flat)


@given(inputs=st.integers(1, 4), outputs=st.integers(1, 3), rows=ROWS, seed=st.integers(0, 9))
def test_int4(inputs, outputs, rows, seed):
    weight, host = pair(64 * inputs, 64 * outputs, "int4", seed)
    assert type(host) is HostInt4Weight
    assert sum(buffer.nbytes for buffer in host.buffers()) == sum(buffer.nbytes for buffer in weight.buffers())
    assert_near(weight, host, torch.randn(rows, 64 * inputs).bfloat16())
    meant = weight.dequantise(0, weight.out_features, torch.float32)
    assert (host.product(torch.eye(64 * inputs).bfloat16()).t() - meant).abs().max() <= 2**-7 * meant.abs().max()


@pytest.mark.parametrize(
    ("n_in", "n_out", "scheme"), [(72, 64, "int8"), (96, 64, "int4"), (64, 48, "int4"), (64, 64, "fp8")]
)
def test_other_sizes_and_schemes_keep_the_definition(n_in, n_out, scheme):
    weight, host = pair(n_in, n_out, scheme, 0)
    assert type(host) is type(weight)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_demo_model_answers_by_them(scheme, tmp_path):
    engine = load("demo", device="cpu", dtype="bf16", config=EngineConfig(scheme=scheme))
    kinds = {type(weight) for weight in quantised_weights(engine.model).values()}
    assert kinds == {HostInt8Weight} | ({HostInt4Weight} if scheme == "int4" else set())
    assert engine.generate(Request.ask("Reverse the word: lion", sampling=SamplingParams(max_tokens=8))).text == "noil"
    engine.close()
    if scheme == "int4":
        with pytest.raises(CheckpointError, match="in the order that a CPU computes with; load it anew to write it"):
            write_checkpoint(engine.model, tmp_path / "copy")
