"""Numbers for the kernels' tests, and how near a kernel has to come to its definition."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from memphi.model.kept import dequantise, quantise

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
CODES = st.sampled_from([None, torch.int8, torch.float8_e4m3fn])
SEEDS = st.integers(0, 2**16)
FEW = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def normal(*shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def strided(tensor, extra=8):
    """The same numbers with a gap after each row, as where a step's tensors lie side by side."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + extra), float("nan")).to(tensor)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def unwritten(*shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_near(actual, expected, steps, scale=0.0):
    """Every number within so many of its dtype's steps of what was expected, relative to it or to `scale`."""
    eps = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=steps * eps, atol=steps * eps * scale)


def assert_rounded_alike(actual, expected, steps):
    """Near everywhere and, in 16 bits, the same but for the few numbers that a rounding tipped the other way."""
    assert_near(actual, expected, steps=steps, scale=1e-3)
    if actual.dtype != torch.float32:
        assert (actual != expected).sum() <= 1 + actual.numel() // 32


def coded(pool, code):
    """A pool [pages, layers, 2, page_tokens, kv_heads, head_dim] in 8 bits: codes, and scales as a pool has them."""
    codes, scales = quantise(pool, code)
    return codes, scales.movedim(2, -1).contiguous()


def decoded(codes, scales, dtype):
    """The pool that codes and scales stand for."""
    return dequantise(codes, scales.movedim(-1, 2), dtype)


def assert_coded_alike(actual, expected, dtype):
    """The same codes and scales; of fp32, whose products may be fused with their sum, a few may tip over."""
    for made, wanted in zip(actual, expected, strict=True):
        made, wanted = made.float(), wanted.float()
        other = (made != wanted) & ~(made.isnan() & wanted.isnan())
        assert other.sum() <= (1 + made.numel() // 500 if dtype == torch.float32 else 0)


def assert_same_bytes(made, expected):
    assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(made.scale, expected.scale)


def assert_near_bytes(made, expected):
    """What rows in bytes stand for: where a number was rounded to its neighbour before, its byte may be another."""
    numbers = [
        (each.codes.float() if each.is_e4m3 else 256 * each.codes[0].float() + each.codes[1].float())
        * each.scale[:, None]
        for each in (made, expected)
    ]
    torch.testing.assert_close(*numbers, rtol=0.14 if made.is_e4m3 else 0.02, atol=2e-3)
