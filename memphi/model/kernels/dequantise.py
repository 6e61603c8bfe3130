"""Codes in int8 made numbers of 16 bits: outputs of a matrix, adapters' columns beside it, rows of an embedding.

Codes of a line are contiguous; lines may lie apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.coded import Columns, load_scales, t_places
from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, tl

TILE, COLUMNS_TILE, NUMBERS_A_WARP = (1, 2048), (32, 64), 512
"""Lines and numbers of a program; and where lines are shorter, as those of adapters' columns: their programs would be
many, and a card takes longer to start them than they take."""


def plain_write_columns(columns: Columns, first: int, out: Tensor) -> None:
    """Adapters' B of outputs from `first` on, rounded once, into out [outs, columns of an operand], as t stands there;
    the definition.
    """
    last, start = first + len(out), 0
    for codes, scale, _ in columns.parts:
        plain_dequantise(codes[first:last], scale[first:last], out[:, start : start + codes.shape[1]])
        start += codes.shape[1] + columns.gap


def write_columns(columns: Columns, first: int, out: Tensor) -> None:
    """As `plain_write_columns`."""
    _launch_columns(columns, first, out, columns.gap)


def widen(columns: Columns, out: Tensor) -> None:
    """The same of all outputs, side by side without what stands between their t: out [outs, ranks]."""
    _launch_columns(columns, 0, out, 0)


def plain_dequantise(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = codes * scale, rounded once, [outs, in]; the definition.

    codes [outs, in] int8, scale [outs]; rows may lie apart.
    """
    torch.mul(codes, scale.float()[:, None], out=out)


def dequantise(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `plain_dequantise`."""
    _launch_dequantise(codes, scale, scale, out, codes.shape[1], 0)


def _launch_columns(columns: Columns, first: int, out: Tensor, gap: int) -> None:
    last = first + len(out)
    scales = columns.scale[0, first:last], columns.scale[-1, first:last]
    _launch_dequantise(columns.codes[first:last], *scales, out, columns.border, gap)


def _launch_dequantise(codes: Tensor, first: Tensor, last: Tensor, out: Tensor, border: int, gap: int) -> None:
    """Codes of columns before a border by the first scales, the others by the last, and so much further in out."""
    n_out, n_in = codes.shape
    lines, block = TILE if n_in >= TILE[1] else COLUMNS_TILE
    _dequantise[(-(-n_out // lines), -(-n_in // block))](
        *(codes, first, last, out, codes.stride(0), out.stride(0), border, gap, n_out),
        n_in=n_in,
        lines=lines,
        block=block,
        num_warps=lines * block // NUMBERS_A_WARP,
        **launch_options(out.device),
    )


@jit
def _dequantise(
    codes: Tile,
    first: Tile,
    last: Tile,
    out: Tile,
    codes_stride: Tile,
    out_stride: Tile,
    border: Tile,
    gap: Tile,
    n_out: Tile,
    n_in: constexpr,
    lines: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    outs, places = tl.program_id(0) * lines + tl.arange(0, lines), tl.program_id(1) * block + tl.arange(0, block)
    exists, rows = outs < n_out, outs.to(tl.int64)[:, None]
    there, is_first = exists[:, None] & (places < n_in)[None, :], (places < border)[None, :]
    c = tl.load(codes + rows * codes_stride + places[None, :], there, other=0, eviction_policy="evict_first")
    scales = tl.where(is_first, load_scales(first, outs, exists)[:, None], load_scales(last, outs, exists)[:, None])
    wide = c.to(tl.float32) * scales
    if dependent:
        tl.extra.cuda.gdc_wait()  # What was here before may be in use until then.
    to = out + rows * out_stride + t_places(places, border, gap)[None, :]
    tl.store(to, wide.to(out.dtype.element_ty), there)


def look_up(codes: Tensor, scale: Tensor, ids: Tensor, out: Tensor) -> None:
    """out = the rows of these ids, as `dequantise` has them: ids [rows], out [rows, in]; not launched dependently."""
    n_in = codes.shape[1]
    _look_up[(len(ids), -(-n_in // TILE[1]))](
        *(codes, scale, ids, out, out.stride(0)), n_in=n_in, block=TILE[1], num_warps=4
    )


@jit
def _look_up(
    codes: Tile, scale: Tile, ids: Tile, out: Tile, out_stride: Tile, n_in: constexpr, block: constexpr
) -> None:
    number, places = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    row = tl.load(ids + number).to(tl.int64)
    c = tl.load(codes + row * n_in + places, places < n_in, other=0)
    wide = c.to(tl.float32) * tl.load(scale + row).to(tl.float32)
    tl.store(out + number * out_stride + places, wide.to(out.dtype.element_ty), places < n_in)
