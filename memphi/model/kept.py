"""Keys and values as the pages of a pool keep them: as they are, or in 8 bits. The definition of the cache formats.

In 8 bits a token's key, or value, of one head is its own group: its largest number becomes the largest code, and a
scale in bf16 stands beside it. So what is written never depends on other tokens, and never changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CODE_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of each format in 8 bits."""
SCALE_DTYPE = torch.bfloat16


def quantise(x: Tensor, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of x [..., head_dim] and their scales [...]; a group of zeros has a scale of zero."""
    limit = CODE_LIMITS[code]
    scales = (x.abs().amax(-1).float() * (1 / limit)).to(SCALE_DTYPE)
    steps = torch.where(scales == 0, 1.0, scales.float())
    codes = (x / steps[..., None]).clamp_(-limit, limit)  # In fp32. The rounded scale may be a little too small.
    return (codes if code.is_floating_point else codes.round_()).to(code), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for; every code is exact in 16 bits, so that there is one rounding."""
    return codes.to(dtype).mul_(scales[..., None])


@dataclass(frozen=True)
class Kept:
    """The keys, or the values, of one layer in all pages of a pool."""

    numbers: Tensor  # [pages, page_tokens, kv_heads, head_dim], in the model's format or as codes
    scales: Tensor | None = None  # [pages, page_tokens, kv_heads]; None where numbers are kept as they are

    def write(self, pages: Tensor, places: Tensor, new: Tensor) -> Tensor:
        """Put new numbers [tokens, kv_heads, head_dim] where their tokens belong; returns them as they will be read."""
        if self.scales is None:
            self.numbers[pages, places] = new.detach()
            return new
        codes, scales = quantise(new.detach(), self.numbers.dtype)
        _bits(self.numbers)[pages, places] = _bits(codes)
        self.scales[pages, places] = scales
        return dequantise(codes, scales, new.dtype)

    def clear(self, pages: Tensor) -> None:
        """Fill pages with zeros."""
        _bits(self.numbers).index_fill_(0, pages, 0)
        if self.scales is not None:
            self.scales.index_fill_(0, pages, 0)

    def read(self, places: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """Copy what pages hold, [*pages.shape, page_tokens, kv_heads, head_dim]; or, of pages and offsets, tokens."""
        if self.scales is None:
            return self.numbers[places]
        codes = _bits(self.numbers)[places].view(self.numbers.dtype)
        return dequantise(codes, self.scales[places], dtype)


def kept_layer(keys: Tensor, values: Tensor, scales: Tensor | None) -> tuple[Kept, Kept]:
    """A layer of a pool: its keys and values, with the scales [pages, page_tokens, kv_heads, 2] of both, if any."""
    if scales is None:
        return Kept(keys), Kept(values)
    return Kept(keys, scales[..., 0]), Kept(values, scales[..., 1])


def _bits(codes: Tensor) -> Tensor:
    """The same memory in a format that torch indexes everywhere, which it does not do with floats of 8 bits."""
    return codes.view(torch.uint8) if codes.dtype in CODE_LIMITS else codes
