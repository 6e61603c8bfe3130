"""Products of a few rows with a matrix, which take as long as reading the matrix.

Rows lie side by side in x, each contiguous; a matrix [out, in] may be a range of another's columns. Sums are fp32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.model.kernels.coded import load_block, load_blocks, load_piece, load_pieces, load_rows
from memphi.model.kernels.eight_bits import plain_dequantise
from memphi.model.kernels.gate import open_gate, outs_of, store_outs
from memphi.model.kernels.launch import (
    ROOMY_CAPABILITY,
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    fit_block,
    is_available,
    jit,
    launch_options,
    power_of_two,
    tl,
)

MOST_ROWS, MOST_NARROW_ROWS = 16, 512
"""Beyond, torch's own products are as fast: of weights; of an adapter's A, but for one of codes."""
VECTOR_ROWS, FEW_ROWS = 4, 2
"""Up to so many rows products are summed number by number; where there are tensor cores, which take less for more."""
NARROW_VECTOR_ROWS, FEW_NARROW_ROWS = 32, 16
"""The same of an adapter's A in 16 bits, which then is read once for every VECTOR_ROWS."""
AHEAD, NARROW_AHEAD = 3, 8
"""Blocks of a matrix, and of an adapter's A, that a program asks for before one row is there."""
NARROW_BLOCK = (2, 1024, 4)
"""Outputs, inputs and warps of a program that multiplies by an adapter's A: few outputs, so that there are many."""
NARROW_TILE, NARROW_TILE_OF_CODES = (16, 16, 128, 3, 8), (16, 8, 128, 3, 8)
"""Rows, outputs, inputs of 2 bytes, stages and warps of such a program on tensor cores, each of whose warps has inputs
of its own: the best that were measured on an H200 at 64 rows."""
SMALL_NARROW_TILE = (16, 16, 128, 2, 4)
"""The same from MANY_NARROW_ROWS on, at 256 rows, and where a program has less room."""
LARGE_NARROW_TILE, WIDE_LARGE_NARROW_TILE = (128, 64, 64, 4, 4), (64, 32, 64, 2, 4)
"""The same beyond MOST_NARROW_ROWS, where all warps have the same inputs; and of numbers of 32 bits."""
MANY_NARROW_ROWS = 129
SUMS = 64
"""Sums that a thread keeps at most."""
BLOCKS = {(5120, 3): (2, 2048, 4), (3072, 3): (2, 2048, 4), (16384, 3): (2, 2048, 8), (3072, 8): (4, 4096, 4)}
"""Outputs, inputs and warps of a program, by outputs and thousands of inputs: the best that were measured on an H100 at
one row (3.01, 3.03, 3.12 and 3.03 TB/s)."""
USUAL_BLOCK = (2, 2048, 8)


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


def vector_rows(device: torch.device) -> int:
    """The most rows whose products are summed number by number."""
    return FEW_ROWS if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


@functools.cache
def most_rows(device: torch.device) -> int:
    """The most rows that `multiply` is for; 0 where there are no kernels."""
    if not is_available(device):
        return 0
    return MOST_ROWS if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


@functools.cache
def most_narrow_rows(device: torch.device, is_coded: bool = False) -> int:
    """The same of `narrow`."""
    if not is_available(device):
        return 0
    if capability(device) < TENSOR_CAPABILITY:
        return NARROW_VECTOR_ROWS
    return sys.maxsize if is_coded else MOST_NARROW_ROWS


def plain_multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x W^T, the definition: x [rows, in], weight [out, in], out [rows, out]."""
    torch.mm(x, weight.t(), out=out)


def multiply(x: Tensor, weight: Tensor, out: Tensor, gated: bool = False) -> None:
    """As `plain_multiply`; gated: what comes of that goes through `gate`, and out is half as wide."""
    rows, (n_out, n_in) = len(x), weight.shape
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    if rows <= vector_rows(x.device):
        block_out, block_in, warps = choose_block(rows, n_out, n_in)
        block_out = max(block_out, 2) if gated else block_out  # A gate stands beside what it lets through.
        _multiply_vectors[(-(-n_out // block_out),)](
            *(x, weight, out, *strides, n_out),
            n_in=n_in,
            rows=rows,
            gated=gated,
            block_out=block_out,
            block_in=block_in,
            ahead=min(-(-n_in // block_in), AHEAD) if rows == 1 else 1,
            num_warps=warps,
            **launch_options(x.device),
        )
        return
    block_out, block_in, stages, warps = choose_tile(n_out, x.itemsize, capability(x.device))
    _multiply_tiles[(-(-n_out // block_out),)](
        *(x, weight, out, *strides, n_out, rows),
        n_in=n_in,
        gated=gated,
        block_rows=max(16, power_of_two(rows)),
        block_out=block_out,
        block_in=block_in,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )


def choose_tile(n_out: int, itemsize: int, on: tuple[int, int]) -> tuple[int, int, int, int]:
    """Outputs, inputs, stages and warps of a program on the tensor cores of a card of some compute capability."""
    if on in ROOMY_CAPABILITY:
        return 64, 512 // itemsize, 3 if n_out >= 8192 else 5, 4
    return 64, 256 // itemsize, 3, 4


def choose_block(rows: int, n_out: int, n_in: int) -> tuple[int, int, int]:
    """Outputs, inputs and warps of a program, so that no thread keeps more than SUMS for more than one row."""
    block_out, block_in, warps = BLOCKS.get((n_out, n_in // 1024), USUAL_BLOCK)
    block_in = min(block_in, power_of_two(n_in))
    return fit_block(rows, block_out, block_in, warps, SUMS)


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
    first, last = parts[0], parts[-1]
    is_coded = first.a_scale is not None
    border, n_out = len(first.a), sum(len(part.a) for part in parts)
    gap = last.t.storage_offset() - first.t.storage_offset() - border if last is not first else 0
    assert last is first or last.a.data_ptr() == first.a.data_ptr() + first.a.nbytes, "As must follow each other"
    arguments = (
        *(x, first.a, x if first.a_scale is None else first.a_scale, first.t),
        *(x if first.uses is None else first.uses, x if last.uses is None else last.uses),
        *(x.stride(0), first.a.stride(0), first.t.stride(0), len(x), n_out, border, gap, first.scale, last.scale),
    )
    options = {
        "n_in": x.shape[1],
        "first_masked": first.uses is not None,
        "last_masked": last.uses is not None,
        "is_coded": is_coded,
        **launch_options(x.device),
    }
    if len(x) > narrow_vector_rows(is_coded, x.device):
        tile = choose_narrow_tile(len(x), x.itemsize, is_coded, capability(x.device))
        block_rows, block_out, block_in, stages, warps = tile
        _narrow_tiles[(-(-n_out // block_out), -(-len(x) // block_rows))](
            *arguments,
            block_rows=block_rows,
            block_out=block_out,
            block_in=block_in,
            splits=1 if len(x) > MOST_NARROW_ROWS else warps,
            num_stages=stages,
            num_warps=warps,
            **options,
        )
        return
    rows = min(len(x), VECTOR_ROWS)
    block_out, block_in, warps = NARROW_BLOCK
    block_in = min(block_in, power_of_two(x.shape[1]))
    _narrow[(-(-n_out // block_out), -(-len(x) // rows))](
        *arguments,
        rows=rows,
        block_out=block_out,
        block_in=block_in,
        ahead=min(-(-x.shape[1] // block_in), NARROW_AHEAD) if rows == 1 else 1,
        num_warps=warps,
        **options,
    )


def narrow_vector_rows(is_coded: bool, device: torch.device) -> int:
    """The most rows whose products with an adapter's A are summed number by number."""
    if capability(device) < TENSOR_CAPABILITY:
        return NARROW_VECTOR_ROWS
    return VECTOR_ROWS if is_coded else FEW_NARROW_ROWS


def choose_narrow_tile(rows: int, itemsize: int, is_coded: bool, on: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """Rows, outputs, inputs, stages and warps of a program that multiplies by an adapter's A on tensor cores.

    Of wider numbers, which have no tensor cores, a thread has room for fewer.
    """
    tile = NARROW_TILE_OF_CODES if is_coded else NARROW_TILE
    if rows > MOST_NARROW_ROWS:
        tile = LARGE_NARROW_TILE if itemsize <= 2 else WIDE_LARGE_NARROW_TILE
    elif rows >= MANY_NARROW_ROWS or itemsize > 2 or on not in ROOMY_CAPABILITY:
        tile = SMALL_NARROW_TILE
    block_rows, block_out, block_in, stages, warps = tile
    return block_rows, block_out, block_in // (4 if itemsize > 2 else 1), stages, warps


@jit
def _multiply_vectors(
    x: Tile,
    weight: Tile,
    out: Tile,
    x_stride: Tile,
    weight_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    n_in: constexpr,
    rows: constexpr,
    gated: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    ahead: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    places = tl.program_id(0) * block_out + tl.arange(0, block_out)
    outs, inside = outs_of(places, n_out, gated), places < n_out
    sums = _sum_vectors(
        *(x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride),
        *(weight + outs.to(tl.int64) * weight_stride, inside),
        *(n_in, rows, block_out, block_in, ahead, dependent, False),
    )
    for row in tl.static_range(rows):
        made = sums[row].to(out.dtype.element_ty)
        store_outs(out + row * out_stride, made, tl.program_id(0), n_out, gated, block_out)


@jit
def _sum_vectors(
    x0: Tile,
    x1: Tile,
    x2: Tile,
    x3: Tile,
    weights: Tile,
    inside: Tile,
    n_in: constexpr,
    rows: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    ahead: constexpr,
    dependent: constexpr,
    lets_start: constexpr,
) -> Tile:
    """The products of up to four rows with a block of outputs; the first weights are read before x is there.

    Then, where this lets it, the next kernel starts.
    """
    columns = tl.arange(0, block_in)
    first = load_blocks(weights[:, None], inside, columns, n_in, block_in, ahead)
    if dependent:
        tl.extra.cuda.gdc_wait()
    blocks: constexpr = (n_in + block_in - 1) // block_in
    whole: constexpr = blocks if rows == 1 else 1
    pieces = load_pieces(x0, columns, n_in, block_in, whole, "")
    if dependent and lets_start:
        tl.extra.cuda.gdc_launch_dependents()  # Not before x is asked for: what stands there waits for the weights.
    sums0 = tl.zeros([block_out, block_in], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for number in tl.static_range(blocks):
        at = number * block_in + columns
        w = first[number] if number < ahead else load_block(weights[:, None], inside, at, n_in)
        wide = w.to(tl.float32)
        piece = pieces[number] if number < whole else load_piece(x0, at, n_in, "")
        sums0 += wide * piece.to(tl.float32)[None, :]
        if rows > 1:
            sums1 += wide * load_piece(x1, at, n_in, "").to(tl.float32)[None, :]
        if rows > 2:
            sums2 += wide * load_piece(x2, at, n_in, "").to(tl.float32)[None, :]
        if rows > 3:
            sums3 += wide * load_piece(x3, at, n_in, "").to(tl.float32)[None, :]
    return tl.sum(sums0, 1), tl.sum(sums1, 1), tl.sum(sums2, 1), tl.sum(sums3, 1)


@jit
def _multiply_tiles(
    x: Tile,
    weight: Tile,
    out: Tile,
    x_stride: Tile,
    weight_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    rows: Tile,
    n_in: constexpr,
    gated: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    places = tl.program_id(0) * block_out + tl.arange(0, block_out)
    outs, inside = outs_of(places, n_out, gated), places < n_out
    numbers, columns = tl.arange(0, block_rows), tl.arange(0, block_in)
    exists = numbers < rows
    weights, x = weight + outs.to(tl.int64) * weight_stride, x + numbers[:, None] * x_stride
    w = load_block(weights[:, None], inside, columns, n_in)
    if dependent:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + columns[None, :], exists[:, None] & (columns < n_in)[None, :], other=0)
    sums = tl.dot(values, tl.trans(w), input_precision="ieee")  # [block_rows, block_out]
    for start in range(block_in, n_in, block_in):
        within = start + columns
        w = load_block(weights[:, None], inside, within, n_in)
        values = tl.load(x + within[None, :], exists[:, None] & (within < n_in)[None, :], other=0)
        sums = tl.dot(values, tl.trans(w), sums, input_precision="ieee")
    made, to = sums.to(out.dtype.element_ty), out + numbers[:, None] * out_stride
    if gated:
        pairs = tl.program_id(0) * (block_out // 2) + tl.arange(0, block_out // 2)
        gates, ups = tl.split(tl.reshape(made, [block_rows, block_out // 2, 2]))
        tl.store(to + pairs[None, :], open_gate(gates, ups), exists[:, None] & (pairs < n_out // 2)[None, :])
    else:
        tl.store(to + outs[None, :], made, exists[:, None] & inside[None, :])


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
        sums = _sum_vectors(
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


@jit
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
