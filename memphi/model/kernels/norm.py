"""The residual sum and the RMSNorm after it, in one pass over the rows."""

from __future__ import annotations

from torch import Tensor

from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, power_of_two, tl, warps_of_row
from memphi.model.kernels.parts import load_parts
from memphi.model.kernels.rounding import Bytes, byte_arguments, plain_make_bytes, store_bytes

WARPS = 8


def plain_add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, made: Bytes | None = None
) -> None:
    """x += delta, then out = RMSNorm(x), and made is filled with it; either may be missing; the definition.

    x, delta and out [rows, size], each row contiguous; delta may be in parts [parts, rows, size], which are summed and
    rounded first; weight [size]. The root mean square is taken in fp32, and x over
    it is rounded before the weight is applied (`RMSNorm`).
    """
    if delta is not None:
        x += delta.sum(0).to(x.dtype) if delta.ndim > 2 else delta
    wide = x.float()
    normed = (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight
    if out is not None:
        out.copy_(normed)
    if made is not None:
        plain_make_bytes(normed, made)


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, made: Bytes | None = None
) -> None:
    """As `plain_add_norm`, one program a row."""
    rows, size = x.shape
    room, strides, n_bytes = byte_arguments(x, made)
    added = x[None] if delta is None else delta if delta.ndim > 2 else delta[None]
    target = x if out is None else out
    _add_norm[(rows,)](
        *(x, added, weight, target, *room),
        *(x.stride(0), added.stride(0), added.stride(1), target.stride(0), *strides),
        eps,
        size=size,
        has_out=out is not None,
        n_bytes=n_bytes,
        block=power_of_two(size),
        parts=0 if delta is None else len(added),
        num_warps=warps_of_row(rows, WARPS),
        **launch_options(x.device),
    )


@jit
def _add_norm(
    x: Tile,
    delta: Tile,
    weight: Tile,
    out: Tile,
    codes: Tile,
    code_scale: Tile,
    x_stride: Tile,
    part_stride: Tile,
    delta_stride: Tile,
    out_stride: Tile,
    codes_stride: Tile,
    half: Tile,
    eps: Tile,
    size: constexpr,
    has_out: constexpr,
    n_bytes: constexpr,
    block: constexpr,
    parts: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < size
    weights = tl.load(weight + columns, inside, other=0).to(tl.float32)
    if dependent:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + row * x_stride + columns, inside, other=0)
    dtype = values.dtype
    wide = values.to(tl.float32)
    if parts > 0:
        wide += load_parts(delta + row * delta_stride + columns, inside, part_stride, parts, dtype).to(tl.float32)
        values = wide.to(dtype)
        tl.store(x + row * x_stride + columns, values, inside)
        wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    normed = ((wide * scale).to(dtype).to(tl.float32) * weights).to(dtype)
    if has_out:
        tl.store(out + row * out_stride + columns, normed, inside)
    if n_bytes > 0:
        store_bytes(normed.to(tl.float32), codes + row * codes_stride, code_scale + row, half, columns, inside, n_bytes)
