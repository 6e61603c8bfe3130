"""Attention over a past, block by block, is attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memphi.model.attention import EagerAttention
from memphi.model.attention.blocks import BLOCKS, attend_blocks, past_blocks


def attend(query, key, value, is_causal):
    """Spelled out, with what the softmax divides by."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    weight = scores.logsumexp(-1, keepdim=True).transpose(0, 1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), weight.float()


@pytest.mark.parametrize(("tokens", "past"), [(5, 0), (6, 4), (3, 23), (1, 16), (7, 21)])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_blocks_joined_are_the_whole(tokens, past, scale):
    """Also where one block outweighs all others."""
    torch.manual_seed(past)
    query = torch.randn(tokens, 4, 8) * scale
    key, value = (torch.randn(past + tokens, 2, 8) for _ in range(2))
    found = attend_blocks(query, key, value, attend, (8, 4))
    expected = EagerAttention().causal(query[None], key[None], value[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 200_000))
def test_blocks_are_few_and_leave_nothing_out(past):
    blocks = list(past_blocks(past))
    assert [place for block in blocks for place in range(*block)] == list(range(past))
    sizes = [last - first for first, last in blocks]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size in BLOCKS for size in sizes[:-1])
    assert not sizes or sizes[-1] in BLOCKS or sizes[-1] < BLOCKS[-1]
    assert len(sizes) <= past // BLOCKS[0] + len(BLOCKS)
