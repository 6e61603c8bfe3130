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
    column_arguments,
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
from memphi.model.kernels.eight_bits import COLUMNS_BLOCK, WIDE_OUT, share_of
from memphi.model.kernels.gate import outs_of, store_outs
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
from memphi.model.kernels.parts import room_for_parts

SUMS = 16
"""Sums that a thread keeps at most, of words."""
BLOCK, WIDE_BLOCK = (8, 512, 4), (8, 128, 1)
"""Outputs, words of eight inputs, and warps of a program that sums number by number; and where there are WIDE_OUT
outputs and nothing beside them. The best that were measured on an H200 at one row."""
BLOCK_ROWS = 8, 64
"""The fewest and the most rows that one program has on tensor cores."""
DEQUANTISED_BLOCK = 512
"""Words that a program makes 16 bits again."""


def _widening(base: int) -> str:
    """How a card makes two words side by side eight pairs of 16 bits: each code as the last digits of a float that
    counts in ones there, so that it is that float and the code, which a compiler does not see."""
    shifted = [
        f"shr.u32 moved, {half}, {4 * number}; lop3.b32 ${place}, moved, 0x000F000F, 0x{base:04X}{base:04X}, 0xEA;"
        for place, (half, number) in enumerate((half, number) for half in ("lower", "upper") for number in range(4))
    ]
    halves = "prmt.b32 lower, $8, $9, 0x5410; prmt.b32 upper, $8, $9, 0x7632;"
    return "{ .reg .b32 lower, upper, moved; " + halves + " ".join(shifted) + " }"


WIDENING = {torch.bfloat16: (_widening(0x4300), 128.0), torch.float16: (_widening(0x6400), 1024.0)}
"""For each dtype, and the float that counts in ones: where its step is one."""


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


def multiply(
    x: Tensor, codes: Tensor, affine: Tensor, out: Tensor, columns: Columns | None = None, gated: bool = False
) -> Tensor:
    """As `plain_multiply`, in parts [parts, rows, out] that `sum_up` or somebody else sums: out alone, or not.

    gated, for `vector_rows` at most: what comes of it goes through `gate`, and out is half as wide.
    """
    words = codes.view(torch.int32)
    if len(x) <= vector_rows(x.device):
        _launch_vectors(x, words, affine, out, columns, gated)
        return out[None]
    assert not gated, "more rows go through their gate by themselves"
    return _launch_tiles(x, words, affine, out, columns)


def _launch_vectors(
    x: Tensor, words: Tensor, affine: Tensor, out: Tensor, columns: Columns | None, gated: bool
) -> None:
    """Number by number."""
    rows, (n_out, groups, part) = len(x), words.shape
    added, places, ranks = column_arguments(x, columns)
    block_out, block_words, warps = choose_block(rows, n_out, groups * part, ranks)
    block_out = max(block_out, 2) if gated else block_out  # A gate stands beside what it lets through.
    _multiply_vectors[(-(-n_out // block_out),)](
        *(x, words, affine.view(torch.int32), *added, out),
        *(x.stride(0), *places, out.stride(0), n_out),
        n_in=x.shape[1],
        n_words=groups * part,
        part=part,
        ranks=ranks,
        rows=rows,
        gated=gated,
        block_out=block_out,
        block_words=block_words,
        block_ranks=power_of_two(max(ranks, 1)),
        num_warps=warps,
        **launch_options(x.device),
    )


def _launch_tiles(x: Tensor, words: Tensor, affine: Tensor, out: Tensor, columns: Columns | None) -> Tensor:
    """On tensor cores."""
    rows, (n_out, groups, part) = len(x), words.shape
    added, places, ranks = column_arguments(x, columns)
    block_out, block_words, stages, warps = choose_tile(rows, x.itemsize, capability(x.device))
    fewest, most = BLOCK_ROWS
    block_rows = max(min(power_of_two(rows), most), fewest)
    row_blocks, blocks = -(-rows // block_rows), -(-n_out // block_out)
    share = share_of(groups * part, block_words, choose_parts(blocks * row_blocks, x.device))
    found = room_for_parts(out, -(-groups * part // share))
    assembler, counting = ("", 0.0) if is_interpreted() else WIDENING.get(x.dtype, ("", 0.0))
    _multiply_tiles[(row_blocks, blocks, len(found))](
        *(x, words, affine.view(torch.int32), *added, found),
        *(x.stride(0), *places, found.stride(0), found.stride(1), n_out, rows, share),
        n_in=x.shape[1],
        n_words=groups * part,
        part=part,
        ranks=ranks,
        block_rows=block_rows,
        block_out=block_out,
        block_words=block_words,
        block_ranks=COLUMNS_BLOCK if x.itemsize == 2 else COLUMNS_BLOCK // 2,
        is_whole=bool(assembler) and x.shape[1] == 8 * groups * part and groups * part % share == 0,
        assembler=assembler,
        counting=counting,
        num_warps=warps,
        num_stages=stages,
        **launch_options(x.device),
    )
    return found


def choose_block(rows: int, n_out: int, n_words: int, ranks: int) -> tuple[int, int, int]:
    """Outputs, words and warps of a program, so that no thread keeps more than SUMS for more than one row."""
    block_out, block_words, warps = WIDE_BLOCK if n_out >= WIDE_OUT and not ranks else BLOCK
    block_words = min(block_words, power_of_two(n_words))
    while rows > 1 and rows * block_out * block_words > SUMS * 32 * warps:
        if block_out > 1:
            block_out //= 2
        else:
            block_words //= 2
    return block_out, block_words, warps


def choose_tile(rows: int, itemsize: int, on: tuple[int, int]) -> tuple[int, int, int, int]:
    """Outputs, words, stages and warps of a program on the tensor cores of a card of some capability."""
    if itemsize == 2 and on in ROOMY_CAPABILITY:  # The best that were measured on an H200 at 4, 32 and 64 rows.
        return (128, 64, 2, 8) if rows <= 32 else (128, 32, 3, 8)
    if itemsize == 2:
        return 64, 16, 3, 4
    few = rows <= 16
    if on in ROOMY_CAPABILITY:
        return 64, 32 if few else 16, 3, 4
    return 64, 16, 3 if few else 2, 4


def choose_parts(blocks: int, device: torch.device) -> int:
    """Into how many parts inputs are divided: a multiprocessor has room for one program of these."""
    return max(multiprocessors(device) // blocks, 1)


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
    gated: constexpr,
    block_out: constexpr,
    block_words: constexpr,
    block_ranks: constexpr,
    dependent: constexpr,
) -> None:
    """Scale and shift wait until the codes of a group are summed: a code costs a mask and a sum."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    places, numbers = tl.program_id(0) * block_out + tl.arange(0, block_out), tl.arange(0, block_words)
    outs, inside = outs_of(places, n_out, gated), places < n_out
    words += outs.to(tl.int64)[:, None] * n_words
    affine += outs.to(tl.int64)[:, None] * (n_words // part)
    w = load_block(words, inside, numbers, n_words)
    lines = _load_lines(affine, inside, 0, n_words, part, block_words)
    if ranks > 0:
        columns = load_columns(b, b_stride, outs, inside, 0, ranks, block_ranks)
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
    if dependent and ranks == 0:
        tl.extra.cuda.gdc_wait()
    cache: constexpr = ".cg" if ranks > 0 else ""
    x0, x1, x2, x3 = x, x + x_stride, x + 2 * x_stride, x + 3 * x_stride
    sums0 = tl.zeros([block_out, block_words // part], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    if rows == 1:
        for start in tl.static_range(0, n_words, block_words):
            if start > 0:
                w = load_block(words, inside, start + numbers, n_words)
                lines = _load_lines(affine, inside, start, n_words, part, block_words)
            first = _first_inputs(start + numbers, part)
            sums0 += _sum_groups(w, lines, x0 + first, first, n_in, part, cache)
    else:
        # Unrolled, this is so long that a compiler needs a quarter of a minute for it.
        for start in range(0, n_words, block_words):
            first = _first_inputs(start + numbers, part)
            sums0 += _sum_groups(w, lines, x0 + first, first, n_in, part, cache)
            sums1 += _sum_groups(w, lines, x1 + first, first, n_in, part, cache)
            if rows > 2:
                sums2 += _sum_groups(w, lines, x2 + first, first, n_in, part, cache)
            if rows > 3:
                sums3 += _sum_groups(w, lines, x3 + first, first, n_in, part, cache)
            w = load_block(words, inside, start + block_words + numbers, n_words)
            lines = _load_lines(affine, inside, start + block_words, n_words, part, block_words)
    totals = (tl.sum(sums0, 1), tl.sum(sums1, 1), tl.sum(sums2, 1), tl.sum(sums3, 1))
    if ranks > 0:
        wide = widen_columns(columns, first_scales, last_scales, 0, border, block_ranks)
        if dependent:
            tl.extra.cuda.gdc_wait()  # What makes t ran beside this until here.
    for row in tl.static_range(rows):
        total = totals[row]
        if ranks > 0:
            total += sum_columns(wide, t + row * t_stride, border, gap, ranks, block_ranks)
        made = total.to(out.dtype.element_ty)
        store_outs(out + row * out_stride, made, tl.program_id(0), n_out, gated, block_out)


@jit
def _sum_groups(
    words: Tile, lines: Tile, x: Tile, first: Tile, n_in: constexpr, part: constexpr, cache: constexpr
) -> Tile:
    """What each group of a block of words adds to a row: [outs, groups].

    Codes are not made numbers: as they stand in their word, they are the digits of a fp32 so small that it has no
    exponent, 2**-149 for each 1; x is made as much larger as it bears, and what is found the rest.
    """
    found = tl.zeros(words.shape, tl.float32)
    added = tl.zeros([words.shape[1]], tl.float32)
    for number in tl.static_range(8):
        value = tl.load(x + number * part, first + number * part < n_in, other=0, cache_modifier=cache).to(tl.float32)
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
    is_whole: constexpr,
    assembler: constexpr,
    counting: constexpr,
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
    first = _first_inputs(places, part)
    sums = _add_words(
        *(sums, w, lines, x, x_stride, numbers, exists, first), *(n_in, part, is_whole, assembler, counting)
    )
    for start in range(block_words, tl.minimum(share, n_words - begin), block_words):
        w = load_block(words, inside, start + places, n_words)
        lines = _load_lines(affine, inside, begin + start, n_words, part, block_words)
        first = _first_inputs(start + places, part)
        sums = _add_words(
            *(sums, w, lines, x, x_stride, numbers, exists, first), *(n_in, part, is_whole, assembler, counting)
        )
    if ranks > 0:
        step = tl.num_programs(2) * block_ranks
        first_scales, last_scales = load_scales(b_first, outs, inside), load_scales(b_last, outs, inside)
        sums = add_columns(
            *(sums, b, first_scales, last_scales, t, b_stride, t_stride, border, gap),
            *(outs, inside, numbers, exists, own * block_ranks, ranks, step, ranks, block_ranks),
        )
    out += own.to(tl.int64) * part_stride
    store_tile(sums, out, out_stride, outs, inside, numbers, exists)


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
    is_whole: constexpr,
    assembler: constexpr,
    counting: constexpr,
) -> Tile:
    """sums, and the products of a block of words, a code of each after another, rounded to x's dtype."""
    scale, shift = _spread(_scale(lines), words.shape, part), _spread(_shift(lines), words.shape, part)
    if assembler != "":
        codes = tl.inline_asm_elementwise(
            *(assembler, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], (x.dtype.element_ty,) * 8, True, 2)
        )
        scale, shift = scale.to(codes[0].dtype), (shift + 8.0 * scale).to(codes[0].dtype)
    for number in tl.static_range(8):
        places = first + number * part
        inside = tl.full(places.shape, True, tl.int1) if is_whole else places < n_in
        values = load_rows(x, x_stride, numbers, exists, places, inside, "")
        if assembler != "":
            weights = tl.fma(codes[number] - (counting + 8.0), scale, shift)
        else:
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
