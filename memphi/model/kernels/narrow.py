"""What adapters' A make of rows, t = scale * A x: of one adapter or of two in one launch, for the rows that use each.

Rows lie side by side in x, each contiguous. Sums are fp32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.model.kernels.coded import fetch_lines, fetches_of, load_rows
from memphi.model.kernels.dequantise import plain_dequantise
from memphi.model.kernels.launch import (
    ROOMY_CAPABILITY,
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    is_available,
    jit,
    jit_for_any,
    launch_options,
    power_of_two,
    tl,
)
from memphi.model.kernels.skinny import VECTOR_ROWS, sum_vectors

MOST_ROWS = 512
"""Beyond, torch's own products take less, where it is known on the host which rows use which adapter."""
MOST_VECTOR_ROWS, FEW_ROWS = 32, 16
"""Up to so many rows products are summed number by number; where there are tensor cores, which take less for more. An A
in 16 bits is then read once for every VECTOR_ROWS."""
AHEAD = 8
"""Blocks of A that a program asks for before one row is there."""
BLOCK = (2, 1024, 4)
"""Outputs, inputs and warps of a program: few outputs, so that there are many."""
TILE, TILE_OF_CODES = (16, 16, 128, 3, 8), (16, 8, 128, 3, 8)
"""Rows, outputs, inputs of 2 bytes, stages and warps of a program on tensor cores, each of whose warps has inputs
of its own: the best that were measured on an H200 at 64 rows."""
SMALL_TILE, MANY_TILE_OF_CODES = (16, 16, 128, 2, 4), (32, 16, 64, 3, 4)
"""The same from MANY_ROWS on, at 256 rows; the former also where a program has less room."""
ROOMY_TILE, LARGE_TILE, WIDE_LARGE_TILE = (128, 128, 64, 4, 8), (128, 64, 64, 3, 4), (64, 32, 64, 2, 4)
"""The same beyond MOST_ROWS, where all warps have the same inputs; where a program has less room; and of numbers of 32
bits."""
MANY_ROWS = 129


@dataclass(frozen=True)
class Narrow:
    """An adapter's A in a step: what it makes of x, for which rows, and where that goes."""

    a: Tensor  # [rank, in]
    scale: float
    uses: Tensor | None
    """[rows] bool: the rows that use the adapter; None: all."""
    t: Tensor  # [rows, rank]
    a_scale: Tensor | None = None
    """[rank], where A is codes in int8: a = code * scale."""

    def wide_a(self) -> Tensor:
        """A in t's dtype: [rank, in]."""
        if self.a_scale is None:
            return self.a
        wide = torch.empty(self.a.shape, dtype=self.t.dtype, device=self.a.device)
        plain_dequantise(self.a, self.a_scale, wide)
        return wide


@functools.cache
def most_rows(device: torch.device, of_two: bool = False) -> int:
    """The most rows that `narrow` is for, of one adapter or of two; 0 where there are no kernels."""
    if not is_available(device):
        return 0
    if capability(device) < TENSOR_CAPABILITY:
        return MOST_VECTOR_ROWS
    return sys.maxsize if of_two else MOST_ROWS


def plain_narrow(x: Tensor, parts: Sequence[Narrow]) -> None:
    """t = scale * A x of every part, scaled before it is rounded, and zeros for rows without it; the definition.

    x [rows, in].
    """
    for part in parts:
        torch.addmm(part.t, x, part.wide_a().t(), beta=0, alpha=part.scale, out=part.t)
        if part.uses is not None:
            part.t.masked_fill_(~part.uses[:, None], 0)


def narrow(x: Tensor, parts: Sequence[Narrow]) -> None:
    """As `plain_narrow`, of one part or of two whose As, and their scales, follow each other in memory. What codes
    stand for is not rounded.

    An A is not read for a program's rows where none of them uses it, so rows are best sorted by their adapters. Masks
    are read without waiting for what was launched before, which must not have written them.
    """
    first, last, (rows, n_in) = parts[0], parts[-1], x.shape
    is_coded = first.a_scale is not None
    border, n_out = len(first.a), sum(len(part.a) for part in parts)
    gap = last.t.storage_offset() - first.t.storage_offset() - border if last is not first else 0
    assert last is first or last.a.data_ptr() == first.a.data_ptr() + first.a.nbytes, "As must follow each other"
    arguments = (
        *(x, first.a, x if first.a_scale is None else first.a_scale, first.t),
        *(x if first.uses is None else first.uses, x if last.uses is None else last.uses),
        *(x.stride(0), first.a.stride(0), first.t.stride(0), rows, n_out, border, gap, first.scale, last.scale),
    )
    options = {
        "n_in": n_in,
        "first_masked": first.uses is not None,
        "last_masked": last.uses is not None,
        "is_coded": is_coded,
        **launch_options(x.device),
    }
    if rows > vector_rows(is_coded, x.device):
        tile = choose_tile(rows, x.itemsize, is_coded, capability(x.device))
        block_rows, block_out, block_in, stages, warps = tile
        _narrow_tiles[(-(-n_out // block_out), -(-rows // block_rows))](
            *arguments,
            block_rows=block_rows,
            block_out=block_out,
            block_in=block_in,
            splits=1 if rows > MOST_ROWS else warps,
            fetches=fetches_of(n_in),
            num_stages=stages,
            num_warps=warps,
            **options,
        )
        return
    at_once = min(rows, VECTOR_ROWS)
    block_out, block_in, warps = BLOCK
    block_in = min(block_in, power_of_two(n_in))
    _narrow[(-(-n_out // block_out), -(-rows // at_once))](
        *arguments,
        rows=at_once,
        block_out=block_out,
        block_in=block_in,
        ahead=min(-(-n_in // block_in), AHEAD) if rows == 1 else 1,
        num_warps=warps,
        **options,
    )


def vector_rows(is_coded: bool, device: torch.device) -> int:
    """The most rows whose products are summed number by number."""
    if capability(device) < TENSOR_CAPABILITY:
        return MOST_VECTOR_ROWS
    return VECTOR_ROWS if is_coded else FEW_ROWS


def choose_tile(rows: int, itemsize: int, is_coded: bool, on: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """Rows, outputs, inputs, stages and warps of a program on tensor cores.

    Of wider numbers, which have no tensor cores, a thread has room for fewer.
    """
    tile = TILE_OF_CODES if is_coded else TILE
    if rows > MOST_ROWS and itemsize <= 2:
        tile = ROOMY_TILE if on in ROOMY_CAPABILITY else LARGE_TILE
    elif rows > MOST_ROWS:
        tile = WIDE_LARGE_TILE
    elif itemsize > 2 or on not in ROOMY_CAPABILITY:
        tile = SMALL_TILE
    elif rows >= MANY_ROWS:
        tile = MANY_TILE_OF_CODES if is_coded else SMALL_TILE
    block_rows, block_out, block_in, stages, warps = tile
    return block_rows, block_out, block_in // (4 if itemsize > 2 else 1), stages, warps


@jit
def _narrow(
    x: Tile,
    a: Tile,
    a_scale: Tile,
    t: Tile,
    first_uses: Tile,
    last_uses: Tile,
    x_stride: Tile,
    a_stride: Tile,
    t_stride: Tile,
    n_rows: Tile,
    n_out: Tile,
    border: Tile,
    gap: Tile,
    first_scale: Tile,
    last_scale: Tile,
    n_in: constexpr,
    rows: constexpr,
    first_masked: constexpr,
    last_masked: constexpr,
    is_coded: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    ahead: constexpr,
    dependent: constexpr,
) -> None:
    """A product with codes, which comes next, reads x without waiting for this, and starts when x is there."""
    if dependent and not is_coded:
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside, is_first = outs < n_out, outs < border
    # Rows beyond the last repeat it, and are not stored.
    row, end = tl.program_id(1) * rows, n_rows - 1
    row0, row1, row2, row3 = row, tl.minimum(row + 1, end), tl.minimum(row + 2, end), tl.minimum(row + 3, end)
    uses = (
        _load_uses(first_uses, last_uses, row0, is_first, first_masked, last_masked),
        _load_uses(first_uses, last_uses, row1, is_first, first_masked, last_masked),
        _load_uses(first_uses, last_uses, row2, is_first, first_masked, last_masked),
        _load_uses(first_uses, last_uses, row3, is_first, first_masked, last_masked),
    )
    zeros = tl.zeros([block_out], tl.float32)
    sums = (zeros, zeros, zeros, zeros)
    if tl.max(uses[0] | uses[1] | uses[2] | uses[3], 0) > 0:
        sums = sum_vectors(
            *(x + row0 * x_stride, x + row1 * x_stride, x + row2 * x_stride, x + row3 * x_stride),
            *(a + outs * a_stride, inside),
            *(n_in, rows, block_out, block_in, ahead, dependent, is_coded),
        )
    elif dependent:
        tl.extra.cuda.gdc_wait()
    scale = tl.where(is_first, first_scale, last_scale)
    if is_coded:
        scale *= tl.load(a_scale + outs, inside, other=0).to(tl.float32)
    to = t + tl.where(is_first, outs, outs + gap)
    for number in tl.static_range(rows):
        values = tl.where(uses[number] > 0, sums[number] * scale, 0).to(t.dtype.element_ty)
        tl.store(to + (row + number) * t_stride, values, inside & (row + number < n_rows))


@jit_for_any("n_rows")
def _narrow_tiles(
    x: Tile,
    a: Tile,
    a_scale: Tile,
    t: Tile,
    first_uses: Tile,
    last_uses: Tile,
    x_stride: Tile,
    a_stride: Tile,
    t_stride: Tile,
    n_rows: Tile,
    n_out: Tile,
    border: Tile,
    gap: Tile,
    first_scale: Tile,
    last_scale: Tile,
    n_in: constexpr,
    first_masked: constexpr,
    last_masked: constexpr,
    is_coded: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    splits: constexpr,
    fetches: constexpr,
    dependent: constexpr,
) -> None:
    """Where rows are few, each warp multiplies inputs of its own: there are few programs, and a matrix is long.

    What comes next starts as in `_narrow`.
    """
    if dependent and not is_coded:
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    rows = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    inside, exists, is_first = outs < n_out, rows < n_rows, outs < border
    ones = exists.to(tl.int32)
    first = tl.load(first_uses + rows, exists, other=0).to(tl.int32) if first_masked else ones
    last = tl.load(last_uses + rows, exists, other=0).to(tl.int32) if last_masked else ones
    uses = tl.where(is_first[None, :], first[:, None], last[:, None]) > 0  # [block_rows, block_out]
    if dependent and is_coded and splits > 1:
        fetch_lines(a, a_stride, outs, n_out, n_in, fetches)
    if dependent:
        tl.extra.cuda.gdc_wait()
        if is_coded:
            tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([block_rows, block_out], tl.float32)
    if tl.max(tl.max(uses.to(tl.int32), 1), 0) > 0:
        total = _sum_tile(x, a, x_stride, a_stride, rows, outs, exists, inside, n_in, splits, block_in)
    scale = tl.where(is_first, first_scale, last_scale)
    if is_coded:
        scale *= tl.load(a_scale + outs, inside, other=0).to(tl.float32)
    to = t + rows[:, None] * t_stride + tl.where(is_first, outs, outs + gap)[None, :]
    made = tl.where(uses, total * scale[None, :], 0).to(t.dtype.element_ty)
    tl.store(to, made, exists[:, None] & inside[None, :])


@jit
def _sum_tile(
    x: Tile,
    a: Tile,
    x_stride: Tile,
    a_stride: Tile,
    rows: Tile,
    outs: Tile,
    exists: Tile,
    inside: Tile,
    n_in: constexpr,
    splits: constexpr,
    block_in: constexpr,
) -> Tile:
    """The products of rows with outputs [rows, outs], in fp32; so many warps each with inputs of its own, and then
    summed."""
    if splits == 1:
        total = tl.zeros([rows.shape[0], outs.shape[0]], tl.float32)
        for start in range(0, n_in, block_in):
            places = start + tl.arange(0, block_in)
            values = load_rows(x, x_stride, rows, exists, places, places < n_in, "")
            weights = load_rows(a, a_stride, outs, inside, places, places < n_in, "").to(values.dtype)
            total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    else:
        parts = tl.zeros([splits, rows.shape[0], outs.shape[0]], tl.float32)
        columns = tl.arange(0, splits)[:, None, None] * block_in + tl.arange(0, block_in)[None, None, :]
        lines, asked = a + outs[None, :, None] * a_stride, x + rows[None, :, None] * x_stride
        for start in range(0, n_in, splits * block_in):
            places = start + columns
            values = tl.load(asked + places, exists[None, :, None] & (places < n_in), other=0)
            weights = tl.load(lines + places, inside[None, :, None] & (places < n_in), other=0).to(values.dtype)
            parts = tl.dot(values, tl.trans(weights, 0, 2, 1), parts, input_precision="ieee")
        total = tl.sum(parts, 0)
    return total


@jit
def _load_uses(
    first_uses: Tile, last_uses: Tile, row: Tile, is_first: Tile, first_masked: constexpr, last_masked: constexpr
) -> Tile:
    """Whether a row uses the adapter that each output belongs to: [block_out] int32."""
    first = tl.load(first_uses + row).to(tl.int32) if first_masked else 1
    last = tl.load(last_uses + row).to(tl.int32) if last_masked else 1
    return tl.where(is_first, first, last)
