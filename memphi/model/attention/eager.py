"""Attention spelled out: scores, mask, fp32 softmax, sum (spec 3, 4.1, 5.2). The definition; needs the most memory."""

import torch
from torch import Tensor


class EagerAttention:
    """The definition of `Attention`."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, heads, _ = query.shape
        group = heads // key.shape[1]
        keys = key.repeat_interleave(group, dim=1).transpose(0, 1)  # [heads, past + tokens, head_dim]
        values = value.repeat_interleave(group, dim=1).transpose(0, 1)
        past = key.shape[0] - tokens
        seen = torch.ones(tokens, key.shape[0], dtype=torch.bool, device=query.device).tril(past)
        return self.full(query.transpose(0, 1)[None], keys[None], values[None], seen)[0].transpose(0, 1)

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
