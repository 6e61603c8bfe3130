"""Products of a few rows with a matrix, which take as long as reading the matrix.

Rows lie side by side in x, each contiguous; a matrix [out, in] may be a range of another's columns. Sums are fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from memphi.model.kernels.coded import load_block, load_blocks, load_piece, load_pieces
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

MOST_ROWS = 16
"""Beyond, torch's own products are as fast."""
VECTOR_ROWS, FEW_ROWS = 4, 2
"""Up to so many rows products are summed number by number; where there are tensor cores, which take less for more."""
AHEAD = 3
"""Blocks of a matrix that a program asks for before one row is there."""
SUMS = 64
"""Sums that a thread keeps at most."""
BLOCKS = {(5120, 3): (2, 2048, 4), (3072, 3): (2, 2048, 4), (16384, 3): (2, 2048, 8), (3072, 8): (4, 4096, 4)}
"""Outputs, inputs and warps of a program, by outputs and thousands of inputs: the best that were measured on an H100 at
one row (3.01, 3.03, 3.12 and 3.03 TB/s)."""
USUAL_BLOCK = (2, 2048, 8)


def vector_rows(device: torch.device) -> int:
    """The most rows whose products are summed number by number."""
    return FEW_ROWS if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


@functools.cache
def most_rows(device: torch.device) -> int:
    """The most rows that `multiply` is for; 0 where there are no kernels."""
    if not is_available(device):
        return 0
    return MOST_ROWS if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


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
    sums = sum_vectors(
        *(x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride),
        *(weight + outs.to(tl.int64) * weight_stride, inside),
        *(n_in, rows, block_out, block_in, ahead, dependent, False),
    )
    for row in tl.static_range(rows):
        made = sums[row].to(out.dtype.element_ty)
        store_outs(out + row * out_stride, made, tl.program_id(0), n_out, gated, block_out)


@jit
def sum_vectors(
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
