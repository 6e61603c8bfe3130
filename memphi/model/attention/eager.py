"""Attention spelled out: scores, mask, fp32 softmax, sum (spec 3, 4.1, 5.2). The definition; needs the most memory."""

import torch
from torch import Tensor

from memphi.model.kept import Kept
from memphi.model.rows import Packing


class EagerAttention:
    """The definition of `Attention`."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, keys = query.shape[1], key.shape[1]
        group = query.shape[2] // key.shape[2]
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
        key, value = (part.repeat_interleave(group, dim=2).transpose(1, 2) for part in (key, value))
        return self.full(query.transpose(1, 2), key, value, seen).transpose(1, 2)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        rows = zip(*(part[None].split(packing.lengths, dim=1) for part in (query, key, value)), strict=True)
        return torch.cat([self.causal(*row)[0] for row in rows])

    def paged(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Kept, values: Kept, packing: Packing, out: Tensor
    ) -> None:
        outputs = []
        for row, q in zip(packing.rows, query.split(packing.lengths), strict=True):
            end = row.past + row.tokens
            pages = torch.tensor(row.pages[: -(-end // keys.numbers.shape[1])], device=q.device)
            k, v = (kept.read(pages, q.dtype).flatten(0, 1)[:end] for kept in (keys, values))
            outputs.append(self.causal(q[None], k[None], v[None])[0])
        out.copy_(torch.cat(outputs))

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
