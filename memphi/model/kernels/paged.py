"""Attention of a few new tokens a row over what the pool's pages keep of it.

A program takes one unit of a row's keys (`division`) and one head of keys with the query heads that share it. What the
units of a row found is put together by the program that ends last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.attention.eager import EagerAttention
from memphi.model.kept import kept_layer
from memphi.model.kernels.codes import (
    PIECES,
    as_bytes,
    as_words,
    code_limit,
    decode,
    encode,
    join,
    joined,
    part,
    piece,
    split,
    widening,
)
from memphi.model.kernels.division import UNIT_FIELDS, Division
from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, power_of_two, tl
from memphi.model.kernels.parts import load_parts
from memphi.model.kernels.rotary import load_rotated, plain_rotate_and_keep

LEAST_BLOCK = 16
"""The smallest side of a matrix product on tensor cores."""
LOG2_E = 1.4426950408889634


def plain_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    division: Division,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Each new token over the tokens of its row up to itself, all of them in pages; the definition.

    query and out [rows * new tokens, heads, head_dim], each token contiguous; keys and values are a layer of the pool,
    scales [pages, page_tokens, kv_heads, 2] those of its codes, if any; table [rows, most pages] int32 names the pages
    of each row. Places that a row does not fill are not read, nor are pages of which it fills none. A row of no tokens
    gets zeros.
    """
    new = division.new_tokens
    for i, length in enumerate(division.lengths.tolist()):
        at = slice(i * new, (i + 1) * new)
        if length == 0:
            out[at] = 0
            continue
        pages = table[i, : -(-length // keys.shape[1])]
        both = kept_layer(keys, values, scales)
        k, v = (kept.read(pages, query.dtype).flatten(0, 1)[None, :length] for kept in both)
        out[at] = EagerAttention().causal(query[None, at], k, v)[0]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    division: Division,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """As `plain_attend`, over a division that `divide` made; scores, weights and sums are fp32.

    Where it is launched dependently it reads the division and the table without waiting: between what wrote them and
    this there has to be a launch that is not dependent.
    """
    _launch(query, None, keys, values, table, division, out, scales)


def plain_attend_new(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    division: Division,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """`plain_rotate_and_keep`, then `plain_attend`: a layer's attention from one product to the next; the definition.

    qkv [rows, (heads + 2 * kv_heads) * head_dim], one new token of each row, or in parts [parts, rows, ...], which are
    summed and rounded first; cos and sin as `tabulate` makes them.
    """
    if qkv.ndim > 2:
        qkv = qkv.sum(0).to(cos.dtype)
    positions, page_tokens = division.lengths.long() - 1, keys.shape[1]
    places = positions.clamp(min=0)
    pages = torch.where(positions < 0, -1, table.long().gather(1, (places // page_tokens)[:, None])[:, 0])
    turned = qkv.clone()
    plain_rotate_and_keep(turned, cos, sin, keys, values, pages, places % page_tokens, scales)
    query = turned[:, : out[0].numel()].view_as(out)
    plain_attend(query, keys, values, table, division, out, scales)


def attend_new(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    division: Division,
    out: Tensor,
    scales: Tensor | None = None,
) -> None:
    """As `plain_attend_new`, in one launch; it reads the pages of earlier tokens without waiting too (`attend`)."""
    _launch(qkv, (cos, sin), keys, values, table, division, out, scales)


def _launch(
    query: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    division: Division,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    assert keys.stride() == values.stride()
    assert keys.shape[1] == power_of_two(keys.shape[1])
    assert (scales is None) == (code_limit(keys) == 0)
    assert rotary is None or division.new_tokens == 1
    assert scales is None or keys.shape[3] % PIECES == 0, "codes are read in words"
    units, kv_heads, queries, head_dim = division.sums.shape
    tiling, limit = division.tiling, code_limit(keys)
    cos, sin = rotary or (query, query)
    parts, part_stride = (len(query), query.stride(0)) if query.ndim > 2 and rotary else (1, 0)
    words = table if scales is None else as_words(scales)
    _attend[(kv_heads, units)](
        *(query, cos, sin, as_bytes(keys), as_bytes(values), words, table, division.units),
        *(division.sums, division.weights, division.arrived, out),
        *(part_stride, query.stride(-2 if rotary else 0), keys.stride(0), keys.stride(1)),
        *(words.stride(0), words.stride(1), table.stride(0), out.stride(0)),
        head_dim**-0.5 * LOG2_E,
        new_tokens=division.new_tokens,
        queries=queries,
        kv_heads=kv_heads,
        head_dim=head_dim,
        half=cos.shape[-1] // 2 if rotary else 0,
        page_tokens=keys.shape[1],
        limit=limit,
        query_block=max(LEAST_BLOCK, power_of_two(queries)),
        token_block=tiling.tokens,
        dim_block=max(LEAST_BLOCK * (PIECES if limit else 1), power_of_two(head_dim)),
        few_block=power_of_two(queries),
        part_block=max(1, tiling.parts // power_of_two(queries)),
        least_block=LEAST_BLOCK,
        fields=UNIT_FIELDS,
        assembler=widening(keys, out),
        query_parts=parts,
        fresh=rotary is not None,
        early=tiling.early and rotary is not None,  # Other new keys may not be there yet.
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        maxnreg=tiling.registers,
        **launch_options(out.device),
    )


@jit
def _place(
    row_pages: Tile, tokens: Tile, inside: Tile, page_stride: Tile, place_stride: Tile, page_tokens: constexpr
) -> Tile:
    """Where tokens of a row lie in a layer of the pool."""
    pages = tl.load(row_pages + tokens // page_tokens, inside, other=0).to(tl.int64)
    return pages * page_stride + tokens % page_tokens * place_stride


@jit
def _load(source: Tile, places: Tile, inside: Tile, dims: Tile, head_dim: constexpr) -> Tile:
    """Keys or values [places, dims]; zeros, for which nothing is read, where they are not inside."""
    return tl.load(source + places[:, None] + dims[None, :], inside[:, None] & (dims < head_dim)[None, :], other=0)


@jit
def _load_both(
    keys: Tile,
    values: Tile,
    words: Tile,
    row_pages: Tile,
    tokens: Tile,
    inside: Tile,
    dims: Tile,
    page_stride: Tile,
    place_stride: Tile,
    word_page_stride: Tile,
    word_place_stride: Tile,
    head_dim: constexpr,
    page_tokens: constexpr,
    limit: constexpr,
) -> Tile:
    """Keys and values [tokens, dims] of tokens of a row as they are kept, codes in words [tokens, words]; and the word
    of each token's scales, if any."""
    places = _place(row_pages, tokens, inside, page_stride, place_stride, page_tokens)
    scales = places
    if limit:
        keys, values, places = _as_words(keys), _as_words(values), places // 4
        at = _place(row_pages, tokens, inside, word_page_stride, word_place_stride, page_tokens)
        scales = tl.load(words + at, inside, other=0)
    width: constexpr = head_dim // 4 if limit else head_dim
    return _load(keys, places, inside, dims, width), _load(values, places, inside, dims, width), scales


@jit
def _as_words(codes: Tile) -> Tile:
    return codes.to(tl.pointer_type(tl.int32))


@jit
def _load_turned(
    qkv: Tile,
    cos: Tile,
    sin: Tile,
    tokens: Tile,
    heads: Tile,
    exists: Tile,
    dims: Tile,
    part_stride: Tile,
    stride: Tile,
    head_dim: constexpr,
    half: constexpr,
    parts: constexpr,
) -> Tile:
    """One head of each of some tokens of the qkv product [tokens, dims], turned."""
    source = qkv + tokens[:, None] * stride + (heads * head_dim)[:, None] + dims[None, :]
    turns = tokens[:, None] * (2 * half) + dims[None, :]
    return load_rotated(source, exists, cos + turns, sin + turns, dims[None, :], half, part_stride, parts)


@jit
def _load_newest(
    qkv: Tile,
    cos: Tile,
    sin: Tile,
    row: Tile,
    head: Tile,
    exists: Tile,
    dims: Tile,
    part_stride: Tile,
    stride: Tile,
    kv_heads: constexpr,
    group: constexpr,
    head_dim: constexpr,
    half: constexpr,
    parts: constexpr,
) -> Tile:
    """Key and value [1, dims] of a row's newest token, of one head, out of the qkv product."""
    one = tl.zeros([1], tl.int64)
    lines, heads = row + one, kv_heads * group + head + one
    there = exists & (dims < head_dim)[None, :]
    k = _load_turned(qkv, cos, sin, lines, heads, there, dims, part_stride, stride, head_dim, half, parts)
    source = qkv + lines[:, None] * stride + ((kv_heads + heads) * head_dim)[:, None]
    return k, load_parts(source + dims[None, :], there, part_stride, parts, cos.dtype.element_ty)


@jit
def _as_kept(k: Tile, v: Tile, like: Tile, limit: constexpr) -> Tile:
    """A new token's key and value [1, dims] as their page keeps them, the scales of codes, and what they stand for: as
    such it is seen at once."""
    kept_k, kept_v, key_scales, value_scales = k, v, k, v
    if limit:
        kept_k, key_scales = encode(k, limit)
        kept_v, value_scales = encode(v, limit)
        k = decode(kept_k, key_scales.to(tl.float32), like, limit)
        v = decode(kept_v, value_scales.to(tl.float32), like, limit)
    return (kept_k, kept_v), (key_scales, value_scales), (k, v)


@jit
def _begin(q: Tile, k: Tile, v: Tile, exists: Tile, scale: Tile, least: constexpr) -> Tile:
    """Softmax as it begins: the largest scores, the totals and sums of values relative to them, of one token [1, dims]
    that every query sees, if it exists.
    """
    # On tensor cores, the least of which takes more keys: number by number it took longer.
    alone = tl.where(tl.arange(0, least)[:, None] == 0, k, tl.zeros([least, k.shape[1]], k.dtype))
    scores = tl.sum(tl.dot(q, tl.trans(alone), input_precision="ieee"), 1) * scale
    sums = tl.zeros(q.shape, tl.float32) + v.to(tl.float32)
    return tl.where(exists, scores, float("-inf")), tl.where(exists, 1.0, tl.zeros([q.shape[0]], tl.float32)), sums


@jit
def _absorb(
    q: Tile,
    k: Tile,
    v: Tile,
    words: Tile,
    seen: Tile,
    scale: Tile,
    peaks: Tile,
    totals: Tile,
    sums: Tile,
    limit: constexpr,
    assembler: constexpr,
) -> Tile:
    """Softmax as it goes: the largest scores, the totals and sums of values relative to them, with k and v taken in.

    q and sums are in pieces. Codes are multiplied as they are: their scales are scores' and weights'.
    """
    scores = tl.dot(q[0], piece(tl.trans(k), 0, q[0], limit, assembler), input_precision="ieee")
    for number in tl.static_range(1, len(q)):
        widened = piece(tl.trans(k), number, q[0], limit, assembler)
        scores = tl.dot(q[number], widened, scores, input_precision="ieee")
    scores *= scale
    if limit:
        key_scales, value_scales = split(words)
        scores *= key_scales[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peaks, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peaks - base)
    totals = totals * fade + tl.sum(weights, 1)
    if limit:
        weights *= value_scales[None, :]
    shares, found = weights.to(q[0].dtype), ()
    for number in tl.static_range(len(sums)):
        widened = piece(v, number, q[0], limit, assembler)
        added = tl.dot(shares, widened, sums[number] * fade[:, None], input_precision="ieee")
        found = found + (added,)  # type: ignore[assignment]  # noqa: RUF005
    return higher, totals, found


@jit
def _divided(sums: Tile, totals: Tile) -> Tile:
    """Sums over their totals; zeros where nothing was seen."""
    return sums / tl.where(totals == 0, 1.0, totals)[:, None]


@jit
def _keep(
    page: Tile, new: Tile, place: Tile, dims: Tile, stride: Tile, head_dim: constexpr, page_tokens: constexpr
) -> None:
    """Write a new token [1, dims] to its place of a page, and zeros after it in a page that it begins."""
    columns = (dims < head_dim)[None, :]
    tl.store(page + place * stride + dims[None, :], new, columns)
    if place == 0:
        rest = tl.arange(0, page_tokens)[:, None]
        zeros = tl.zeros([page_tokens, dims.shape[0]], new.dtype)
        tl.store(page + rest * stride + dims[None, :], zeros, (rest > 0) & columns)


@jit
def _keep_word(page: Tile, new: Tile, place: Tile, stride: Tile, page_tokens: constexpr) -> None:
    """The same for the word [1] of codes."""
    tl.store(page + place * stride + tl.arange(0, 1), new)
    if place == 0:
        rest = tl.arange(0, page_tokens)
        tl.store(page + rest * stride, tl.zeros([page_tokens], new.dtype), rest > 0)


@jit
def _combine(
    part_sums: Tile,
    part_weights: Tile,
    first_line: Tile,
    count: Tile,
    asked: Tile,
    dims: Tile,
    kv_heads: constexpr,
    queries: constexpr,
    head_dim: constexpr,
    block: constexpr,
) -> Tile:
    """What all units of a row found, for one head of keys: [asked, dims]."""
    peaks = tl.full([asked.shape[0]], float("-inf"), tl.float32)
    totals = tl.zeros([asked.shape[0]], tl.float32)
    sums = tl.zeros([asked.shape[0], dims.shape[0]], tl.float32)
    for start in range(0, count, block):
        parts = start + tl.arange(0, block)
        # Queries first: then each warp has some of them, and all parts of what it sums.
        there = (asked < queries)[:, None] & (parts < count)[None, :]
        lines = first_line + asked[:, None] + parts[None, :] * (kv_heads * queries)
        cells = lines[:, :, None] * head_dim + dims[None, None, :]
        within = there[:, :, None] & (dims < head_dim)[None, None, :]
        # Others wrote these just now: a multiprocessor's own cache is passed over.
        found = tl.load(part_sums + cells, within, other=0, cache_modifier=".cg")
        found_peaks = tl.load(part_weights + lines * 2, there, other=float("-inf"), cache_modifier=".cg")
        found_totals = tl.load(part_weights + lines * 2 + 1, there, other=0, cache_modifier=".cg")
        higher = tl.maximum(peaks, tl.max(found_peaks, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, fade = tl.exp2(found_peaks - base[:, None]), tl.exp2(peaks - base)
        sums = sums * fade[:, None] + tl.sum(found * weights[:, :, None], 1)
        totals = totals * fade + tl.sum(found_totals * weights, 1)
        peaks = higher
    return _divided(sums, totals)


@jit
def _finish(
    out: Tile,
    part_sums: Tile,
    part_weights: Tile,
    arrived: Tile,
    unit: Tile,
    head: Tile,
    first_unit: Tile,
    count: Tile,
    peaks: Tile,
    totals: Tile,
    sums: Tile,
    dims: Tile,
    out_stride: Tile,
    new_tokens: constexpr,
    queries: constexpr,
    kv_heads: constexpr,
    head_dim: constexpr,
    few_block: constexpr,
    part_block: constexpr,
) -> None:
    """Write what a row's only unit found; of several, leave it to be put together by the one that comes last.

    out: where the row's first token goes; arrived: how many units of the row came, for this head of keys.
    """
    asked = tl.arange(0, sums.shape[0])
    exists = (asked < queries)[:, None] & (dims < head_dim)[None, :]
    if count == 1:
        _write(out, _divided(sums, totals), asked, exists, head, dims, out_stride, queries // new_tokens, head_dim)
    else:
        part = (unit * kv_heads + head) * queries + asked
        tl.store(part_sums + part[:, None] * head_dim + dims[None, :], sums, exists)
        tl.store(part_weights + part * 2, peaks, asked < queries)
        tl.store(part_weights + part * 2 + 1, totals, asked < queries)
        tl.debug_barrier()  # A program's parts are written before it says so.
        if tl.atomic_add(arrived, 1) == count - 1:
            few, first = tl.arange(0, few_block), (first_unit * kv_heads + head) * queries
            whole = _combine(part_sums, part_weights, first, count, few, dims, kv_heads, queries, head_dim, part_block)
            there = (few < queries)[:, None] & (dims < head_dim)[None, :]
            _write(out, whole, few, there, head, dims, out_stride, queries // new_tokens, head_dim)
            tl.store(arrived, 0)


@jit
def _write(
    out: Tile,
    found: Tile,
    asked: Tile,
    exists: Tile,
    head: Tile,
    dims: Tile,
    stride: Tile,
    group: constexpr,
    head_dim: constexpr,
) -> None:
    """Put what the queries of one head of keys found [asked, dims] where their tokens and heads lie."""
    target = out + asked // group * stride + (head * group + asked % group) * head_dim
    tl.store(target[:, None] + dims[None, :], found.to(out.dtype.element_ty), exists)


@jit
def _attend(
    query: Tile,
    cos: Tile,
    sin: Tile,
    keys: Tile,
    values: Tile,
    words: Tile,
    table: Tile,
    units: Tile,
    part_sums: Tile,
    part_weights: Tile,
    arrived: Tile,
    out: Tile,
    part_stride: Tile,
    query_stride: Tile,
    page_stride: Tile,
    place_stride: Tile,
    word_page_stride: Tile,
    word_place_stride: Tile,
    table_stride: Tile,
    out_stride: Tile,
    scale: Tile,
    new_tokens: constexpr,
    queries: constexpr,
    kv_heads: constexpr,
    head_dim: constexpr,
    half: constexpr,
    page_tokens: constexpr,
    limit: constexpr,
    query_block: constexpr,
    token_block: constexpr,
    dim_block: constexpr,
    few_block: constexpr,
    part_block: constexpr,
    least_block: constexpr,
    fields: constexpr,
    assembler: constexpr,
    query_parts: constexpr,
    fresh: constexpr,
    early: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    head, unit = tl.program_id(0), tl.program_id(1)
    row = tl.load(units + unit * fields).to(tl.int64)
    first, end = tl.load(units + unit * fields + 1), tl.load(units + unit * fields + 2)
    first_unit, count = tl.load(units + unit * fields + 3), tl.load(units + unit * fields + 4)
    length = tl.load(units + unit * fields + 5)
    if row < 0:
        return
    dims, asked, steps = tl.arange(0, dim_block), tl.arange(0, query_block), tl.arange(0, token_block)
    kept_dims = tl.arange(0, dim_block // 4 if limit else dim_block)
    row_pages = table + row * table_stride
    keys += head * head_dim
    values += head * head_dim
    words += head
    if fresh:
        has_new, place = (end == length) & (length > 0), (length - 1) % page_tokens
        page = tl.load(row_pages + (length - 1) // page_tokens, has_new, other=0).to(tl.int64)
        end = tl.minimum(end, length - 1)  # The newest is not in its page yet.
    # fmt: off
    if early:
        inside = first + steps < end
        early_k, early_v, early_words = _load_both(keys, values, words, row_pages, first + steps, inside, kept_dims,
                                                   page_stride, place_stride, word_page_stride, word_place_stride,
                                                   head_dim, page_tokens, limit)
        # Or the compiler would put the keys where tensor cores read them before it asks for the values.
        early_k, early_v = tl.where(inside[:, None], early_k, 0), tl.where(inside[:, None], early_v, 0)
    # fmt: on
    if dependent:
        tl.extra.cuda.gdc_wait()

    group: constexpr = queries // new_tokens
    new = asked // group  # The new token that each query belongs to.
    tokens, heads = row * new_tokens + new, head * group + asked % group
    exists = (asked < queries)[:, None] & (dims < head_dim)[None, :]
    if fresh:
        # fmt: off
        q = _load_turned(query, cos, sin, tokens, heads, exists, dims, part_stride, query_stride, head_dim, half,
                         query_parts)
        new_k, new_v = _load_newest(query, cos, sin, row, head, has_new, dims, part_stride, query_stride, kv_heads,
                                    group, head_dim, half, query_parts)
        # fmt: on
        kept, new_scales, newest = _as_kept(new_k, new_v, cos, limit)
        peaks, totals, sums = _begin(q, newest[0], newest[1], has_new, scale, least_block)
    else:
        source = query + tokens * query_stride + heads * head_dim
        q = tl.load(source[:, None] + dims[None, :], exists, other=0)
        peaks = tl.full([query_block], float("-inf"), tl.float32)
        totals, sums = tl.zeros([query_block], tl.float32), tl.zeros([query_block, dim_block], tl.float32)
    q, sums = part(q, limit), part(sums, limit)
    last = tl.minimum(length - new_tokens + new, end - 1)  # The last key in pages that each query sees in this unit.
    if early:
        seen = (first + steps)[None, :] <= last[:, None]
        peaks, totals, sums = _absorb(
            q, early_k, early_v, early_words, seen, scale, peaks, totals, sums, limit, assembler
        )
        first += token_block
    if fresh:  # noqa: SIM102 (one is decided when the kernel is compiled)
        if has_new:  # Nobody in this launch reads it there, and what was asked for early comes first.
            _keep(keys + page * page_stride, kept[0], place, dims, place_stride, head_dim, page_tokens)
            _keep(values + page * page_stride, kept[1], place, dims, place_stride, head_dim, page_tokens)
            if limit:
                word = join(new_scales[0], new_scales[1])
                _keep_word(words + page * word_page_stride, word, place, word_place_stride, page_tokens)
    for start in range(first, end, token_block):
        inside = start + steps < end
        # fmt: off
        k, v, scales = _load_both(keys, values, words, row_pages, start + steps, inside, kept_dims, page_stride,
                                  place_stride, word_page_stride, word_place_stride, head_dim, page_tokens, limit)
        # fmt: on
        seen = (start + steps)[None, :] <= last[:, None]
        peaks, totals, sums = _absorb(q, k, v, scales, seen, scale, peaks, totals, sums, limit, assembler)
    sums = joined(sums, limit)
    own, target = arrived + row * kv_heads + head, out + row * new_tokens * out_stride
    # fmt: off
    _finish(target, part_sums, part_weights, own, unit, head, first_unit, count, peaks, totals, sums, dims, out_stride,
            new_tokens, queries, kv_heads, head_dim, few_block, part_block)
    # fmt: on
