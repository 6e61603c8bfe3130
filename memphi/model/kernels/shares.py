"""What adapters add to a product of many rows that was made without them, and their share of one of few by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memphi.model.kernels.coded import (
    Columns,
    add_columns,
    column_arguments,
    load_rows,
    load_scales,
    plain_add,
    store_tile,
    t_places,
)
from memphi.model.kernels.dequantise import widen
from memphi.model.kernels.launch import (
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    is_available,
    jit,
    jit_for_any,
    launch_options,
    tl,
)

ADDED_TILE, SHARE_TILE, WIDE_TILE = (64, 128, 64, 3, 4), (64, 64, 64, 3, 4), (64, 64, 32, 2, 4)
"""Rows, outputs, columns, stages and warps of a program of `add_to` and of `write_share`, and of either where numbers
have 32 bits: the best that were measured on an H200 at 7,711 rows and at 256."""


def adds_at_once(device: torch.device) -> bool:
    """Whether there are kernels for these."""
    return is_available(device) and capability(device) >= TENSOR_CAPABILITY


def plain_add_to(y: Tensor, columns: Columns) -> None:
    """y [rows, out] += t B^T, rounded once; the definition."""
    y.copy_(plain_add(y.float(), columns))


def add_to(y: Tensor, columns: Columns, uses: Sequence[Tensor | None]) -> None:
    """As `plain_add_to`, of many rows: B is made numbers of y's dtype first, for all programs.

    uses: for each adapter the rows that use it, [rows] bool, or None for all; other rows have zeros for their t.
    """
    b, t = y.new_empty(y.shape[1], columns.ranks), columns.t[0]
    widen(columns, b)
    places = b.stride(0), t.stride(0), columns.border, columns.gap
    _launch(_add_to, y, (b, t), places, columns.ranks, uses, ADDED_TILE)


def plain_write_share(out: Tensor, columns: Columns) -> None:
    """out [rows, out] = t B^T, rounded once; the definition."""
    out.copy_(plain_add(torch.zeros_like(out, dtype=torch.float32), columns))


def write_share(out: Tensor, columns: Columns, uses: Sequence[Tensor | None]) -> None:
    """As `plain_write_share`, of few rows, with uses as in `add_to`."""
    _launch(_write_share, out, *column_arguments(out, columns), uses, SHARE_TILE)


def _launch(
    kernel: Any,  # noqa: ANN401  # Triton's, which has no types
    out: Tensor,
    added: Sequence[Tensor],
    places: Sequence[int],
    ranks: int,
    uses: Sequence[Tensor | None],
    tile: tuple[int, int, int, int, int],
) -> None:
    (rows, n_out), (first, last) = out.shape, (uses[0], uses[-1])
    block_rows, block_out, block_ranks, stages, warps = tile if out.itemsize <= 2 else WIDE_TILE
    kernel[(-(-n_out // block_out), -(-rows // block_rows))](
        *(out, *added, out if first is None else first, out if last is None else last),
        *(out.stride(0), *places, n_out, rows),
        ranks=ranks,
        first_masked=first is not None,
        last_masked=last is not None,
        block_rows=block_rows,
        block_out=block_out,
        block_ranks=block_ranks,
        num_warps=warps,
        num_stages=stages,
        **launch_options(out.device),
    )


@jit_for_any("rows")
def _add_to(
    y: Tile,
    b: Tile,
    t: Tile,
    first_uses: Tile,
    last_uses: Tile,
    y_stride: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    gap: Tile,
    n_out: Tile,
    rows: Tile,
    ranks: constexpr,
    first_masked: constexpr,
    last_masked: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    """An adapter that no row of a program uses is not read, nor y where none is used."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    numbers = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    inside, exists = outs < n_out, numbers < rows
    begin, end = _columns_in_use(first_uses, last_uses, numbers, exists, border, ranks, first_masked, last_masked)
    if dependent:
        tl.extra.cuda.gdc_wait()
    if begin < end:
        sums = tl.zeros([block_rows, block_out], tl.float32)
        for start in range(begin, end, block_ranks):
            places = start + tl.arange(0, block_ranks)
            values = load_rows(t, t_stride, numbers, exists, t_places(places, border, gap), places < end, "")
            weights = load_rows(b, b_stride, outs, inside, places, places < end, "")
            sums = tl.dot(values, tl.trans(weights), sums, input_precision="ieee")
        # Asked for before, what is there would take the registers of another program.
        to, there = y + numbers.to(tl.int64)[:, None] * y_stride + outs[None, :], exists[:, None] & inside[None, :]
        sums += tl.load(to, there, other=0).to(tl.float32)
        tl.store(to, sums.to(y.dtype.element_ty), there)


@jit_for_any("rows")
def _write_share(
    out: Tile,
    b: Tile,
    b_first: Tile,
    b_last: Tile,
    t: Tile,
    first_uses: Tile,
    last_uses: Tile,
    out_stride: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    gap: Tile,
    n_out: Tile,
    rows: Tile,
    ranks: constexpr,
    first_masked: constexpr,
    last_masked: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    """An adapter that no row of a program uses is not read."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    numbers = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    inside, exists = outs < n_out, numbers < rows
    begin, end = _columns_in_use(first_uses, last_uses, numbers, exists, border, ranks, first_masked, last_masked)
    if dependent:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([block_out, block_rows], tl.float32)
    if begin < end:
        first, last = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first, last, t, b_stride, t_stride, border, gap),
            *(outs, inside, numbers, exists, begin, end, block_ranks, ranks, block_ranks),
        )
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


@jit
def _columns_in_use(
    first_uses: Tile,
    last_uses: Tile,
    numbers: Tile,
    exists: Tile,
    border: Tile,
    ranks: constexpr,
    first_masked: constexpr,
    last_masked: constexpr,
) -> Tile:
    """From which column of B on, and to which, these rows use any."""
    ones = exists.to(tl.int32)
    first = tl.load(first_uses + numbers, exists, other=0).to(tl.int32) if first_masked else ones
    last = tl.load(last_uses + numbers, exists, other=0).to(tl.int32) if last_masked else ones
    return tl.where(tl.max(first, 0) > 0, 0, border), tl.where(tl.max(last, 0) > 0, ranks, border)
