"""A linear layer with named LoRA adapters, chosen per token (spec 3.2).

W, A and B are separate parameters: this is the definition that every faster packing must equal.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.config import AdapterConfig


class Adapter(nn.Module):
    """y = scale * B (A x), each product rounded to the weights' dtype as in the reference."""

    def __init__(self, in_features: int, out_features: int, config: AdapterConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, config.rank))
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b) * self.scale


class AdaptedLinear(nn.Module):
    """y = W x, plus for each token the adapter that its row uses."""

    def __init__(self, in_features: int, out_features: int, adapters: Mapping[str, AdapterConfig]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.adapters = nn.ModuleDict(
            {name: Adapter(in_features, out_features, config) for name, config in adapters.items()}
        )

    def forward(self, x: Tensor, adapter_tokens: Mapping[str, Tensor | None]) -> Tensor:
        """Apply to packed tokens.

        x is [tokens, in]; adapter_tokens names, for each adapter in use, the tokens it applies to (None: all).
        Returns [tokens, out].
        """
        y = F.linear(x, self.weight)
        for name, tokens in adapter_tokens.items():
            adapter = self.adapters[name]
            y = y + adapter(x) if tokens is None else y.index_add(0, tokens, adapter(x[tokens]))
        return y
