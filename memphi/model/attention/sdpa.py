"""Attention through torch's own kernels: scaled_dot_product_attention, and its variable-length form on CUDA."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from memphi.model.rows import Packing


class SdpaAttention:
    """Equal to EagerAttention; does not materialise the scores where torch has a kernel for the case."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        tokens, keys = query.shape[1], key.shape[1]
        # One query sees every key, and without a past the plain causal mask is right; both need no mask tensor.
        mask = None if tokens in (1, keys) else _lower_right(q, k)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=tokens == keys and tokens > 1, enable_gqa=True
        )
        return out.transpose(1, 2)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        if query.device.type != "cuda" or query.dtype == torch.float32:
            rows = zip(*(part[None].split(packing.lengths, dim=1) for part in (query, key, value)), strict=True)
            return torch.cat([self.causal(*row)[0] for row in rows])
        group, longest = query.shape[1] // key.shape[1], max(packing.lengths)
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        bounds = packing.bounds
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask of a chunk over its past; torch's own mask type keeps the flash kernels on CUDA."""
    if query.device.type == "cuda":
        return causal_lower_right(query.shape[-2], key.shape[-2])
    past = key.shape[-2] - query.shape[-2]
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(past)
