"""Partial rotary embedding with the two longrope regimes (spec 3.1)."""

import numpy as np
import torch
from torch import Tensor

from memphi.config import LanguageConfig
from memphi.model.upload import upload


def rotary_frequencies(config: LanguageConfig, device: torch.device) -> Tensor:
    """Radians per position under the short factors and under the long ones: [2, rotary_dim / 2] fp32."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=device).float() / config.rotary_dim
    factors = upload(np.array((config.short_factor, config.long_factor), dtype=np.float32), device)
    return 1.0 / (factors * config.rope_theta**steps)


def rotary_table(config: LanguageConfig, positions: Tensor, long: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines for packed tokens, computed in fp32 and scaled in both regimes.

    positions [tokens] and long [tokens] say where each token stands and which factors apply to it.
    Returns two tensors [tokens, 1, rotary_dim] of the given dtype.
    """
    frequencies = rotary_frequencies(config, positions.device)
    cos, sin = turns(positions, long, frequencies, config.rope_scale)
    return cos.to(dtype), sin.to(dtype)


def turns(positions: Tensor, long: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in fp32, of `rotary_frequencies`."""
    angles = positions[:, None].float() * frequencies[long.long()]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim components of each head, pairing j with j + rotary_dim / 2.

    x is [tokens, heads, head_dim]; the components after rotary_dim pass through.
    """
    turned, passed = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-second, first), dim=-1) * sin, passed), dim=-1)
