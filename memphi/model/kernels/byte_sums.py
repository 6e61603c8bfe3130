"""Products of up to four rows with codes in bytes, summed number by number: of numbers, or of words of four codes.

A code of a word is the digits of a fp32, and a card need not make one of it. Called by `eight_bits`.
"""

from __future__ import annotations

from memphi.model.kernels.coded import load_block, load_piece, load_pieces, t_places
from memphi.model.kernels.launch import Tile, constexpr, jit, tl
from memphi.model.kernels.rounding import nearest, row_step, wide_codes


@jit
def sum_words(
    x0: Tile,
    x1: Tile,
    x2: Tile,
    x3: Tile,
    words: Tile,
    inside: Tile,
    n_words: constexpr,
    rows: constexpr,
    dtype: constexpr,
    block_out: constexpr,
    block_words: constexpr,
    waits: constexpr,
    cache: constexpr,
) -> Tile:
    """The products of up to four rows of words, each four numbers of some dtype, with a block of outputs."""
    places = tl.arange(0, block_words)
    w = load_block(words, inside, places, n_words)
    if waits:
        tl.extra.cuda.gdc_wait()
    blocks: constexpr = (n_words + block_words - 1) // block_words
    ahead: constexpr = blocks if rows == 1 else 0
    pieces = load_pieces(x0, places, n_words, block_words, ahead, cache)
    sums0, added0 = tl.zeros([block_out, block_words], tl.float32), tl.zeros([1, block_words], tl.float32)
    sums1, sums2, sums3, added1, added2, added3 = sums0, sums0, sums0, added0, added0, added0
    for number in tl.static_range(blocks):
        at = number * block_words + places
        w = load_block(words, inside, at, n_words) if number > 0 else w
        piece = pieces[number] if number < ahead else load_piece(x0, at, n_words, cache)
        sums0, added0 = _add_word(sums0, added0, w, piece, dtype)
        if rows > 1:
            sums1, added1 = _add_word(sums1, added1, w, load_piece(x1, at, n_words, cache), dtype)
        if rows > 2:
            sums2, added2 = _add_word(sums2, added2, w, load_piece(x2, at, n_words, cache), dtype)
        if rows > 3:
            sums3, added3 = _add_word(sums3, added3, w, load_piece(x3, at, n_words, cache), dtype)
    return (
        tl.sum(_of_codes(sums0, added0), 1),
        tl.sum(_of_codes(sums1, added1), 1),
        tl.sum(_of_codes(sums2, added2), 1),
        tl.sum(_of_codes(sums3, added3), 1),
    )


@jit
def sum_columns_of_words(
    words: Tile,
    first: Tile,
    last: Tile,
    t: Tile,
    border: Tile,
    gap: Tile,
    n_words: constexpr,
    dtype: constexpr,
    block_out: constexpr,
    block_words: constexpr,
) -> Tile:
    """As `sum_columns`, of words, by the first adapter's scales or the last's: [outs]."""
    places = tl.arange(0, block_words)
    sums, added = tl.zeros([block_out, block_words], tl.float32), tl.zeros([1, block_words], tl.float32)
    piece = tl.load(t + t_places(places, border, gap), places < n_words, other=0)
    sums, added = _add_word(sums, added, words, piece, dtype)
    return tl.sum(_of_codes(sums, added) * tl.where((places < border)[None, :], first[:, None], last[:, None]), 1)


@jit
def _add_word(sums: Tile, added: Tile, words: Tile, x: Tile, dtype: constexpr) -> Tile:
    """sums, and products of numbers x [words] with the codes of words and 128 [outs, words]; and added, and those
    numbers [1, words].

    A code, which is not negative so, is not made a number: it is the last digits of a fp32 so small that it has no
    exponent, 2**-149 for each 1; x is made as much larger as it bears, and what is found the rest.
    """
    digits = words.to(tl.uint32, bitcast=True) ^ 0x80808080
    for number in tl.static_range(4):
        value = (x[None, :] >> (16 * number)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        code = ((digits >> (8 * number)) & 255).to(tl.float32, bitcast=True)
        sums += code * (value * 18446744073709551616.0)
        added += value
    return sums, added


@jit
def _of_codes(sums: Tile, added: Tile) -> Tile:
    """What `_add_word` found, without the 128."""
    return sums * 38685626227668133590597632.0 - added * 128.0


@jit
def sum_bytes(
    x0: Tile,
    x1: Tile,
    x2: Tile,
    x3: Tile,
    codes: Tile,
    inside: Tile,
    n_in: constexpr,
    rows: constexpr,
    is_e4m3: constexpr,
    knows_e4m3: constexpr,
    block_out: constexpr,
    block_in: constexpr,
    block_row: constexpr,
    waits: constexpr,
    cache: constexpr,
) -> Tile:
    """The products of up to four rows of numbers with a block of outputs."""
    places = tl.arange(0, block_in)
    c = load_block(codes, inside, places, n_in)
    if waits:
        tl.extra.cuda.gdc_wait()
    step0, step1, step2, step3 = 1.0, 1.0, 1.0, 1.0
    if is_e4m3:
        step0 = row_step(x0, n_in, block_row, cache)
        if rows > 1:
            step1 = row_step(x1, n_in, block_row, cache)
        if rows > 2:
            step2 = row_step(x2, n_in, block_row, cache)
        if rows > 3:
            step3 = row_step(x3, n_in, block_row, cache)
    sums0 = tl.zeros([block_out, block_in], tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for start in tl.static_range(0, n_in, block_in):
        if start > 0:
            c = load_block(codes, inside, start + places, n_in)
        wide = wide_codes(c, is_e4m3, knows_e4m3)
        sums0 += wide * _load_x(x0, start + places, n_in, 1.0 / step0, is_e4m3, cache)
        if rows > 1:
            sums1 += wide * _load_x(x1, start + places, n_in, 1.0 / step1, is_e4m3, cache)
        if rows > 2:
            sums2 += wide * _load_x(x2, start + places, n_in, 1.0 / step2, is_e4m3, cache)
        if rows > 3:
            sums3 += wide * _load_x(x3, start + places, n_in, 1.0 / step3, is_e4m3, cache)
    rest = 256.0 if is_e4m3 and not knows_e4m3 else 1.0
    return (
        tl.sum(sums0, 1) * (step0 * rest),
        tl.sum(sums1, 1) * (step1 * rest),
        tl.sum(sums2, 1) * (step2 * rest),
        tl.sum(sums3, 1) * (step3 * rest),
    )


@jit
def _load_x(x: Tile, places: Tile, n_in: constexpr, of_step: Tile, is_e4m3: constexpr, cache: constexpr) -> Tile:
    values = tl.load(x + places, places < n_in, other=0, cache_modifier=cache).to(tl.float32)
    if is_e4m3:
        values = nearest(values * of_step)
    return values[None, :]
