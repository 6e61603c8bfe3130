"""Rows in bytes: in e4m3, or in whole numbers of two bytes, each with a scale of its own; and what a byte of e4m3
stands for, on cards that know none.

Other kernels whose rows go to such products leave them so as well (`store_bytes`), and save a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.model.kernels.launch import (
    E4M3_CAPABILITY,
    Tile,
    capability,
    constexpr,
    jit,
    launch_options,
    power_of_two,
    tl,
    warps_of_row,
)

WARPS = 8
LARGEST, LEAST_SCALE = 448.0, 1e-30
LARGEST_WHOLE = 127 * 256
"""Whose upper byte is the largest that int8 has."""


@dataclass(frozen=True)
class Bytes:
    """Rows for a product on tensor cores; or room for them, which whoever makes the rows fills."""

    codes: Tensor  # [rows, size] e4m3, or [2, rows, size] int8, upper and lower
    scale: Tensor  # [rows] fp32

    @property
    def is_e4m3(self) -> bool:
        return self.codes.dtype is torch.float8_e4m3fn


def room_in_e4m3(rows: int, size: int, like: Tensor) -> Bytes:
    return Bytes(like.new_empty((rows, size), dtype=torch.float8_e4m3fn), like.new_empty(rows, dtype=torch.float32))


def room_in_two_bytes(rows: int, size: int, like: Tensor) -> Bytes:
    return Bytes(like.new_empty((2, rows, size), dtype=torch.int8), like.new_empty(rows, dtype=torch.float32))


def plain_make_bytes(x: Tensor, made: Bytes) -> None:
    """Fill such room with x [rows, size]; the definition."""
    (plain_round_rows if made.is_e4m3 else plain_split_rows)(x, made.codes, made.scale)


def make_bytes(x: Tensor, made: Bytes) -> None:
    """As `plain_make_bytes`."""
    (round_rows if made.is_e4m3 else split_rows)(x, made.codes, made.scale)


def byte_arguments(x: Tensor, made: Bytes | None) -> tuple[tuple[Tensor, Tensor], tuple[int, int], int]:
    """How kernels are given room for bytes: codes and scale; what rows and halves lie apart; and the bytes of a number,
    1 for e4m3. Without any, x stands in for both, and 0.
    """
    if made is None:
        return (x, x), (0, 0), 0
    codes = _as_known(made.codes)
    return (codes, made.scale), (codes.stride(-2), codes.stride(0)), 1 if made.is_e4m3 else 2


def _as_known(codes: Tensor) -> Tensor:
    """Codes in e4m3 as bytes, where the card does not know it."""
    is_unknown = codes.dtype is torch.float8_e4m3fn and capability(codes.device) < E4M3_CAPABILITY
    return codes.view(torch.uint8) if is_unknown else codes


def plain_round_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """codes = x * (1 / scale) in e4m3, where the largest of a row becomes 448; the definition.

    x and codes [rows, size], each row contiguous; scale [rows] fp32.
    """
    scale.copy_(torch.linalg.vector_norm(x, float("inf"), dim=1).float().div_(LARGEST).clamp_(min=LEAST_SCALE))
    codes.copy_(x * scale.reciprocal()[:, None])


def round_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """As `plain_round_rows`, one program a row."""
    rows, size = x.shape
    _round_rows[(rows,)](
        *(x, _as_known(codes), scale, x.stride(0), codes.stride(0)),
        size=size,
        block=power_of_two(size),
        num_warps=warps_of_row(rows, WARPS),
        **launch_options(x.device),
    )


@jit
def _round_rows(
    x: Tile,
    codes: Tile,
    scale: Tile,
    x_stride: Tile,
    codes_stride: Tile,
    size: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    values = tl.load(x + row * x_stride + columns, columns < size, other=0).to(tl.float32)
    store_bytes(values, codes + row * codes_stride, scale + row, 0, columns, columns < size, 1)


def plain_split_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """x * (1 / scale) = 256 * upper + lower, rounded, where the largest of a row becomes 127 * 256; the definition.

    x [rows, size]; codes [2, rows, size] int8, upper and lower; scale [rows] fp32.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1).float()
    scale.copy_(largest.div_(LARGEST_WHOLE).clamp_(min=LEAST_SCALE))
    whole = (x * scale.reciprocal()[:, None]).round_().int()
    codes[0] = (whole + 128) >> 8
    codes[1] = whole - 256 * codes[0].int()


def split_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """As `plain_split_rows`, one program a row; codes are contiguous."""
    _, rows, size = codes.shape
    _split_rows[(rows,)](
        *(x, codes, scale, x.stride(0), codes.stride(0)),
        size=size,
        block=power_of_two(size),
        num_warps=warps_of_row(rows, WARPS),
        **launch_options(x.device),
    )


@jit
def _split_rows(
    x: Tile,
    codes: Tile,
    scale: Tile,
    x_stride: Tile,
    half: Tile,
    size: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    values = tl.load(x + row * x_stride + columns, columns < size, other=0).to(tl.float32)
    store_bytes(values, codes + row * size, scale + row, half, columns, columns < size, 2)


@jit
def store_bytes(
    values: Tile, codes: Tile, scale: Tile, half: Tile, places: Tile, inside: Tile, n_bytes: constexpr
) -> None:
    """Store all of a row, in fp32 and with zeros beyond its end, in bytes, and its scale."""
    largest = tl.max(tl.abs(values), 0)
    if n_bytes == 1:
        step = tl.maximum(largest / 448.0, 1e-30)
        scaled = values * (1.0 / step)
        if codes.dtype.element_ty == tl.uint8:
            # Below a fp16's own exponents by 8, an e4m3's fit in it, with all that is smaller.
            whole = (nearest(scaled) * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
            tl.store(codes + places, (((whole >> 8) & 0x80) | ((whole >> 7) & 0x7F)).to(tl.uint8), inside)
        else:
            tl.store(codes + places, scaled.to(codes.dtype.element_ty), inside)
    else:
        step = tl.maximum(largest / 32512.0, 1e-30)
        # 1.5 * 2**23: there fp32 has no others.
        whole = ((values * (1.0 / step) + 12582912.0) - 12582912.0).to(tl.int32)
        upper = (whole + 128) >> 8
        tl.store(codes + places, upper.to(tl.int8), inside)
        tl.store(codes + half + places, (whole - (upper << 8)).to(tl.int8), inside)
    tl.store(scale, step)


@jit
def row_step(x: Tile, size: constexpr, block: constexpr, cache: constexpr) -> Tile:
    """The scale of a row."""
    columns = tl.arange(0, block)
    values = tl.load(x + columns, columns < size, other=0, cache_modifier=cache).to(tl.float32)
    return tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-30)


@jit
def nearest(values: Tile) -> Tile:
    """The nearest numbers that e4m3 has, of fp32 up to 448."""
    exponents = values.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(exponents.to(tl.float32, bitcast=True), 0.015625)
    far = power * 1572864.0  # 1.5 * 2**20: there fp32 has steps of an eighth of the power
    return (values + far) - far


@jit
def widened(codes: Tile, is_e4m3: constexpr) -> Tile:
    """What bytes of codes stand for: int8 as it is; e4m3, in uint8, as fp16 over 256, by its bits."""
    if is_e4m3:
        bits = codes.to(tl.uint16)
        codes = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return codes


@jit
def wide_codes(codes: Tile, is_e4m3: constexpr, knows_e4m3: constexpr) -> Tile:
    """What bytes of codes stand for, in fp32; e4m3, in uint8, over 256 where the card does not know it."""
    if is_e4m3 and knows_e4m3:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    return widened(codes, is_e4m3).to(tl.float32)
