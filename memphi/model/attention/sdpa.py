"""Attention through torch's own kernels: scaled_dot_product_attention, and its variable-length form on CUDA."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from memphi.model.kept import Kept
from memphi.model.rows import GatheredRow, GatheredRows, Packing


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
        if not _has_flash(query):
            rows = zip(*(part[None].split(packing.lengths, dim=1) for part in (query, key, value)), strict=True)
            return torch.cat([self.causal(*row)[0] for row in rows])
        group, longest = query.shape[1] // key.shape[1], max(packing.lengths)
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        bounds = packing.bounds
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    def paged(self, query: Tensor, key: Tensor, value: Tensor, keys: Kept, values: Kept, packing: Packing) -> Tensor:
        paging = packing.paging
        assert paging is not None
        if len(paging.whole) == len(packing.rows):
            return self.packed(query, key, value, packing)
        out = torch.empty_like(query)
        for new in paging.whole:
            out[new] = self.causal(query[None, new], key[None, new], value[None, new])[0]
        # What is copied out of the pages lives inside a call, so that only one copy exists at a time.
        for row in paging.alone:
            out[row.tokens] = self._alone(query[row.tokens], row, keys, values)
        for rows in paging.together:
            out.index_copy_(0, rows.tokens, self._together(query[rows.tokens], rows, keys, values))
        return out

    def _alone(self, query: Tensor, row: GatheredRow, keys: Kept, values: Kept) -> Tensor:
        """A row's new tokens over all its tokens: query and result [tokens, heads, head_dim]."""
        key, value = (row.gather(kept, query.dtype) for kept in (keys, values))
        return self.causal(query[None], key[None], value[None])[0]

    def _together(self, query: Tensor, rows: GatheredRows, keys: Kept, values: Kept) -> Tensor:
        """One new token of each row: query and result [rows, heads, head_dim].

        The heads that share a key stand as queries, because kernels that take a mask want as many heads as keys have.
        """
        k, v = (
            rows.gather(kept, query.dtype).transpose(1, 2) for kept in (keys, values)
        )  # [rows, kv_heads, keys, head_dim]
        q = query.unflatten(1, (k.shape[1], -1))  # [rows, kv_heads, heads / kv_heads, head_dim]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows.seen[:, None, None, :]).flatten(1, 2)

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash kernels take such queries: 16 bits, on an NVIDIA card since Ampere."""
    if query.device.type != "cuda" or query.dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask of a chunk over its past; torch's own mask type keeps the flash kernels on CUDA."""
    if _has_flash(query):
        return causal_lower_right(query.shape[-2], key.shape[-2])
    past = key.shape[-2] - query.shape[-2]
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(past)
