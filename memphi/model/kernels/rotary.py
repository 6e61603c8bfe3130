"""Rotary positions: the table of a step, and queries and keys turned by it as they leave the qkv product."""

from __future__ import annotations

from torch import Tensor

from memphi.model.kept import kept_layer
from memphi.model.kernels.codes import as_bytes, code_limit, decode, encode
from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, power_of_two, tl
from memphi.model.kernels.parts import load_parts
from memphi.model.rotary import rotate, turns


def plain_tabulate(
    positions: Tensor, long: Tensor, frequencies: Tensor, scale: float, cos: Tensor, sin: Tensor
) -> None:
    """What `rotary_table` returns, into cos and sin [tokens, 1, rotary_dim]; the definition.

    positions and long [tokens]; frequencies of `rotary_frequencies`; scale is the config's rope_scale.
    """
    for out, part in zip((cos, sin), turns(positions, long, frequencies, scale), strict=True):
        out.copy_(part)


def tabulate(positions: Tensor, long: Tensor, frequencies: Tensor, scale: float, cos: Tensor, sin: Tensor) -> None:
    """As `plain_tabulate`, one program a token, once a step and not dependently; cos and sin are contiguous."""
    half = frequencies.shape[1]
    _tabulate[(len(positions),)](
        *(positions, long, frequencies, cos, sin, scale),
        half=half,
        block=power_of_two(half),
        num_warps=1,
    )


def plain_rotate_and_keep(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    token_pages: Tensor,
    token_offsets: Tensor,
    scales: Tensor | None = None,
) -> None:
    """Turn queries and keys where they are, and put keys and values into their pages; the definition.

    qkv [tokens, (heads + 2 * kv_heads) * head_dim], each token contiguous; cos and sin of `tabulate`; keys and values
    are a layer of the pool, scales those of its codes, if any: then qkv's keys and values become what these stand for.
    token_pages and token_offsets [tokens] as in `Paging`, the tokens of a row in order. A page that is begun here has
    zeros after the row's end (`Paging.write`). A token whose page is negative, which fills up a batch, goes nowhere.
    """
    kv_heads, head_dim = keys.shape[2:]
    turning, value = qkv.unflatten(-1, (-1, head_dim)).tensor_split((-kv_heads,), dim=1)
    turning.copy_(rotate(turning, cos, sin))
    kept = token_pages >= 0
    begun = token_pages[kept & (token_offsets == 0)]
    for part, new in zip(kept_layer(keys, values, scales), (turning[:, -kv_heads:], value), strict=True):
        part.clear(begun.long())
        new[kept] = part.write(token_pages[kept].long(), token_offsets[kept].long(), new[kept])


def rotate_and_keep(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    token_pages: Tensor,
    token_offsets: Tensor,
    scales: Tensor | None = None,
) -> None:
    """As `plain_rotate_and_keep`, one program for each token and as many of its heads as there are kv_heads."""
    page_tokens, kv_heads, head_dim = keys.shape[1:]
    assert keys.stride() == values.stride()
    assert (scales is None) == (code_limit(keys) == 0)
    factors = keys if scales is None else scales
    parts = qkv.shape[1] // (kv_heads * head_dim)
    _rotate_and_keep[(len(qkv), parts)](
        *(qkv, cos, sin, as_bytes(keys), as_bytes(values), factors, token_pages, token_offsets),
        *(qkv.stride(0), keys.stride(0), keys.stride(1), factors.stride(0), factors.stride(1)),
        group=parts - 2,
        kv_heads=kv_heads,
        head_dim=head_dim,
        half=cos.shape[-1] // 2,
        page_tokens=page_tokens,
        limit=code_limit(keys),
        head_block=power_of_two(kv_heads),
        dim_block=power_of_two(head_dim),
        num_warps=2,
        **launch_options(qkv.device),
    )


@jit
def _tabulate(
    positions: Tile,
    long: Tile,
    frequencies: Tile,
    cos: Tile,
    sin: Tile,
    scale: Tile,
    half: constexpr,
    block: constexpr,
) -> None:
    token = tl.program_id(0)
    pairs = tl.arange(0, block)
    inside = pairs < half
    regime = tl.load(long + token).to(tl.int32)
    angles = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + regime * half + pairs, inside, other=0)
    cosines = (tl.cos(angles) * scale).to(cos.dtype.element_ty)
    sines = (tl.sin(angles) * scale).to(sin.dtype.element_ty)
    first = token * 2 * half + pairs
    tl.store(cos + first, cosines, inside)
    tl.store(cos + first + half, cosines, inside)
    tl.store(sin + first, sines, inside)
    tl.store(sin + first + half, sines, inside)


@jit
def load_rotated(
    source: Tile,
    inside: Tile,
    cos: Tile,
    sin: Tile,
    dims: Tile,
    half: constexpr,
    part_stride: Tile,
    parts: constexpr,
) -> Tile:
    """Heads turned by their token's cosines and sines, every product rounded as in `rotate`.

    source: pointers to the components of heads, `dims` within their head; cos and sin: pointers to the same components
    of a token's table; inside: which of them exist.
    """
    turned = inside & (dims < 2 * half)
    dtype: constexpr = cos.dtype.element_ty
    values = load_parts(source, inside, part_stride, parts, dtype)
    partners = load_parts(source + tl.where(dims < half, half, -half), turned, part_stride, parts, dtype).to(tl.float32)
    cosines = tl.where(turned, tl.load(cos, turned, other=0).to(tl.float32), 1.0)
    sines = tl.load(sin, turned, other=0).to(tl.float32) * tl.where(dims < half, -1.0, 1.0)
    straight = (values.to(tl.float32) * cosines).to(values.dtype).to(tl.float32)
    across = (partners * sines).to(values.dtype).to(tl.float32)
    return (straight + across).to(values.dtype)


@jit
def _rotate_and_keep(
    qkv: Tile,
    cos: Tile,
    sin: Tile,
    keys: Tile,
    values: Tile,
    scales: Tile,
    token_pages: Tile,
    token_offsets: Tile,
    qkv_stride: Tile,
    page_stride: Tile,
    place_stride: Tile,
    scale_page_stride: Tile,
    scale_place_stride: Tile,
    group: constexpr,
    kv_heads: constexpr,
    head_dim: constexpr,
    half: constexpr,
    page_tokens: constexpr,
    limit: constexpr,
    head_block: constexpr,
    dim_block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, dims = tl.arange(0, head_block)[:, None], tl.arange(0, dim_block)[None, :]
    inside = (heads < kv_heads) & (dims < head_dim)
    within = heads * head_dim + dims
    source = qkv + token * qkv_stride + part * kv_heads * head_dim + within
    table = token * 2 * half + dims + heads * 0
    turns = inside & (dims < 2 * half)
    if part < group:
        turned = load_rotated(source, turns, cos + table, sin + table, dims, half, 0, 1)
        tl.debug_barrier()  # Other threads' partners are read before they are replaced.
        tl.store(source, turned, turns)
    else:
        page = tl.load(token_pages + token).to(tl.int64)
        offset = tl.load(token_offsets + token).to(tl.int32)
        if part == group:
            new = load_rotated(source, inside, cos + table, sin + table, dims, half, 0, 1)
            tl.debug_barrier()
            if not limit:
                tl.store(source, new, turns)
        else:
            new = tl.load(source, inside, other=0)
        if limit:
            codes, factors = encode(new, limit)
            tl.store(source, tl.where(page >= 0, decode(codes, factors.to(tl.float32), qkv, limit), new), inside)
            new = codes
        if page >= 0:
            pages = keys if part == group else values
            first = pages + page * page_stride + within
            some = tl.arange(0, head_block)
            # A key's and a value's scale stand side by side.
            first_scale = scales + page * scale_page_stride + some * 2 + (part - group)
            if limit:
                tl.store(first_scale + offset * scale_place_stride, factors, some < kv_heads)
            tl.store(first + offset * place_stride, new, inside)
            # The last token in a page that this launch began clears the places after it.
            is_last = tl.load(token_pages + token + 1, token + 1 < tl.num_programs(0), other=-1) != page
            begin = token - offset
            is_begun = tl.load(token_pages + begin, begin >= 0, other=-1) == page
            if is_last & is_begun:
                for place in range(offset + 1, page_tokens):
                    tl.store(first + place * place_stride, tl.zeros_like(new), inside)
                    if limit:
                        tl.store(first_scale + place * scale_place_stride, tl.zeros_like(factors), some < kv_heads)
