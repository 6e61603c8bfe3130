"""The MLP's gate: up * silu(gate)."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, tl

BLOCK, WARPS = 1024, 4


def plain_gate(gate_up: Tensor, out: Tensor) -> None:
    """out = up * silu(gate), both rounded as they arise; the definition.

    gate_up [rows, 2 * size], the gate first; out [rows, size]; each row contiguous.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(up * F.silu(gate))


def gate(gate_up: Tensor, out: Tensor) -> None:
    """As `plain_gate`, one program for each block of a row."""
    rows, size = out.shape
    _gate[(rows, -(-size // BLOCK))](
        *(gate_up, out, gate_up.stride(0), out.stride(0)),
        size=size,
        block=BLOCK,
        num_warps=WARPS,
        **launch_options(out.device),
    )


@jit
def _gate(
    gate_up: Tile,
    out: Tile,
    gate_up_stride: Tile,
    out_stride: Tile,
    size: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    gates = tl.load(gate_up + row * gate_up_stride + columns, inside, other=0)
    ups = tl.load(gate_up + row * gate_up_stride + size + columns, inside, other=0)
    tl.store(out + row * out_stride + columns, open_gate(gates, ups), inside)


@jit
def open_gate(gates: Tile, ups: Tile) -> Tile:
    """What gates let through, as `plain_gate` rounds it."""
    wide = gates.to(tl.float32)
    opened = (wide / (1 + tl.exp(-wide))).to(gates.dtype)
    return (ups.to(tl.float32) * opened.to(tl.float32)).to(gates.dtype)
