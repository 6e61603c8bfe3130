"""A row's new tokens over its past, block by block: for kernels that have no mask for a chunk behind its past.

What a kernel gives for some of the keys, and the logarithm of what it divided that by, are enough to join it with what
it gives for the others (FlashAttention, Dao et al. 2022, section 3.1).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""Queries [tokens, heads, head_dim] over keys and values [keys, kv_heads, head_dim], causal or over all: what they find
[tokens, heads, head_dim], and the logarithm of the sum that it is divided by [tokens, heads, 1] in fp32."""

BLOCKS = (32768, 16384, 8192, 4096)
"""Tokens of a block of the past: few lengths, for each of which a kernel is made ready, and as long as may be."""


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, attend: Attend, sizes: tuple[int, ...] = BLOCKS) -> Tensor:
    """Attention of the last tokens of a row over all of it: query [tokens, heads, head_dim], key and value
    [past + tokens, kv_heads, head_dim]; returns [tokens, heads, head_dim] in fp32."""
    past = len(key) - len(query)
    joined, weight = attend(query, key[past:], value[past:], True)
    joined = joined.float()
    for first, last in past_blocks(past, sizes):
        weight = _join(joined, weight, *attend(query, key[first:last], value[first:last], False))
    return joined


def _join(joined: Tensor, weight: Tensor, found: Tensor, other: Tensor) -> Tensor:
    """Add to joined, which has a weight, what was found, with another; returns the weight of both."""
    both = torch.logaddexp(weight, other)
    joined.mul_((weight - both).exp_()).addcmul_(found, (other - both).exp_())
    return both


def past_blocks(past: int, sizes: tuple[int, ...] = BLOCKS) -> Iterator[tuple[int, int]]:
    """Where blocks of a past begin and end: the largest first, and last what is shorter than all sizes."""
    first = 0
    while first < past:
        last = first + next((size for size in sizes if size <= past - first), past - first)
        yield first, last
        first = last
