"""Keys and values in 8 bits within a kernel, as `memphi.model.kept` defines them.

A kernel gets codes of either format as int8, and the two scales of a token's key and value, bf16 both, as one word of
32 bits: what is smaller than that Triton does not fetch ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.config import CacheFormat
from memphi.model.kept import CODE_LIMITS
from memphi.model.kernels.launch import (
    E4M3_CAPABILITY,
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    is_interpreted,
    jit,
    tl,
)

PIECES = 4
"""The codes of a word, of which each piece of a block has one."""
WIDENINGS = {
    (127, torch.bfloat16): (
        "lop3.b32 low, both, 0x007F007F, 0x43004300, 0xEA; lop3.b32 high, both, 0x00800080, 0x43004300, 0xEA; "
        "mov.b32 by, 0xBF80BF80; fma.rn.bf16x2 $0, high, by, low;"
    ),
    (127, torch.float16): (
        "lop3.b32 low, both, 0x007F007F, 0x64006400, 0xEA; lop3.b32 high, both, 0x00800080, 0x64006400, 0xEA; "
        "sub.rn.f16x2 $0, low, high;"
    ),
    (448, torch.bfloat16): (
        "shr.u32 low, both, 4; and.b32 low, low, 0x07F007F0; lop3.b32 low, both, 0x80008000, low, 0xEA; "
        "mov.b32 by, 0x7B807B80; mov.b32 high, 0x80008000; fma.rn.bf16x2 $0, low, by, high;"
    ),
    (448, torch.float16): (
        "shr.u32 low, both, 1; and.b32 low, low, 0x3F803F80; lop3.b32 low, both, 0x80008000, low, 0xEA; "
        "mov.b32 by, 0x5C005C00; mul.rn.f16x2 $0, low, by;"
    ),
}
"""How a card makes two codes of a format, each in both bytes of a half of `both`, numbers of 16 bits. Of int8 the lower
seven bits and the upper one become the last digits of two floats that count in ones there, of which the difference is
the code; the bits of e4m3 move to where a float has its own, which is then by a power of two too small."""


def why_not_kept(cache_format: CacheFormat, device: torch.device) -> str | None:
    """What keeps kernels from reading a cache format on a device that has kernels, in words; None: nothing does."""
    if cache_format != "fp8" or is_interpreted() or capability(device) >= E4M3_CAPABILITY:
        return None
    return "compute capability {}.{} has no fp8 (8.9 and later have; --cache-format int8 works)".format(
        *capability(device)
    )


def code_limit(numbers: Tensor) -> int:
    """The largest code of a format; 0 where numbers are kept as they are."""
    return int(CODE_LIMITS.get(numbers.dtype, 0))


def as_bytes(numbers: Tensor) -> Tensor:
    """Codes of a format as int8; other numbers as they are."""
    return numbers.view(torch.int8) if numbers.dtype in CODE_LIMITS else numbers


def widening(numbers: Tensor, like: Tensor) -> str:
    """The assembler by which codes become numbers like others, two at once; empty where there is none."""
    if is_interpreted() or capability(like.device) < TENSOR_CAPABILITY:
        return ""
    found = WIDENINGS.get((code_limit(numbers), like.dtype), "")
    return found and f"{{ .reg .b32 both, low, high, by; prmt.b32 both, $1, $2, SELECTOR; {found} }}"


def as_words(scales: Tensor) -> Tensor:
    """Scales [pages, page_tokens, kv_heads, 2] as words [pages, page_tokens, kv_heads]."""
    return scales.view(torch.int32).squeeze(-1)


@jit
def encode(x: Tile, limit: constexpr) -> Tile:
    """Codes of x [groups, dims], as int8, and their scales [groups] in bf16; what lies beyond a group must be zeros."""
    wide = x.to(tl.float32)
    scales = (tl.max(tl.abs(wide), 1) * (1.0 / limit)).to(tl.bfloat16)
    steps = tl.where(scales == 0, 1.0, scales.to(tl.float32))
    codes = tl.minimum(tl.maximum(tl.div_rn(wide, steps[:, None]), -limit), limit)
    if limit == 127:
        found = _whole(codes).to(tl.int8)
    else:
        # Rounded here already, to three bits after the first: the interpreter's own conversion only takes what fits.
        powers = (codes.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        places = tl.maximum(powers, 0.015625) * 0.125  # Below 2 ** -6 they are as far apart as above it.
        found = (_whole(codes / places) * places).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    return found, scales


@jit
def piece(words: Tile, number: constexpr, like: Tile, limit: constexpr, assembler: constexpr) -> Tile:
    """The numbers that one code of each word stands for, but for its scale, in the format of a block; what is kept as
    it is, whole."""
    numbers = words
    if limit and assembler != "":
        chosen: constexpr = assembler.replace("SELECTOR", ("0x4400", "0x5511", "0x6622", "0x7733")[number])
        numbers = tl.inline_asm_elementwise(chosen, "=r,r,r", [words], like.dtype, True, 2)
    elif limit:
        codes = ((words << (24 - 8 * number)) >> 24).to(tl.int8)
        numbers = codes.to(like.dtype) if limit == 127 else codes.to(tl.float8e4nv, bitcast=True).to(like.dtype)
    return numbers


@jit
def part(tile: Tile, limit: constexpr) -> Tile:
    """A block [rows, dims] in its pieces [rows, words]; whole where none are kept."""
    if limit:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        pieces = (first, second, third, fourth)
    else:
        pieces = (tile,)  # type: ignore[assignment]
    return pieces


@jit
def joined(pieces: Tile, limit: constexpr) -> Tile:
    """The block that `part` parted."""
    tile = pieces[0]
    if limit:
        pairs = tl.join(tl.join(pieces[0], pieces[2]), tl.join(pieces[1], pieces[3]))
        tile = tl.reshape(pairs, [tile.shape[0], 4 * tile.shape[1]])
    return tile


@jit
def decode(codes: Tile, scales: Tile, like: Tile, limit: constexpr) -> Tile:
    """The numbers [groups, dims] that codes stand for, in the format of what `like` points to; scales [groups] fp32."""
    numbers = codes.to(tl.float32) if limit == 127 else codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return (numbers * scales[:, None]).to(like.dtype.element_ty)


@jit
def join(key_scales: Tile, value_scales: Tile) -> Tile:
    """Two scales in bf16 as a word, the key's in its lower half."""
    lower, upper = (key_scales.to(tl.int16, bitcast=True), value_scales.to(tl.int16, bitcast=True))
    return (lower.to(tl.int32) & 0xFFFF) | (upper.to(tl.int32) << 16)


@jit
def split(words: Tile) -> Tile:
    """A key's and a value's scale, in fp32."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@jit
def _whole(numbers: Tile) -> Tile:
    """The nearest whole numbers, halves to even: beyond 1.5 x 2 ** 23 fp32 has no others."""
    return (numbers + 12582912.0) - 12582912.0
