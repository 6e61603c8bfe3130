"""Products of a few rows with a matrix in int8 or e4m3, which take as long as reading the matrix.

Rows lie side by side in x, each contiguous; codes [out, in] are contiguous. Sums are fp32. Up to four rows are
multiplied number by number, those of 16 bits by int8 in words of four codes (`byte_sums`); more on tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.byte_sums import sum_bytes, sum_columns_of_words, sum_words
from memphi.model.kernels.coded import (
    BLOCK_ROWS,
    Columns,
    add_columns,
    add_product,
    choose_parts,
    column_arguments,
    fetch_lines,
    fetches_of,
    load_block,
    load_columns,
    load_rows,
    load_scales,
    plain_add,
    store_tile,
    sum_columns,
    vector_rows,
    widen_columns,
)
from memphi.model.kernels.gate import outs_of, store_outs
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
from memphi.model.kernels.parts import room_for_parts
from memphi.model.kernels.rounding import (
    Bytes,
    make_bytes,
    room_in_e4m3,
    room_in_two_bytes,
    widened,
)

SUMS = 64
"""Sums that a thread keeps at most."""
BLOCK, BLOCK_OF_WORDS = (8, 1024, 4), (4, 1024, 2)
"""Outputs, inputs and warps of a program that sums number by number; and where it reads words: the best for most of the
decoder's matrices at one row on an H200."""
HEAD_BLOCK_OF_WORDS, HEAD_OUT = (4, 512, 1), 100_000
"""The best for a head, which has so many outputs."""
CODES_A_WORD = 4
COLUMNS_BLOCK = 64
"""Adapters' columns at once on tensor cores; in 32 bits half as many."""
APART_ROWS = 64
"""Up to so many rows adapters' columns are a part of their own, if there are not WIDE_OUT outputs, so that no other
waits for what makes t."""
WIDE_OUT = 8192
"""From so many outputs on, a program has twice as many of them where rows are many."""
MOST_ROWS = 256
"""To make a matrix of int8 16 bits again takes so long that it pays for more rows only (on an H200, where the kernel
takes a half of the time for 128 and three quarters for 256)."""
MOST_INPUTS = 2**17
"""Of bytes by bytes: the sums of more do not fit in 32 bits."""


def plain_multiply(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None = None) -> None:
    """out = scale * (x codes^T), and t B^T beside it; the definition.

    x [rows, in]; codes [out, in] int8 or e4m3; scale [out]; out [rows, out]. With e4m3 x is rounded to it too, row by
    row. What codes stand for is not rounded to x's dtype.
    """
    wide = x.float()
    if codes.dtype is torch.float8_e4m3fn:
        step = wide.abs().amax(1, keepdim=True).div(448).clamp(min=1e-30)
        wide = (x * step.reciprocal()).to(codes.dtype).float() * step
    y = wide @ codes.float().t() * scale.float()
    out.copy_(plain_add(y, columns))


def multiply(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    out: Tensor,
    columns: Columns | None = None,
    in_bytes: Bytes | None = None,
    gated: bool = False,
) -> Tensor:
    """As `plain_multiply`, in parts [parts, rows, out] that `sum_up` or somebody else sums: out alone, or not.

    in_bytes: x, where somebody has filled a `room_for_bytes` with it already. gated, for `vector_rows` at most: what
    comes of it goes through `gate`, and out is half as wide.
    """
    if len(x) <= vector_rows(x.device):
        _launch_vectors(x, codes, scale, out, columns, gated)
        return out[None]
    assert not gated, "more rows go through their gate by themselves"
    return _launch_tiles(x, codes, scale, out, columns, in_bytes)


def room_for_bytes(rows: int, codes: Tensor, like: Tensor) -> Bytes | None:
    """Room for so many x of like's dtype in bytes, where that is what they are multiplied in; None where it is not."""
    if rows <= vector_rows(like.device):  # In e4m3 they become so as they are multiplied, which takes less.
        return None
    if codes.dtype is torch.float8_e4m3fn:
        return room_in_e4m3(rows, codes.shape[1], like)
    is_exact = like.itemsize == 2 and codes.shape[1] <= MOST_INPUTS
    return room_in_two_bytes(rows, codes.shape[1], like) if is_exact else None


def _launch_vectors(x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None, gated: bool) -> None:
    rows, (n_out, n_in) = len(x), codes.shape
    in_words = codes.dtype is torch.int8 and _has_words(x, columns)
    block_out, block_in, warps = choose_block(rows, n_out, n_in, in_words)
    block_out = max(block_out, 2) if gated else block_out  # A gate stands beside what it lets through.
    is_e4m3 = codes.dtype is torch.float8_e4m3fn
    values = x.view(torch.int64) if in_words else x
    codes = codes.view(torch.int32 if in_words else torch.uint8 if is_e4m3 else torch.int8)
    added, places, ranks = column_arguments(x, _in_words(columns) if in_words else columns)
    _multiply_vectors[(-(-n_out // block_out),)](
        *(values, codes, scale, *added, out),
        *(values.stride(0), *places, out.stride(0), n_out),
        n_in=n_in,
        rows=rows,
        ranks=ranks,
        is_e4m3=is_e4m3,
        knows_e4m3=capability(x.device) >= E4M3_CAPABILITY,
        in_words=in_words,
        gated=gated,
        block_out=block_out,
        block_in=block_in,
        block_row=power_of_two(n_in),
        block_ranks=power_of_two(max(ranks, 1)),
        num_warps=warps,
        **launch_options(x.device),
    )


def _has_words(x: Tensor, columns: Columns | None) -> bool:
    """Whether four numbers of a row are a word of 64 bits, and four codes of columns one of 32, wherever they begin."""
    parts = [x, *(() if columns is None else (columns.codes, *columns.t))]
    sizes = [size for part in parts for size in (part.shape[1], part.stride(0), part.storage_offset())]
    return x.itemsize == 2 and not any(size % CODES_A_WORD for size in sizes)


def _in_words(columns: Columns | None) -> Columns | None:
    """Columns of words: four codes, and what makes four of t."""
    if columns is None:
        return None
    t = tuple(each.view(torch.int64) for each in columns.t)
    return Columns(columns.codes.view(torch.int32), columns.scale, t)


def _launch_tiles(
    x: Tensor, codes: Tensor, scale: Tensor, out: Tensor, columns: Columns | None, given: Bytes | None
) -> Tensor:
    rows, (n_out, n_in) = len(x), codes.shape
    is_e4m3 = codes.dtype is torch.float8_e4m3fn
    added, places, ranks = column_arguments(x, columns)
    block_out, block_in, stages, warps = choose_tile(rows, n_out, x.itemsize, capability(x.device), is_e4m3)
    made = given or room_for_bytes(rows, codes, x)
    if made is not None and made is not given:
        make_bytes(x, made)
    in_bytes = made is not None and (not is_e4m3 or capability(x.device) >= E4M3_CAPABILITY)
    values, steps = (x, scale) if made is None else (made.codes, made.scale)
    if is_e4m3 and not in_bytes:
        values, codes = values.view(torch.uint8), codes.view(torch.uint8)
    block_rows = block_of_rows(rows)
    blocks, row_blocks = -(-n_out // block_out), -(-rows // block_rows)
    share = share_of(n_in, block_in, choose_parts(blocks * row_blocks, n_in, x.device))
    # What was made just now is waited for; and copies of whole blocks alone are wide enough to pass over a cache.
    beside = made is given and ranks > 0 and n_in % block_in == 0
    apart = beside and rows <= APART_ROWS and n_out < WIDE_OUT
    found = room_for_parts(out, -(-n_in // share) + apart)
    _multiply_tiles[(row_blocks, blocks, len(found))](
        *(values, steps, codes, scale, *added, found),
        *(values.stride(-2), *places, found.stride(0), found.stride(1), n_out, rows, share),
        n_in=n_in,
        ranks=ranks,
        is_e4m3=is_e4m3,
        in_bytes=in_bytes,
        beside=beside,
        apart=apart,
        fetches=fetches_of(max(ranks, 1)),
        block_rows=block_rows,
        block_out=block_out,
        block_in=block_in,
        block_ranks=COLUMNS_BLOCK if out.itemsize <= 2 else COLUMNS_BLOCK // 2,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    return found


def choose_block(rows: int, n_out: int, n_in: int, in_words: bool) -> tuple[int, int, int]:
    """Outputs, inputs and warps of a program, so that no thread keeps more than SUMS for more than one row."""
    words = HEAD_BLOCK_OF_WORDS if n_out >= HEAD_OUT else BLOCK_OF_WORDS
    block_out, block_in, warps = words if in_words else BLOCK
    block_in = min(block_in, power_of_two(n_in))
    if in_words:  # A word has one sum of each row.
        return block_out, block_in, warps if rows <= 2 else 2 * warps
    return fit_block(rows, block_out, block_in, warps, SUMS)


def share_of(n_in: int, block_in: int, parts: int) -> int:
    """The inputs of each of so many parts, or of fewer: whole blocks."""
    return -(-n_in // (block_in * parts)) * block_in


def block_of_rows(rows: int) -> int:
    """Rows of a program on the tensor cores."""
    fewest, most = BLOCK_ROWS
    return min(max(power_of_two(rows), fewest), most)


def choose_tile(rows: int, n_out: int, itemsize: int, on: tuple[int, int], is_e4m3: bool) -> tuple[int, int, int, int]:
    """Outputs, inputs, stages and warps of a program on the tensor cores of a card of some compute capability.

    x has itemsize bytes a number. Where there is room, the best that were measured on an H200 at 16, 32 and 64 rows.
    """
    if on not in ROOMY_CAPABILITY:
        return (64, 128, 3, 4) if itemsize <= 2 else (64, 64, 2, 4)
    if itemsize > 2 and not is_e4m3:
        return (128, 64, 4, 8) if n_out >= WIDE_OUT and rows > BLOCK_ROWS[0] else (64, 64, 4, 4)
    if is_e4m3:
        return (64, 256, 3, 4) if rows <= 32 and n_out < WIDE_OUT else (64, 128, 5, 4)
    if rows <= 16:
        return 64, 256, 4, 4
    return (128, 128, 5, 8) if n_out >= WIDE_OUT else (64, 128, 4, 4)


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
    gap: Tile,
    out_stride: Tile,
    n_out: Tile,
    n_in: constexpr,
    rows: constexpr,
    ranks: constexpr,
    is_e4m3: constexpr,
    knows_e4m3: constexpr,
    in_words: constexpr,
    gated: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    block_row: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    places = tl.program_id(0) * block_out + tl.arange(0, block_out)
    outs, inside = outs_of(places, n_out, gated), places < n_out
    scales = tl.load(scale + outs, inside, other=0).to(tl.float32)
    if ranks > 0:
        columns = load_columns(b, b_stride, outs, inside, 0, ranks, block_ranks)
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
    lines = outs.to(tl.int64)[:, None]
    x0, x1, x2, x3 = x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride
    dtype = out.dtype.element_ty
    at_once: constexpr = dependent and ranks == 0
    cache: constexpr = ".cg" if ranks > 0 else ""
    if in_words:
        codes += lines * (n_in // 4)
        totals = sum_words(
            *(x0, x1, x2, x3, codes, inside, n_in // 4, rows),
            *(dtype, block_out, block_in // 4, at_once, cache),
        )
    else:
        totals = sum_bytes(
            *(x0, x1, x2, x3, codes + lines * n_in, inside, n_in, rows),
            *(is_e4m3, knows_e4m3, block_out, block_in, block_row, at_once, cache),
        )
    if dependent and ranks > 0:
        tl.extra.cuda.gdc_wait()  # What makes t ran beside this until here.
    if ranks > 0 and not in_words:
        wide_columns = widen_columns(columns, first_scales, last_scales, 0, border, block_ranks)
    for row in tl.static_range(rows):
        total = totals[row] * scales
        if ranks > 0 and in_words:
            total += sum_columns_of_words(
                columns,
                first_scales,
                last_scales,
                t + row * t_stride,
                border,
                gap,
                ranks,
                dtype,
                block_out,
                block_ranks,
            )
        elif ranks > 0:
            total += sum_columns(wide_columns, t + row * t_stride, border, gap, ranks, block_ranks)
        store_outs(out + row * out_stride, total.to(dtype), tl.program_id(0), n_out, gated, block_out)


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
    gap: Tile,
    part_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    rows: Tile,
    share: Tile,
    n_in: constexpr,
    ranks: constexpr,
    is_e4m3: constexpr,
    in_bytes: constexpr,
    beside: constexpr,
    apart: constexpr,
    fetches: constexpr,
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
    is_last = part == tl.num_programs(2) - 1
    if dependent and beside and is_last:
        fetch_lines(b, b_stride, outs, n_out, ranks, fetches)
    if apart and is_last:
        sums = tl.zeros([block_out, block_rows], tl.float32)
    else:
        sums = _sum_tiles(
            *(x, steps, codes, scale, x_stride, numbers, exists, outs, inside, part, rows, share),
            *(n_in, is_e4m3, in_bytes, beside, block_rows, block_out, block_in, dependent and not beside),
        )
    if ranks > 0 and is_last:
        if dependent and beside:
            tl.extra.cuda.gdc_wait()  # What makes t runs beside this until here, and beside all other parts.
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first_scales, last_scales, t, b_stride, t_stride, border, gap),
            *(outs, inside, numbers, exists, 0, ranks, block_ranks, ranks, block_ranks),
        )
    out += part.to(tl.int64) * part_stride
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


@jit
def _sum_tiles(
    x: Tile,
    steps: Tile,
    codes: Tile,
    scale: Tile,
    x_stride: Tile,
    numbers: Tile,
    exists: Tile,
    outs: Tile,
    inside: Tile,
    part: Tile,
    rows: Tile,
    share: Tile,
    n_in: constexpr,
    is_e4m3: constexpr,
    in_bytes: constexpr,
    beside: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    waits: constexpr,
) -> Tile:
    """The products of rows with outputs by a part of the inputs: [outs, rows]."""
    places = part * share + tl.arange(0, block_in)
    codes += outs.to(tl.int64)[:, None] * n_in
    c = load_block(codes, inside, places, n_in)
    scales = tl.load(scale + outs, inside, other=0).to(tl.float32)
    cache: constexpr = ".cg" if beside else ""
    if waits:
        tl.extra.cuda.gdc_wait()
    upper = tl.zeros([block_out, block_rows], tl.int32 if in_bytes and not is_e4m3 else tl.float32)
    lower, half = upper, rows * x_stride
    upper, lower = _add_codes(
        upper, lower, c, x, half, x_stride, numbers, exists, places, n_in, is_e4m3, in_bytes, cache
    )
    for start in range(block_in, tl.minimum(share, n_in - part * share), block_in):
        at = start + places
        c = load_block(codes, inside, at, n_in)
        upper, lower = _add_codes(
            upper, lower, c, x, half, x_stride, numbers, exists, at, n_in, is_e4m3, in_bytes, cache
        )
    sums = upper
    if in_bytes and not is_e4m3:
        sums = upper.to(tl.float32) * 256.0 + lower.to(tl.float32)
    sums *= scales[:, None]
    if in_bytes or is_e4m3:
        of_rows = tl.load(steps + numbers, exists, other=0) * (1.0 if in_bytes else 65536.0)
        sums *= of_rows[None, :]
    return sums


@jit
def _add_codes(
    upper: Tile,
    lower: Tile,
    c: Tile,
    x: Tile,
    half: Tile,
    x_stride: Tile,
    numbers: Tile,
    exists: Tile,
    places: Tile,
    n_in: constexpr,
    is_e4m3: constexpr,
    in_bytes: constexpr,
    cache: constexpr,
) -> Tile:
    """Sums, and the products of a block of codes with rows: as numbers of 16 or 32 bits, or byte by byte."""
    values = load_rows(x, x_stride, numbers, exists, places, places < n_in, cache)
    if is_e4m3 and in_bytes:
        upper = tl.dot(c, tl.trans(values), upper, max_num_imprecise_acc=128)
    elif in_bytes:
        upper = tl.dot(c, tl.trans(values), upper, out_dtype=tl.int32)
        values = load_rows(x + half, x_stride, numbers, exists, places, places < n_in, cache)
        lower = tl.dot(c, tl.trans(values), lower, out_dtype=tl.int32)
    elif is_e4m3:
        upper = add_product(widened(values, True), widened(c, True), upper)
    else:
        upper = add_product(values, c.to(values.dtype), upper)
    return upper, lower
