"""Codes in 8 bits made and read in a kernel are those of the definition, to the bit."""

from __future__ import annotations

import pytest
import torch

from memphi.model.kept import dequantise, quantise
from memphi.model.kernels import codes
from memphi.model.kernels.launch import Tile, constexpr, jit, tl
from tests.kernels.samples import normal

GROUPS, WIDTH = 32, 64


@jit
def _there_and_back(
    x: Tile, made: Tile, scales: Tile, back: Tile, groups: constexpr, width: constexpr, limit: constexpr
):
    lines = tl.arange(0, groups)
    at = lines[:, None] * width + tl.arange(0, width)[None, :]
    found, factors = codes.encode(tl.load(x + at), limit)
    tl.store(made + at, found)
    words = codes.join(factors, factors)
    first, second = codes.split(words)
    tl.store(scales + lines, first)
    tl.store(back + at, codes.decode(found, second, back, limit))


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 50.0])
def test_codes_are_those_of_the_definition(device, code, dtype, size):
    x = (normal(GROUPS, WIDTH, dtype=torch.float32, device=device, seed=1) ** 3 * size).to(dtype)
    x[3], x[5, 1:] = 0, 0
    expected, expected_scales = quantise(x, code)
    made, scales = torch.empty_like(expected), torch.empty(GROUPS, device=device)
    back = torch.empty_like(x)
    limit = codes.code_limit(made)
    _there_and_back[(1,)](x, codes.as_bytes(made), scales, back, groups=GROUPS, width=WIDTH, limit=limit)
    assert torch.equal(scales, expected_scales.float())
    assert torch.equal(made.float(), expected.float())
    assert torch.equal(back, dequantise(expected, expected_scales, dtype))


def test_a_word_holds_a_keys_and_a_values_scale():
    scales = torch.randn(3, 4, 2, 2).to(torch.bfloat16)
    words = codes.as_words(scales)
    assert words.shape == (3, 4, 2)
    assert torch.equal((words << 16).view(torch.float32), scales[..., 0].float())
    assert torch.equal((words & -65536).view(torch.float32), scales[..., 1].float())
