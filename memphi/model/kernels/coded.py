"""What products with a matrix in codes share: for how many rows they are, and adapters' columns beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.model.kernels.launch import TENSOR_CAPABILITY, Tile, capability, constexpr, is_available, jit, tl

MOST_ROWS = 64
"""Beyond, weights are made 16 bits again and multiplied by torch."""
BLOCK_ROWS = 16, 64
"""The fewest and the most rows that one program has on tensor cores."""


@dataclass(frozen=True)
class Columns:
    """What adapters add to a product: t B^T."""

    b: Tensor  # [out, ranks]
    t: Tensor  # [rows, ranks]


@functools.cache
def most_rows(device: torch.device, vector_rows: int) -> int:
    """The most rows that products are for; 0 where there are no kernels, and vector_rows without tensor cores."""
    if not is_available(device):
        return 0
    return MOST_ROWS if capability(device) >= TENSOR_CAPABILITY else vector_rows


@jit
def load_columns(
    b: Tile, b_stride: Tile, outs: Tile, inside: Tile, start: Tile, ranks: constexpr, block: constexpr
) -> Tile:
    """A block of B from a column on: [outs, block]."""
    numbers = start + tl.arange(0, block)
    exists = inside[:, None] & (numbers < ranks)[None, :]
    return tl.load(b + outs.to(tl.int64)[:, None] * b_stride + numbers[None, :], exists, other=0)


@jit
def sum_columns(columns: Tile, t: Tile, ranks: constexpr, block: constexpr) -> Tile:
    """What columns add for a row's t: [outs] fp32."""
    numbers = tl.arange(0, block)
    values = tl.load(t + numbers, numbers < ranks, other=0).to(tl.float32)
    return tl.sum(columns.to(tl.float32) * values[None, :], 1)


@jit
def load_rows(x: Tile, x_stride: Tile, numbers: Tile, exists: Tile, columns: Tile, inside: Tile) -> Tile:
    """Some columns of rows: [numbers, columns]."""
    places = x + numbers.to(tl.int64)[:, None] * x_stride + columns[None, :]
    return tl.load(places, exists[:, None] & inside[None, :], other=0)


@jit
def add_product(values: Tile, weights: Tile, sums: Tile, weights_first: constexpr) -> Tile:
    """sums + values weights^T, of [rows, in] and [outs, in]; with the weights first, all of it transposed."""
    if weights_first:
        sums = tl.dot(weights, tl.trans(values), sums, input_precision="ieee")
    else:
        sums = tl.dot(values, tl.trans(weights), sums, input_precision="ieee")
    return sums


@jit
def add_columns(
    sums: Tile,
    b: Tile,
    t: Tile,
    b_stride: Tile,
    t_stride: Tile,
    outs: Tile,
    inside: Tile,
    numbers: Tile,
    exists: Tile,
    ranks: constexpr,
    block: constexpr,
    weights_first: constexpr,
) -> Tile:
    """sums + t B^T, a block of columns after another."""
    for start in range(0, ranks, block):
        places = start + tl.arange(0, block)
        columns = load_columns(b, b_stride, outs, inside, start, ranks, block)
        values = load_rows(t, t_stride, numbers, exists, places, places < ranks)
        sums = add_product(values, columns, sums, weights_first)
    return sums


@jit
def store_tile(
    sums: Tile, out: Tile, out_stride: Tile, outs: Tile, inside: Tile, numbers: Tile, exists: Tile, first: constexpr
) -> None:
    """Store sums, which are transposed where the weights came first."""
    if first:
        sums = tl.trans(sums)
    to = out + numbers.to(tl.int64)[:, None] * out_stride + outs[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), exists[:, None] & inside[None, :])
