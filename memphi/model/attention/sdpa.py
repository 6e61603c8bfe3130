"""Attention through torch's scaled_dot_product_attention, which picks flash, memory-efficient or cuDNN kernels."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class SdpaAttention:
    """Equal to EagerAttention; does not materialise the scores where torch has a kernel for the case."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, heads, _ = query.shape
        group = heads // key.shape[1]
        q = query.transpose(0, 1)[None]
        k = key.transpose(0, 1).repeat_interleave(group, dim=0)[None]
        v = value.transpose(0, 1).repeat_interleave(group, dim=0)[None]
        if tokens == 1:
            out = F.scaled_dot_product_attention(q, k, v)
        elif tokens == key.shape[0]:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=_lower_right(q, k))
        return out[0].transpose(0, 1)

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask of a chunk over its past; torch's own mask type keeps the flash kernels on CUDA."""
    if query.device.type == "cuda":
        return causal_lower_right(query.shape[-2], key.shape[-2])
    past = key.shape[-2] - query.shape[-2]
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(past)
