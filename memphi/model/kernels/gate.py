"""The MLP's gate: up * silu(gate)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, power_of_two, tl, warps_of_row
from memphi.model.kernels.parts import load_parts
from memphi.model.kernels.rounding import Bytes, byte_arguments, plain_make_bytes, store_bytes

BLOCK, WARPS = 1024, 4
ROW_WARPS = 16


def plain_gate(gate_up: Tensor, out: Tensor | None, made: Bytes | None = None) -> None:
    """out = up * silu(gate), both rounded as they arise, and made is filled with it; either may be missing; the
    definition.

    gate_up [rows, 2 * size], the gate first; out [rows, size]; each row contiguous. gate_up may be in parts [parts,
    rows, 2 * size], which are summed and rounded first, as out is; it is there then.
    """
    if gate_up.ndim > 2:
        gate_up = gate_up.sum(0).to(cast(Tensor, out).dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    opened = up * F.silu(gate)
    if out is not None:
        out.copy_(opened)
    if made is not None:
        plain_make_bytes(opened, made)


def gate(gate_up: Tensor, out: Tensor | None, made: Bytes | None = None) -> None:
    """As `plain_gate`, one program for each block of a row; for all of it where there is room for bytes."""
    both = gate_up if gate_up.ndim > 2 else gate_up[None]
    parts, rows, size = len(both), both.shape[1], both.shape[2] // 2
    assert parts == 1 or out is not None
    block, warps = (BLOCK, WARPS) if made is None else (power_of_two(size), warps_of_row(rows, ROW_WARPS))
    room, strides, n_bytes = byte_arguments(both, made)
    target = both[0] if out is None else out
    _gate[(rows, -(-size // block))](
        *(both, target, *room, both.stride(0), both.stride(1), target.stride(0), *strides),
        size=size,
        has_out=out is not None,
        n_bytes=n_bytes,
        block=block,
        parts=parts,
        num_warps=warps,
        **launch_options(gate_up.device),
    )


@jit
def _gate(
    gate_up: Tile,
    out: Tile,
    codes: Tile,
    scale: Tile,
    part_stride: Tile,
    gate_up_stride: Tile,
    out_stride: Tile,
    codes_stride: Tile,
    half: Tile,
    size: constexpr,
    has_out: constexpr,
    n_bytes: constexpr,
    block: constexpr,
    parts: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    gate_up += row * gate_up_stride + columns
    dtype: constexpr = out.dtype.element_ty
    gates = load_parts(gate_up, inside, part_stride, parts, dtype)
    ups = load_parts(gate_up + size, inside, part_stride, parts, dtype)
    opened = open_gate(gates, ups)
    if has_out:
        tl.store(out + row * out_stride + columns, opened, inside)
    if n_bytes > 0:
        store_bytes(opened.to(tl.float32), codes + row * codes_stride, scale + row, half, columns, inside, n_bytes)


@jit
def open_gate(gates: Tile, ups: Tile) -> Tile:
    """What gates let through, as `plain_gate` rounds it."""
    wide = gates.to(tl.float32)
    opened = (wide / (1 + tl.exp(-wide))).to(gates.dtype)
    return (ups.to(tl.float32) * opened.to(tl.float32)).to(gates.dtype)


@jit
def outs_of(places: Tile, n_out: Tile, gated: constexpr) -> Tile:
    """The outputs that a program computes: side by side, or each gate beside what it lets through."""
    return places // 2 + places % 2 * (n_out // 2) if gated else places


@jit
def store_outs(out: Tile, made: Tile, program: Tile, n_out: Tile, gated: constexpr, block_out: constexpr) -> None:
    """Store what a program made of a row for `outs_of` its places, in out's dtype; gates open, where gated."""
    if gated:
        pairs = program * (block_out // 2) + tl.arange(0, block_out // 2)
        gates, ups = tl.split(tl.reshape(made, [block_out // 2, 2]))
        tl.store(out + pairs, open_gate(gates, ups), pairs < n_out // 2)
    else:
        places = program * block_out + tl.arange(0, block_out)
        tl.store(out + places, made, places < n_out)
