"""Products of a few rows with a matrix in int4, which take as long as reading the matrix.

In a word of four bytes stand eight inputs, an eighth of a group apart, so that a block of words needs eight stretches
of x. Rows lie side by side in x, each contiguous; codes and what they mean are contiguous. Sums are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.coded import (
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
    widen_columns,
)
from memphi.model.kernels.eight_bits import COLUMNS_BLOCK, WIDE_OUT, block_of_rows, share_of
from memphi.model.kernels.launch import (
    ROOMY_CAPABILITY,
    Tile,
    capability,
    constexpr,
    is_interpreted,
    jit,
    launch_options,
    multiprocessors,
    power_of_two,
    tl,
)
from memphi.model.kernels.rounding import split_groups

VECTOR_ROWS = 4
"""Up to so many rows products are summed number by number, beyond on tensor cores."""
SUMS = 16
"""Sums that a thread keeps at most, of words."""
BLOCK = (4, 128, 1)
"""Outputs, words of eight inputs, and warps of a program that sums number by number."""
FEW_ROWS, LEAST_GROUPS = 32, 6
"""Up to so many rows on tensor cores, programs are many; the fewest groups of one of them then."""
DEQUANTISED_BLOCK = 512
"""Words that a program makes 16 bits again."""


def plain_multiply(x: Tensor, codes: Tensor, affine: Tensor, out: Tensor, columns: Columns | None = None) -> None:
    """out = x W^T, and t B^T beside it, where w = (code - 8) * scale + shift; the definition.

    x [rows, in]; codes [out, groups, group / 2] uint8; affine [out, groups, 2] bf16, scale and shift; out [rows, out].
    What codes stand for is not rounded to x's dtype.
    """
    words = codes.view(torch.int32)
    numbers = torch.cat([words >> 4 * part & 15 for part in range(8)], -1).float() - 8
    w = (numbers * affine[..., :1].float() + affine[..., 1:].float()).flatten(1)[:, : x.shape[1]]
    y = x.float() @ w.t()
    out.copy_(plain_add(y, columns))


def multiply(x: Tensor, codes: Tensor, affine: Tensor, out: Tensor, columns: Columns | None = None) -> Tensor:
    """As `plain_multiply`, in parts [parts, rows, out] that `sum_up` or somebody else sums: out alone, or not."""
    words = codes.view(torch.int32)
    rows, (n_out, groups, part) = len(x), words.shape
    added, places, ranks = column_arguments(x, columns)
    tensors = (x, words, affine.view(torch.int32), *added, out)
    strides = (x.stride(0), *places, out.stride(0))
    sizes = {"n_in": x.shape[1], "n_words": groups * part, "part": part, "ranks": ranks}
    if rows <= VECTOR_ROWS:
        block_out, block_words, warps = choose_block(rows, groups * part)
        _multiply_vectors[(-(-n_out // block_out),)](
            *(*tensors, *strides, n_out),
            **sizes,
            rows=rows,
            block_out=block_out,
            block_words=block_words,
            block_ranks=power_of_two(max(ranks, 1)),
            num_warps=warps,
            **launch_options(x.device),
        )
        return out[None]
    return (_launch_groups if x.itemsize == 2 else _launch_tiles)(x, words, affine, out, columns)


def _launch_tiles(x: Tensor, words: Tensor, affine: Tensor, out: Tensor, columns: Columns | None) -> Tensor:
    """In fp32."""
    rows, (n_out, groups, part) = len(x), words.shape
    added, places, ranks = column_arguments(x, columns)
    block_out, block_words, stages, warps = choose_tile(rows, capability(x.device))
    block_rows, blocks = block_of_rows(rows), -(-n_out // block_out)
    share = share_of(groups * part, block_words, choose_parts(blocks, x.device))
    found = room_for_parts(out, -(-groups * part // share))
    _multiply_tiles[(-(-rows // block_rows), blocks, len(found))](
        *(x, words, affine.view(torch.int32), *added, found),
        *(x.stride(0), *places, found.stride(0), found.stride(1), n_out, rows, share),
        n_in=x.shape[1],
        n_words=groups * part,
        part=part,
        ranks=ranks,
        block_rows=block_rows,
        block_out=block_out,
        block_words=block_words,
        block_ranks=COLUMNS_BLOCK // 2,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    return found


def _launch_groups(x: Tensor, words: Tensor, affine: Tensor, out: Tensor, columns: Columns | None) -> Tensor:
    """In 16 bits, byte by byte."""
    rows, (n_out, groups, part) = len(x), words.shape
    added, places, ranks = column_arguments(x, columns)
    halves, steps = x.new_empty((2, rows, 8 * groups * part), dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    of_groups = x.new_empty((rows, groups), dtype=torch.float32)
    split_groups(x, halves, steps, of_groups)
    block_out, stages, warps = choose_group_tile(rows, n_out, capability(x.device))
    block_rows, blocks = block_of_rows(rows), -(-n_out // block_out)
    share = share_of(groups, 1, choose_group_parts(rows, blocks, groups, x.device))
    found = room_for_parts(out, -(-groups // share))
    _multiply_groups[(-(-rows // block_rows), blocks, len(found))](
        *(halves, of_groups, steps, words.view(torch.int8), affine.view(torch.int32), *added, found),
        *(*places, found.stride(0), found.stride(1), n_out, rows, share),
        groups=groups,
        part=part,
        ranks=ranks,
        block_rows=block_rows,
        block_out=block_out,
        block_ranks=COLUMNS_BLOCK,
        in_assembler=not is_interpreted(),
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    return found


def choose_block(rows: int, n_words: int) -> tuple[int, int, int]:
    """Outputs, words and warps of a program, so that no thread keeps more than SUMS for more than one row."""
    block_out, block_words, warps = BLOCK
    block_words = min(block_words, power_of_two(n_words))
    while rows > 1 and rows * block_out * block_words > SUMS * 32 * warps:
        if block_out > 1:
            block_out //= 2
        else:
            block_words //= 2
    return block_out, block_words, warps


def choose_tile(rows: int, on: tuple[int, int]) -> tuple[int, int, int, int]:
    """Outputs, words, stages and warps of a program in fp32 on the tensor cores of a card of some capability."""
    few = block_of_rows(rows) <= 16
    if on in ROOMY_CAPABILITY:
        return 64, 32 if few else 16, 3, 4
    return 64, 16, 3 if few else 2, 4


def choose_group_tile(rows: int, n_out: int, on: tuple[int, int]) -> tuple[int, int, int]:
    """Outputs, stages and warps of such a program in 16 bits, which takes a group of inputs at once.

    Where there is room, the best that were measured on an H200 at 16 and at 64 rows.
    """
    if on not in ROOMY_CAPABILITY:
        return 32, 3, 4
    if rows <= FEW_ROWS:
        return 128, 3, 4
    return (128, 4, 8) if n_out >= WIDE_OUT else (64, 3, 4)


def choose_group_parts(rows: int, blocks: int, groups: int, device: torch.device) -> int:
    """Into how many parts groups are divided: a program takes one after another, and of few rows most of its time is
    waiting, so that a card wants several of them side by side."""
    if rows > FEW_ROWS:
        return choose_parts(blocks, device)
    return max(1, min(groups // LEAST_GROUPS, -(-7 * multiprocessors(device) // (2 * blocks))))


@jit
def _multiply_vectors(
    x: Tile,
    words: Tile,
    affine: Tile,
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
    n_words: constexpr,
    part: constexpr,
    ranks: constexpr,
    rows: constexpr,
    block_out: constexpr,
    block_words: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    """Scale and shift wait until the codes of a group are summed: a code costs a mask and a sum."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    outs, numbers = tl.program_id(0) * block_out + tl.arange(0, block_out), tl.arange(0, block_words)
    inside = outs < n_out
    words += outs.to(tl.int64)[:, None] * n_words
    affine += outs.to(tl.int64)[:, None] * (n_words // part)
    w = load_block(words, inside, numbers, n_words)
    lines = _load_lines(affine, inside, 0, n_words, part, block_words)
    if ranks > 0:
        columns = load_columns(b, b_stride, outs, inside, 0, ranks, block_ranks)
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
    if dependent:
        tl.extra.cuda.gdc_wait()
    x0, x1, x2, x3 = x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride
    sums0 = tl.zeros([block_out, block_words // part], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    if rows == 1:
        for start in tl.static_range(0, n_words, block_words):
            if start > 0:
                w = load_block(words, inside, start + numbers, n_words)
                lines = _load_lines(affine, inside, start, n_words, part, block_words)
            first = _first_inputs(start + numbers, part)
            sums0 += _sum_groups(w, lines, x0 + first, first, n_in, part)
    else:
        # Unrolled, this is so long that a compiler needs a quarter of a minute for it.
        for start in range(0, n_words, block_words):
            first = _first_inputs(start + numbers, part)
            sums0 += _sum_groups(w, lines, x0 + first, first, n_in, part)
            sums1 += _sum_groups(w, lines, x1 + first, first, n_in, part)
            if rows > 2:
                sums2 += _sum_groups(w, lines, x2 + first, first, n_in, part)
            if rows > 3:
                sums3 += _sum_groups(w, lines, x3 + first, first, n_in, part)
            w = load_block(words, inside, start + block_words + numbers, n_words)
            lines = _load_lines(affine, inside, start + block_words, n_words, part, block_words)
    totals = (tl.sum(sums0, 1), tl.sum(sums1, 1), tl.sum(sums2, 1), tl.sum(sums3, 1))
    if ranks > 0:
        wide = widen_columns(columns, first_scales, last_scales, 0, border, block_ranks)
    for row in tl.static_range(rows):
        total = totals[row]
        if ranks > 0:
            total += sum_columns(wide, t + row * t_stride, border, gap, ranks, block_ranks)
        tl.store(out + row * out_stride + outs, total.to(out.dtype.element_ty), inside)


@jit
def _sum_groups(words: Tile, lines: Tile, x: Tile, first: Tile, n_in: constexpr, part: constexpr) -> Tile:
    """What each group of a block of words adds to a row: [outs, groups].

    Codes are not made numbers: as they stand in their word, they are the digits of a fp32 so small that it has no
    exponent, 2**-149 for each 1; x is made as much larger as it bears, and what is found the rest.
    """
    found = tl.zeros(words.shape, tl.float32)
    added = tl.zeros([words.shape[1]], tl.float32)
    for number in tl.static_range(8):
        value = tl.load(x + number * part, first + number * part < n_in, other=0).to(tl.float32)
        larger = value * (18446744073709551616.0 / (1 << (4 * (number % 4))))
        found += _digits(words, number).to(tl.float32, bitcast=True) * larger[None, :]
        added += value
    groups: constexpr = words.shape[1] // part
    found = tl.sum(tl.reshape(found, [words.shape[0], groups, part]), 2) * 38685626227668133590597632.0
    added = tl.sum(tl.reshape(added, [groups, part]), 1)
    return found * _scale(lines) + added[None, :] * _shift(lines)


@jit
def _load_lines(
    affine: Tile, inside: Tile, start: Tile, n_words: constexpr, part: constexpr, block_words: constexpr
) -> Tile:
    """Scale and shift, in 32 bits, of each group of a block of words."""
    groups = start // part + tl.arange(0, block_words // part)
    exists = inside[:, None] & (groups < n_words // part)[None, :]
    return tl.load(affine + groups[None, :], exists, other=0)


@jit
def _scale(lines: Tile) -> Tile:
    return (lines << 16).to(tl.float32, bitcast=True)


@jit
def _shift(lines: Tile) -> Tile:
    """What a code of 0 stands for."""
    return ((lines >> 16) << 16).to(tl.float32, bitcast=True) - 8.0 * _scale(lines)


@jit
def _first_inputs(numbers: Tile, part: constexpr) -> Tile:
    """The first of the inputs of each word; the others follow a part of a group apart."""
    return (numbers // part) * (8 * part) + numbers % part


@jit
def _digits(words: Tile, number: constexpr) -> Tile:
    """One code of each word, times 16 for each code before it in its half."""
    half = words >> 16 if number >= 4 else words
    return half & (15 << (4 * (number % 4)))


@jit
def _meant(words: Tile, scale: Tile, shift: Tile, number: constexpr) -> Tile:
    """What one code of each word stands for."""
    return _digits(words, number).to(tl.float32) * (scale * (1.0 / (1 << (4 * (number % 4))))) + shift


@jit
def _multiply_tiles(
    x: Tile,
    words: Tile,
    affine: Tile,
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
    n_words: constexpr,
    part: constexpr,
    ranks: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_words: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    numbers = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    outs = tl.program_id(1) * block_out + tl.arange(0, block_out)
    own, inside, exists = tl.program_id(2), outs < n_out, numbers < rows
    begin = own * share
    places = begin + tl.arange(0, block_words)
    words += outs.to(tl.int64)[:, None] * n_words
    affine += outs.to(tl.int64)[:, None] * (n_words // part)
    w = load_block(words, inside, places, n_words)
    lines = _load_lines(affine, inside, begin, n_words, part, block_words)
    if dependent:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([block_out, block_rows], tl.float32)
    sums = _add_words(sums, w, lines, x, x_stride, numbers, exists, _first_inputs(places, part), n_in, part)
    for start in range(block_words, tl.minimum(share, n_words - begin), block_words):
        w = load_block(words, inside, start + places, n_words)
        lines = _load_lines(affine, inside, begin + start, n_words, part, block_words)
        first = _first_inputs(start + places, part)
        sums = _add_words(sums, w, lines, x, x_stride, numbers, exists, first, n_in, part)
    if ranks > 0 and own == 0:
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first_scales, last_scales, t, b_stride, t_stride, border, gap),
            *(outs, inside, numbers, exists, ranks, block_ranks),
        )
    out += own.to(tl.int64) * part_stride
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


@jit
def _multiply_groups(
    x: Tile,
    of_groups: Tile,
    steps: Tile,
    codes: Tile,
    affine: Tile,
    b: Tile,
    b_first: Tile,
    b_last: Tile,
    t: Tile,
    out: Tile,
    b_stride: Tile,
    t_stride: Tile,
    border: Tile,
    gap: Tile,
    part_stride: Tile,
    out_stride: Tile,
    n_out: Tile,
    rows: Tile,
    share: Tile,
    groups: constexpr,
    part: constexpr,
    ranks: constexpr,
    block_rows: constexpr,
    block_out: constexpr,
    block_ranks: constexpr,
    in_assembler: constexpr,
    dependent: constexpr,
) -> None:
    """Rows in bytes as `split_groups` makes them; scale and shift wait until the products of a group are summed."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    numbers = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    outs = tl.program_id(1) * block_out + tl.arange(0, block_out)
    own, inside, exists = tl.program_id(2), outs < n_out, numbers < rows
    first, end = own * share, tl.minimum(groups, own * share + share)
    codes += outs.to(tl.int64)[:, None] * (4 * groups * part)
    affine += outs.to(tl.int64) * groups
    of_groups += numbers * groups
    places = tl.arange(0, 4 * part)
    pairs = load_block(codes, inside, first * (4 * part) + places, 4 * groups * part)
    line = tl.load(affine + first, inside, other=0)
    if dependent:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([block_out, block_rows], tl.float32)
    sums = _add_group(sums, pairs, line, x, of_groups, first, numbers, exists, rows, groups, part, in_assembler)
    for group in range(first + 1, end):
        pairs = load_block(codes, inside, group * (4 * part) + places, 4 * groups * part)
        line = tl.load(affine + group, inside, other=0)
        sums = _add_group(sums, pairs, line, x, of_groups, group, numbers, exists, rows, groups, part, in_assembler)
    sums *= tl.load(steps + numbers, exists, other=0)[None, :]
    if ranks > 0 and own == 0:
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first_scales, last_scales, t, b_stride, t_stride, border, gap),
            *(outs, inside, numbers, exists, ranks, block_ranks),
        )
    out += own.to(tl.int64) * part_stride
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


@jit
def _add_group(
    sums: Tile,
    pairs: Tile,
    line: Tile,
    x: Tile,
    of_groups: Tile,
    group: Tile,
    numbers: Tile,
    exists: Tile,
    rows: Tile,
    groups: constexpr,
    part: constexpr,
    in_assembler: constexpr,
) -> Tile:
    """sums, and the products of a group, of whose codes two are a byte."""
    width: constexpr = 8 * groups * part
    even, odd = _codes(pairs, False, in_assembler), _codes(pairs, True, in_assembler)
    places = group * (8 * part) + tl.arange(0, 4 * part)
    there, lines = exists[:, None] & (places < width)[None, :], numbers.to(tl.int64)[:, None] * width + places[None, :]
    upper = tl.dot(even, tl.trans(tl.load(x + lines, there, other=0)), out_dtype=tl.int32)
    upper = tl.dot(odd, tl.trans(tl.load(x + lines + 4 * part, there, other=0)), upper, out_dtype=tl.int32)
    lines += rows.to(tl.int64) * width
    lower = tl.dot(even, tl.trans(tl.load(x + lines, there, other=0)), out_dtype=tl.int32)
    lower = tl.dot(odd, tl.trans(tl.load(x + lines + 4 * part, there, other=0)), lower, out_dtype=tl.int32)
    found = (upper * 256 + lower).to(tl.float32)  # Of 128 inputs it fits in 32 bits.
    of_group = tl.load(of_groups + group, exists, other=0)
    return sums + found * _scale(line)[:, None] + _shift(line)[:, None] * of_group[None, :]


@jit
def _codes(pairs: Tile, upper: constexpr, in_assembler: constexpr) -> Tile:
    """The lower or the upper code of each byte, 0 to 15; four at once, which a compiler does not see."""
    if not in_assembler:
        return (pairs >> 4 if upper else pairs) & 15
    if upper:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 moved; shr.u32 moved, $1, 4; and.b32 $0, moved, 0x0F0F0F0F; }",
            *("=r,r", [pairs], tl.int8, True, 4),
        )
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [pairs], tl.int8, True, 4)


@jit
def _add_words(
    sums: Tile,
    words: Tile,
    lines: Tile,
    x: Tile,
    x_stride: Tile,
    numbers: Tile,
    exists: Tile,
    first: Tile,
    n_in: constexpr,
    part: constexpr,
) -> Tile:
    """sums, and the products of a block of words, a code of each after another."""
    scale, shift = _spread(_scale(lines), words.shape, part), _spread(_shift(lines), words.shape, part)
    for number in tl.static_range(8):
        places = first + number * part
        values = load_rows(x, x_stride, numbers, exists, places, places < n_in)
        weights = _meant(words, scale, shift, number).to(values.dtype)
        sums = add_product(values, weights, sums)
    return sums


@jit
def _spread(of_groups: Tile, shape: constexpr, part: constexpr) -> Tile:
    """What is of each group, for each of its words: [outs, groups] -> [outs, words]."""
    return tl.reshape(tl.broadcast_to(of_groups[:, :, None], [shape[0], shape[1] // part, part]), shape)


def dequantise(codes: Tensor, affine: Tensor, out: Tensor) -> None:
    """out = what codes stand for, rounded once: codes and affine of some outputs, out [outs, in].

    Rows of out may lie apart.
    """
    words = codes.view(torch.int32)
    n_out, groups, part = words.shape
    _dequantise[(n_out, -(-groups * part // DEQUANTISED_BLOCK))](
        *(words, affine.view(torch.int32), out, out.stride(0)),
        n_in=out.shape[1],
        n_words=groups * part,
        part=part,
        block=DEQUANTISED_BLOCK,
        num_warps=4,
        **launch_options(out.device),
    )


@jit
def _dequantise(
    words: Tile,
    affine: Tile,
    out: Tile,
    out_stride: Tile,
    n_in: constexpr,
    n_words: constexpr,
    part: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row, numbers = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = numbers < n_words
    w = tl.load(words + row * n_words + numbers, inside, other=0, eviction_policy="evict_first")
    lines = tl.load(affine + row * (n_words // part) + numbers // part, inside, other=0)
    if dependent:
        tl.extra.cuda.gdc_wait()  # What was here before may be in use until then.
    scale, shift, first = _scale(lines), _shift(lines), _first_inputs(numbers, part)
    for number in tl.static_range(8):
        places = first + number * part
        wide = _meant(w, scale, shift, number)
        tl.store(out + row * out_stride + places, wide.to(out.dtype.element_ty), inside & (places < n_in))
