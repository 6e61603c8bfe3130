"""Products of a few rows with a matrix in int8 or e4m3, which take as long as reading the matrix.

Rows lie side by side in x, each contiguous; codes [out, in] are contiguous. Sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.coded import (
    BLOCK_ROWS,
    Columns,
    add_columns,
    add_product,
    choose_parts,
    column_arguments,
    load_block,
    load_columns,
    load_rows,
    load_scales,
    plain_add,
    room_for_parts,
    store_tile,
    sum_columns,
    sum_parts,
    widen_columns,
)
from memphi.model.kernels.launch import (
    E4M3_CAPABILITY,
    ROOMY_CAPABILITY,
    Tile,
    capability,
    constexpr,
    fit_block,
    jit,
    launch_options,
    power_of_two,
    tl,
)
from memphi.model.kernels.rounding import nearest, round_rows, row_step, wide_codes, widened

VECTOR_ROWS = 4
"""Up to so many rows products are summed number by number, beyond on tensor cores."""
SUMS = 64
"""Sums that a thread keeps at most."""
BLOCK = (4, 1024, 4)
"""Outputs, inputs and warps of a program that sums number by number."""
COLUMNS_BLOCK = 64
"""Adapters' columns at once on tensor cores; in 32 bits half as many."""
WIDE_OUT = 8192
"""From so many outputs on, a program has twice as many of them where rows are many."""
DEQUANTISED_BLOCK = 2048


def plain_multiply(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None = None) -> None:
    """out = scale * (x codes^T), and t B^T beside it; the definition.

    x [rows, in]; codes [out, in] int8 or e4m3; scale [out]; out [rows, out]. With e4m3 x is rounded to it too, row by
    row. What codes stand for is not rounded to x's dtype.
    """
    wide = x.float()
    if codes.dtype is torch.float8_e4m3fn:
        step = wide.abs().amax(1, keepdim=True).div(448).clamp(min=1e-30)
        wide = (x / step).to(codes.dtype).float() * step
    y = wide @ codes.float().t() * scale.float()
    out.copy_(plain_add(y, columns))


def multiply(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None = None) -> None:
    """As `plain_multiply`."""
    if len(x) <= VECTOR_ROWS:
        _launch_vectors(x, codes, scale, out, columns)
    else:
        _launch_tiles(x, codes, scale, out, columns)


def _launch_vectors(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None) -> None:
    rows, (n_out, n_in) = len(x), codes.shape
    block_out, block_in, warps = choose_block(rows, n_out, n_in)
    added, places, ranks = column_arguments(x, columns)
    is_e4m3 = codes.dtype is torch.float8_e4m3fn
    _multiply_vectors[(-(-n_out // block_out),)](
        *(x, codes.view(torch.uint8) if is_e4m3 else codes, scale, *added, out),
        *(x.stride(0), *places, out.stride(0), n_out),
        n_in=n_in,
        rows=rows,
        ranks=ranks,
        is_e4m3=is_e4m3,
        knows_e4m3=capability(x.device) >= E4M3_CAPABILITY,
        block_out=block_out,
        block_in=block_in,
        block_row=power_of_two(n_in),
        block_ranks=power_of_two(max(ranks, 1)),
        num_warps=warps,
        **launch_options(x.device),
    )


def _launch_tiles(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None) -> None:
    rows, (n_out, n_in) = len(x), codes.shape
    is_e4m3 = codes.dtype is torch.float8_e4m3fn
    added, places, ranks = column_arguments(x, columns)
    block_out, block_in, stages, warps = choose_tile(rows, n_out, x.itemsize, capability(x.device))
    steps = scale
    if is_e4m3:
        rounded, steps = torch.empty_like(x, dtype=codes.dtype), x.new_empty(rows, dtype=torch.float32)
        round_rows(x, rounded, steps)
        x, codes = rounded.view(torch.uint8), codes.view(torch.uint8)
    block_rows, blocks = block_of_rows(rows), -(-n_out // block_out)
    share = share_of(n_in, block_in, choose_parts(blocks, x.device))
    found = room_for_parts(out, -(-n_in // share))
    _multiply_tiles[(-(-rows // block_rows), blocks, len(found))](
        *(x, steps, codes, scale, *added, found),
        *(x.stride(0), *places, found.stride(0), found.stride(1), n_out, rows, share),
        n_in=n_in,
        ranks=ranks,
        is_e4m3=is_e4m3,
        block_rows=block_rows,
        block_out=block_out,
        block_in=block_in,
        block_ranks=COLUMNS_BLOCK if out.itemsize <= 2 else COLUMNS_BLOCK // 2,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    if len(found) > 1:
        sum_parts(found, out)


def choose_block(rows: int, n_out: int, n_in: int) -> tuple[int, int, int]:
    """Outputs, inputs and warps of a program, so that no thread keeps more than SUMS for more than one row."""
    block_out, block_in, warps = BLOCK
    block_in = min(block_in, power_of_two(n_in))
    return fit_block(rows, block_out, block_in, warps, SUMS)


def share_of(n_in: int, block_in: int, parts: int) -> int:
    """The inputs of each of so many parts, or of fewer: whole blocks."""
    return -(-n_in // (block_in * parts)) * block_in


def block_of_rows(rows: int) -> int:
    """Rows of a program on the tensor cores."""
    fewest, most = BLOCK_ROWS
    return min(max(power_of_two(rows), fewest), most)


def choose_tile(rows: int, n_out: int, itemsize: int, on: tuple[int, int]) -> tuple[int, int, int, int]:
    """Outputs, inputs, stages and warps of a program on the tensor cores of a card of some compute capability.

    x has itemsize bytes a number.
    """
    block_in = 128 if itemsize <= 2 else 64
    if on not in ROOMY_CAPABILITY:
        return 64, block_in, 3 if itemsize <= 2 else 2, 4
    if n_out >= WIDE_OUT and rows > BLOCK_ROWS[0]:
        return 128, block_in, 4, 8
    return 64, block_in, 4, 4


@jit
def _multiply_vectors(
    x: Tile,
    codes: Tile,
    scale: Tile,
    b: Tile,
    b_first: Tile,
    b_last: Tile,
    t: Tile,
    out: Tile,
    x_stride: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    out_stride: Tile,
    n_out: Tile,
    n_in: constexpr,
    rows: constexpr,
    ranks: constexpr,
    is_e4m3: constexpr,
    knows_e4m3: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    block_row: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    inside, places = outs < n_out, tl.arange(0, block_in)
    codes += outs.to(tl.int64)[:, None] * n_in
    c = load_block(codes, inside, places, n_in)
    scales = tl.load(scale + outs, inside, other=0).to(tl.float32)
    if ranks > 0:
        columns = load_columns(b, b_stride, outs, inside, 0, ranks, block_ranks)
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
    if dependent:
        tl.extra.cuda.gdc_wait()
    x0, x1, x2, x3 = x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride
    step0, step1, step2, step3 = 1.0, 1.0, 1.0, 1.0
    if is_e4m3:
        step0 = row_step(x0, n_in, block_row)
        if rows > 1:
            step1 = row_step(x1, n_in, block_row)
        if rows > 2:
            step2 = row_step(x2, n_in, block_row)
        if rows > 3:
            step3 = row_step(x3, n_in, block_row)
    sums0 = tl.zeros([block_out, block_in], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for start in tl.static_range(0, n_in, block_in):
        if start > 0:
            c = load_block(codes, inside, start + places, n_in)
        wide = wide_codes(c, is_e4m3, knows_e4m3)
        sums0 += wide * _load_x(x0, start + places, n_in, 1.0 / step0, is_e4m3)
        if rows > 1:
            sums1 += wide * _load_x(x1, start + places, n_in, 1.0 / step1, is_e4m3)
        if rows > 2:
            sums2 += wide * _load_x(x2, start + places, n_in, 1.0 / step2, is_e4m3)
        if rows > 3:
            sums3 += wide * _load_x(x3, start + places, n_in, 1.0 / step3, is_e4m3)
    if is_e4m3 and not knows_e4m3:
        scales *= 256.0
    totals = (tl.sum(sums0, 1), tl.sum(sums1, 1), tl.sum(sums2, 1), tl.sum(sums3, 1))
    steps = (step0, step1, step2, step3)
    if ranks > 0:
        wide_columns = widen_columns(columns, first_scales, last_scales, 0, border, block_ranks)
    for row in tl.static_range(rows):
        total = totals[row] * scales
        if is_e4m3:
            total *= steps[row]
        if ranks > 0:
            total += sum_columns(wide_columns, t + row * t_stride, ranks, block_ranks)
        tl.store(out + row * out_stride + outs, total.to(out.dtype.element_ty), inside)


@jit
def _load_x(x: Tile, places: Tile, n_in: constexpr, of_step: Tile, is_e4m3: constexpr) -> Tile:
    values = tl.load(x + places, places < n_in, other=0).to(tl.float32)
    if is_e4m3:
        values = nearest(values * of_step)
    return values[None, :]


@jit
def _multiply_tiles(
    x: Tile,
    steps: Tile,
    codes: Tile,
    scale: Tile,
    b: Tile,
    b_first: Tile,
    b_last: Tile,
    t: Tile,
    out: Tile,
    x_stride: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    part_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    rows: Tile,
    share: Tile,
    n_in: constexpr,
    ranks: constexpr,
    is_e4m3: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    numbers = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    outs = tl.program_id(1) * block_out + tl.arange(0, block_out)
    part, inside, exists = tl.program_id(2), outs < n_out, numbers < rows
    places = part * share + tl.arange(0, block_in)
    dtype = tl.float16 if is_e4m3 else x.dtype.element_ty
    codes += outs.to(tl.int64)[:, None] * n_in
    c = load_block(codes, inside, places, n_in)
    scales = tl.load(scale + outs, inside, other=0).to(tl.float32)
    if dependent:
        tl.extra.cuda.gdc_wait()
    values = load_rows(x, x_stride, numbers, exists, places, places < n_in)
    sums = tl.zeros([block_out, block_rows], tl.float32)
    sums = add_product(widened(values, is_e4m3), widened(c, is_e4m3).to(dtype), sums)
    for start in range(block_in, tl.minimum(share, n_in - part * share), block_in):
        c = load_block(codes, inside, start + places, n_in)
        values = load_rows(x, x_stride, numbers, exists, start + places, start + places < n_in)
        sums = add_product(widened(values, is_e4m3), widened(c, is_e4m3).to(dtype), sums)
    sums *= scales[:, None]
    if is_e4m3:
        of_rows = tl.load(steps + numbers, exists, other=0) * 65536.0
        sums *= of_rows[None, :]
    if ranks > 0 and part == 0:
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first_scales, last_scales, t, b_stride, t_stride, border),
            *(outs, inside, numbers, exists, ranks, block_ranks),
        )
    out += part.to(tl.int64) * part_stride
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


def plain_dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale, rounded once, [outs, in]: codes [outs, in] int8, scale [outs]; the definition."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scale.float()[:, None], out=out)


def dequantise(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `plain_dequantise`, into out [outs, in] contiguous."""
    n_out, n_in = codes.shape
    _dequantise[(n_out, -(-n_in // DEQUANTISED_BLOCK))](
        *(codes, scale, out), n_in=n_in, block=DEQUANTISED_BLOCK, num_warps=4, **launch_options(out.device)
    )


@jit
def _dequantise(codes: Tile, scale: Tile, out: Tile, n_in: constexpr, block: constexpr, dependent: constexpr) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row, places = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    c = tl.load(codes + row * n_in + places, places < n_in, other=0, eviction_policy="evict_first")
    wide = c.to(tl.float32) * tl.load(scale + row).to(tl.float32)
    if dependent:
        tl.extra.cuda.gdc_wait()  # What was here before may be in use until then.
    tl.store(out + row * n_in + places, wide.to(out.dtype.element_ty), places < n_in)


def look_up(codes: Tensor, scale: Tensor, ids: Tensor, out: Tensor) -> None:
    """out = the rows of these ids, as `dequantise` has them: ids [rows], out [rows, in]; not launched dependently."""
    n_in = codes.shape[1]
    _look_up[(len(ids), -(-n_in // DEQUANTISED_BLOCK))](
        *(codes, scale, ids, out, out.stride(0)), n_in=n_in, block=DEQUANTISED_BLOCK, num_warps=4
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
