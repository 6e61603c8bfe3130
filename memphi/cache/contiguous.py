"""One sequence's keys and values in one growing block: the plain form of `memphi.model.language.KeyValues`."""

import torch
from torch import Tensor

from memphi.config import LanguageConfig

GROWTH_TOKENS = 256
"""A block grows by at least so many tokens, and by an eighth of what it holds, so that growing stays cheap."""


class ContiguousCache:
    """Keys and values of every layer, valid for one adapter, audio head and rope regime only."""

    def __init__(self, config: LanguageConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.kv_heads, config.head_dim)
        self.keys = [torch.empty(0, *shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.empty(0, *shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = [0] * config.layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [tokens, kv_heads, head_dim] to a layer and return all that it holds, oldest first."""
        start = self.lengths[layer]
        end = start + key.shape[0]
        if end > self.keys[layer].shape[0]:
            self.keys[layer] = _grown(self.keys[layer], start, end)
            self.values[layer] = _grown(self.values[layer], start, end)
        self.keys[layer][start:end] = key
        self.values[layer][start:end] = value
        self.lengths[layer] = end
        return self.keys[layer][:end], self.values[layer][:end]


def _grown(block: Tensor, used: int, needed: int) -> Tensor:
    capacity = needed + max(GROWTH_TOKENS, needed // 8)
    larger = block.new_empty(capacity, *block.shape[1:])
    larger[:used] = block[:used]
    return larger
