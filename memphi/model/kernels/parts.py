"""What a product leaves in parts [parts, rows, out], each the sums of a part of its inputs, in fp32, or what adapters
add to it, in x's dtype: whoever reads them next sums them, or a pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, tl

BLOCK = 1024
"""Outputs whose parts a program sums."""


def room_for_parts(out: Tensor, parts: int) -> Tensor:
    """Where each part's sums go, [parts, rows, out] fp32; a lone one's are the product."""
    return out[None] if parts == 1 else out.new_empty((parts, *out.shape), dtype=torch.float32)


def sum_up(found: Tensor, out: Tensor) -> None:
    """Have out [rows, out] be the sum of what a product found in parts, if it is not what it found."""
    if len(found) > 1:
        sum_parts(found, out)


def plain_sum_parts(found: Tensor, out: Tensor) -> None:
    """out [rows, out] = the sum of found [parts, rows, out], one part after another; the definition."""
    out.copy_(found.sum(0))


def sum_parts(found: Tensor, out: Tensor) -> None:
    """As `plain_sum_parts`."""
    rows, n_out = out.shape
    _sum_parts[(rows, -(-n_out // BLOCK))](
        *(found, out, found.stride(0), out.stride(0), n_out),
        parts=len(found),
        block=BLOCK,
        num_warps=4,
        **launch_options(out.device),
    )


@jit
def _sum_parts(
    found: Tile,
    out: Tile,
    part_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    parts: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row, outs = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = outs < n_out
    if dependent:
        tl.extra.cuda.gdc_wait()
    total = load_parts(found + row * n_out + outs, inside, part_stride, parts, out.dtype.element_ty)
    tl.store(out + row * out_stride + outs, total, inside)


@jit
def load_parts(source: Tile, inside: Tile, part_stride: Tile, parts: constexpr, dtype: constexpr) -> Tile:
    """What stands there in parts, summed and rounded."""
    values = tl.load(source, inside, other=0)
    for part in tl.static_range(1, parts):
        values = values.to(tl.float32) + tl.load(source + part * part_stride, inside, other=0).to(tl.float32)
    return values.to(dtype)
