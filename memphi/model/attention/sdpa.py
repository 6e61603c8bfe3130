"""Attention through torch's own kernels: scaled_dot_product_attention, and its variable-length form on CUDA.

Which kernel takes a case is said here and not left to torch: on an H100 it may prefer cuDNN, which makes
a kernel ready for every new length. Others report 0.4 s for that (torch 2.11, a B200; here it is not measured yet), and
a prompt's or an answer's length, or a number of crops, hardly comes twice.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memphi.model.attention.blocks import BLOCKS, attend_blocks
from memphi.model.kept import Kept
from memphi.model.kernels.launch import capability
from memphi.model.rows import ContinuedRows, GatheredRows, Packing, WholeRows, recurs

ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that take any length as it comes."""


class SdpaAttention:
    """Equal to EagerAttention; does not materialise the scores where torch has a kernel for the case."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens, keys = query.shape[1], key.shape[1]
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        # One query sees every key, and without a past the plain causal mask is right; both need no mask tensor.
        mask = None if tokens in (1, keys) else _lower_right(q, k)
        by_cudnn = tokens == keys and _takes_cudnn(query, (tokens,))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if by_cudnn else ANY_LENGTH):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=tokens == keys and tokens > 1, enable_gqa=True
            )
        return out.transpose(1, 2)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        return torch.cat(
            [self._whole(rows, *(part[rows.tokens] for part in (query, key, value))) for rows in packing.whole]
        )

    def paged(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Kept, values: Kept, packing: Packing, out: Tensor
    ) -> None:
        paging = packing.paging
        assert paging is not None
        for whole in packing.whole:
            out[whole.tokens] = self._whole(whole, *(part[whole.tokens] for part in (query, key, value)))
        # What is copied out of the pages lives inside a call, so that only one copy exists at a time.
        for rows in paging.continued:
            out[rows.tokens] = self._continued(query[rows.tokens], rows, keys, values)
        for group in paging.together:
            out.index_copy_(0, group.tokens, self._together(query[group.tokens], group, keys, values))

    def _whole(self, rows: WholeRows, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows without a past: query and result [tokens, heads, head_dim]."""
        if _has_flash(query) and not _takes_cudnn(query, rows.lengths):
            return varlen(query, key, value, (rows.bounds, rows.bounds), (rows.lengths, rows.lengths))
        return self._each(query, key, value, rows.lengths, rows.lengths)

    def _continued(self, query: Tensor, rows: ContinuedRows, keys: Kept, values: Kept) -> Tensor:
        """Rows' new tokens over all their tokens: query and result [tokens, heads, head_dim]."""
        key, value = (rows.gather(kept, query.dtype) for kept in (keys, values))
        if _takes_cudnn(query, rows.lengths):
            return attend_blocks(query, key, value, _attend_block)
        if _has_flash(query):
            return varlen(query, key, value, (rows.bounds, rows.key_bounds), (rows.lengths, rows.key_lengths))
        return self._each(query, key, value, rows.lengths, rows.key_lengths)

    def _each(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], key_lengths: Sequence[int]
    ) -> Tensor:
        """Rows one after the other."""
        sides = zip((query, key, value), (lengths, key_lengths, key_lengths), strict=True)
        rows = list(zip(*(part[None].split(list(sizes), dim=1) for part, sizes in sides), strict=True))
        return self.causal(*rows[0])[0] if len(rows) == 1 else torch.cat([self.causal(*row)[0] for row in rows])

    def _together(self, query: Tensor, rows: GatheredRows, keys: Kept, values: Kept) -> Tensor:
        """One new token of each row: query and result [rows, heads, head_dim].

        The heads that share a key stand as queries, because kernels that take a mask want as many heads as keys have.
        """
        gathered = (rows.gather(kept, query.dtype) for kept in (keys, values))
        k, v = (part.transpose(1, 2) for part in gathered)  # [rows, kv_heads, keys, head_dim]
        q = query.unflatten(1, (k.shape[1], -1))  # [rows, kv_heads, heads / kv_heads, head_dim]
        with sdpa_kernel(ANY_LENGTH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=rows.seen[:, None, None, :]).flatten(1, 2)

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(ANY_LENGTH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    lengths: tuple[Sequence[int], Sequence[int]],
) -> Tensor:
    """Rows end to end in one launch, of queries and of keys; each row's last query sees all its keys."""
    longest = [max(side) for side in lengths]
    if not query.requires_grad:
        # What `varlen_attn` comes to, which takes the host twice as long, in every layer.
        flash = torch.ops.aten._flash_attention_forward
        window = {"window_size_left": -1, "window_size_right": 0}
        return cast(Tensor, flash(query, key, value, *bounds, *longest, 0.0, False, False, **window)[0])
    from torch.nn.attention.varlen import varlen_attn  # Brings torch's compiler along: a second of every start.

    # Gradients of shared heads are untried.
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, *bounds, *longest, window_size=(-1, 0)))


def cudnn_block(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """What `attend_blocks` wants of some keys, by cuDNN."""
    q, k, v = (part[None].transpose(1, 2) for part in (query, key, value))
    out, weight, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)
    return out[0].transpose(0, 1), weight.view(query.shape[1], -1, 1).transpose(0, 1)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The same, but by flash where so many keys hardly come again."""
    if is_causal or len(key) in BLOCKS:
        return cudnn_block(query, key, value, is_causal)
    flash = torch.ops.aten._flash_attention_forward
    sides = query[None], key[None], value[None], None, None, len(query), len(key)
    out, weight, *_ = flash(*sides, 0.0, False, False)
    return out[0], weight[0, :, :, None].transpose(0, 1)


def _has_flash(query: Tensor) -> bool:
    """Whether torch's flash kernels take such queries: 16 bits, on an NVIDIA card since Ampere."""
    if query.device.type != "cuda" or query.dtype == torch.float32:
        return False
    return capability(query.device) >= (8, 0)


def _takes_cudnn(query: Tensor, lengths: Sequence[int]) -> bool:
    """Whether cuDNN's kernel takes rows of so many new tokens, of which there is one, over no past or blocks of it.

    Measured on an H100: 639 TFLOP/s at 13,704 tokens, flash 332; on an H200 over a past of 57,344: 526, flash 328.
    Elsewhere untried; its gradients have been NaN once.
    """
    if query.requires_grad or len(lengths) > 1 or not recurs(lengths[0]) or not _has_flash(query):
        return False
    return capability(query.device)[0] == 9


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask of a chunk over its past, where there are no flash kernels: `varlen` needs none."""
    past = key.shape[-2] - query.shape[-2]
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(past)
