"""What products with a matrix in codes share: for how many rows they are, and adapters' columns in int8 beside it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.model.kernels.launch import (
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    is_available,
    jit,
    multiprocessors,
    power_of_two,
    tl,
)

VECTOR_ROWS = 4
"""Up to so many rows products are summed number by number on a card without tensor cores."""
MOST_ROWS = 64
"""Beyond, weights are made 16 bits again and multiplied by torch; or as they are, where a card has units for them."""
BLOCK_ROWS = 16, 64
"""The fewest and the most rows that one program has on tensor cores."""
LEAST_SHARE = 768
"""Inputs of a part, where a product is divided."""
FETCHED_BYTES = 128
"""What a card's cache fetches at once."""


@dataclass(frozen=True)
class Columns:
    """What one adapter or two add to a product: t B^T, where b = code * scale.

    What makes t is launched right before the product, which runs beside it until it needs t: so x, and what it is in
    bytes where somebody makes those, must have been made before that.
    """

    codes: Tensor  # [out, ranks] int8, those of two adapters side by side
    scale: Tensor  # [adapters, out]
    t: tuple[Tensor, ...]  # of each adapter, [rows, rank]; both in one operand

    @property
    def ranks(self) -> int:
        return self.codes.shape[1]

    @property
    def border(self) -> int:
        """Where the second adapter's columns begin; with one alone, their end."""
        return self.t[0].shape[1]

    @property
    def gap(self) -> int:
        """How far the second adapter's t lies from the end of the first's."""
        return int(self.t[-1].storage_offset() - self.t[0].storage_offset()) - self.border if len(self.t) > 1 else 0

    @property
    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Codes [out, rank], scale [out] and t [rows, rank] of each adapter."""
        codes = self.codes.split([t.shape[1] for t in self.t], 1)
        return list(zip(codes, self.scale, self.t, strict=True))


def column_arguments(x: Tensor, columns: Columns | None) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """How kernels are given columns: codes, the scales of the first adapter and of the last, t of the first; strides,
    border and gap; and how many there are. Without any, x stands in for each.
    """
    if columns is None:
        return (x, x, x, x), (0, 0, 0, 0), 0
    first = columns.t[0]
    tensors = columns.codes, columns.scale[0], columns.scale[-1], first
    return tensors, (columns.codes.stride(0), first.stride(0), columns.border, columns.gap), columns.ranks


def plain_add(y: Tensor, columns: Columns | None) -> Tensor:
    """y [rows, out] fp32, and t B^T; the definition."""
    for codes, scale, t in [] if columns is None else columns.parts:
        y = y + t.float() @ (codes.float() * scale.float()[:, None]).t()
    return y


def vector_rows(device: torch.device) -> int:
    """The most rows whose products are summed number by number; on an H200 two took less on tensor cores already."""
    return 1 if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


@functools.cache
def most_rows(device: torch.device, most: int = MOST_ROWS) -> int:
    """The most rows that products are for; 0 where there are no kernels."""
    if not is_available(device):
        return 0
    return most if capability(device) >= TENSOR_CAPABILITY else VECTOR_ROWS


def choose_parts(blocks: int, n_in: int, device: torch.device) -> int:
    """Into how many parts of LEAST_SHARE inputs or more they are divided where so many blocks leave a card's
    multiprocessors idle, of which each has room for two programs: the best on an H200."""
    return max(min(2 * multiprocessors(device) // blocks, n_in // LEAST_SHARE), 1)


def fetches_of(width: int) -> int:
    """Into how many blocks, a power of two, a line of so many bytes is parted to be fetched."""
    return power_of_two(-(-width // FETCHED_BYTES))


@jit
def fetch_lines(lines: Tile, stride: Tile, numbers: Tile, count: Tile, width: constexpr, block: constexpr) -> None:
    """Have the card's cache fetch lines of so many bytes, by their numbers, in `fetches_of` each; for what is beyond
    the last of them."""
    places = tl.minimum(tl.arange(0, block) * 128, width - 1)
    at = lines + tl.minimum(numbers, count - 1).to(tl.int64)[:, None] * stride + places[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@jit
def load_columns(
    codes: Tile, stride: Tile, outs: Tile, inside: Tile, start: Tile, ranks: constexpr, block: constexpr
) -> Tile:
    """A block of B's codes from a column on: [outs, block]."""
    numbers = start + tl.arange(0, block)
    exists = inside[:, None] & (numbers < ranks)[None, :]
    return tl.load(codes + outs.to(tl.int64)[:, None] * stride + numbers[None, :], exists, other=0)


@jit
def load_scales(scale: Tile, outs: Tile, inside: Tile) -> Tile:
    """The scales of outputs: [outs] fp32."""
    return tl.load(scale + outs, inside, other=0).to(tl.float32)


@jit
def widen_columns(codes: Tile, first: Tile, last: Tile, start: Tile, border: Tile, block: constexpr) -> Tile:
    """What a block of codes from a column on stands for, by the first adapter's scales or the last's: [outs, block]."""
    is_first = start + tl.arange(0, block) < border
    return codes.to(tl.float32) * tl.where(is_first[None, :], first[:, None], last[:, None])


@jit
def t_places(numbers: Tile, border: Tile, gap: Tile) -> Tile:
    """Where in an operand, from the first adapter's t on, that stands which these columns are multiplied by."""
    return tl.where(numbers < border, numbers, numbers + gap)


@jit
def sum_columns(columns: Tile, t: Tile, border: Tile, gap: Tile, ranks: constexpr, block: constexpr) -> Tile:
    """What columns, in fp32, add for a row's t: [outs]."""
    numbers = tl.arange(0, block)
    values = tl.load(t + t_places(numbers, border, gap), numbers < ranks, other=0).to(tl.float32)
    return tl.sum(columns * values[None, :], 1)


@jit
def load_rows(
    x: Tile, x_stride: Tile, numbers: Tile, exists: Tile, columns: Tile, inside: Tile, cache: constexpr
) -> Tile:
    """Some columns of rows: [numbers, columns]."""
    places = x + numbers.to(tl.int64)[:, None] * x_stride + columns[None, :]
    return tl.load(places, exists[:, None] & inside[None, :], other=0.0, cache_modifier=cache)


@jit
def load_block(codes: Tile, inside: Tile, places: Tile, width: constexpr) -> Tile:
    """A block of codes, of lines as wide as given: read once in a step, so the cache need not keep them."""
    exists = inside[:, None] & (places < width)[None, :]
    return tl.load(codes + places[None, :], exists, other=0.0, eviction_policy="evict_first")


@jit
def load_blocks(codes: Tile, inside: Tile, places: Tile, width: constexpr, block: constexpr, count: constexpr) -> Tile:
    """So many blocks of lines, the first ones, all under way at once."""
    blocks = ()
    for number in tl.static_range(count):
        blocks = blocks + (load_block(codes, inside, number * block + places, width),)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@jit
def load_pieces(
    row: Tile, places: Tile, width: constexpr, block: constexpr, count: constexpr, cache: constexpr
) -> Tile:
    """So many pieces of a row, the first ones, all under way at once."""
    pieces = ()
    for number in tl.static_range(count):
        pieces = pieces + (load_piece(row, number * block + places, width, cache),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@jit
def load_piece(row: Tile, places: Tile, width: constexpr, cache: constexpr) -> Tile:
    """Some numbers of a row."""
    return tl.load(row + places, places < width, other=0, cache_modifier=cache)


@jit
def add_product(values: Tile, weights: Tile, sums: Tile) -> Tile:
    """sums [outs, rows] + weights values^T, of [outs, in] and [rows, in]: for few rows tensor cores want it so."""
    return tl.dot(weights, tl.trans(values), sums, input_precision="ieee")


@jit
def add_columns(
    sums: Tile,
    b: Tile,
    first: Tile,
    last: Tile,
    t: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    gap: Tile,
    outs: Tile,
    inside: Tile,
    numbers: Tile,
    exists: Tile,
    begin: Tile,
    end: Tile,
    step: Tile,
    ranks: constexpr,
    block: constexpr,
) -> Tile:
    """sums [outs, rows] + B t^T of some blocks of columns, one after another, each rounded to t's dtype."""
    for start in range(begin, end, step):
        places = start + tl.arange(0, block)
        codes = load_columns(b, b_stride, outs, inside, start, ranks, block)
        values = load_rows(t, t_stride, numbers, exists, t_places(places, border, gap), places < end, "")
        columns = widen_columns(codes, first, last, start, border, block).to(values.dtype)
        sums = add_product(values, columns, sums)
    return sums


@jit
def store_tile(sums: Tile, out: Tile, out_stride: Tile, outs: Tile, inside: Tile, numbers: Tile, exists: Tile) -> None:
    """Store sums [outs, rows] as rows."""
    to = out + numbers.to(tl.int64)[:, None] * out_stride + outs[None, :]
    tl.store(to, tl.trans(sums).to(out.dtype.element_ty), exists[:, None] & inside[None, :])
