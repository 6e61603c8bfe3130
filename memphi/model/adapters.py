"""A linear layer with named LoRA adapters, chosen per token (spec 3.2).

W, A and B are separate parameters: this is the definition that every faster packing must equal.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.config import AdapterConfig
from memphi.memory.costs import MERGED_NUMBERS
from memphi.model.kernels import skinny
from memphi.model.kernels.gate import gate
from memphi.model.kernels.rounding import Bytes

Uses = slice | Tensor | None
"""The packed tokens that an adapter applies to: all (None), those of a slice, those of an index [n] int64, or those of
a mask [tokens] bool, which may change while the kernels that read it stay."""


class AdapterTokens(dict[str, Uses]):
    """The tokens of each adapter in use, in one step."""

    def __init__(self, uses: Mapping[str, Uses] | None = None) -> None:
        super().__init__(uses or {})
        self.products: dict[tuple[int, ...], Any] = {}
        """What linears of one shape decided on: they are many, and the host is to think once."""
        self._masks: dict[str, Tensor | None] = {}

    def make_masks(self, count: int, device: torch.device) -> None:
        """Have `mask` give a mask of `count` tokens for each adapter, or None for all.

        Kernels read masks without waiting for what was launched before, so they are made ahead of a step's layers.
        """
        self._masks = {name: as_mask(tokens, count, device) for name, tokens in self.items()}

    def mask(self, name: str) -> Uses:
        """An adapter's tokens, as a mask where masks were made."""
        return self._masks.get(name, self[name])


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

    kernels = False
    """Whether few tokens go through memphi's own kernels, where the device has them."""

    def __init__(self, in_features: int, out_features: int, adapters: Mapping[str, AdapterConfig]) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.adapters = nn.ModuleDict(
            {name: Adapter(in_features, out_features, config) for name, config in adapters.items()}
        )

    def adapter(self, name: str) -> Adapter:
        return cast(Adapter, self.adapters[name])

    def forward(self, x: Tensor, adapter_tokens: AdapterTokens) -> Tensor:
        """Apply to packed tokens: [tokens, in] -> [tokens, out]."""
        y = self.base(x)
        for name, tokens in adapter_tokens.items():
            y = _add(y, self.adapter(name), x, tokens)
        return y

    def base(self, x: Tensor) -> Tensor:
        """W x by itself: [tokens, in] -> [tokens, out]."""
        return F.linear(x, self.weight)

    @property
    def width(self) -> int:
        """Columns of an operand: of a tensor in which x stands for `apply_to`, beside what else that needs."""
        return self.in_features

    def x_of(self, operand: Tensor) -> Tensor:
        """The place of x in an operand: a view [tokens, in]."""
        return operand

    def room_for_bytes(self, count: int, like: Tensor, adapter_tokens: AdapterTokens) -> Bytes | None:
        """Room for so many x of like's dtype in bytes, where whoever makes x saves a pass by filling it."""
        return None

    def apply_to(
        self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor, in_bytes: Bytes | None = None
    ) -> Tensor:
        """Apply to the x that stands in an operand, for inference; adapters have to be packed for it. Into out.

        in_bytes: the same x, in what `room_for_bytes` gave.
        """
        assert not adapter_tokens, "a step with adapters needs them packed"
        return multiply(self.x_of(operand), self.weight, out, self.kernels)

    def apply_in_parts(
        self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor, in_bytes: Bytes | None = None
    ) -> Tensor:
        """`apply_to` in parts [parts, tokens, out], for whoever sums them in a pass of its own: out alone, or not."""
        return self.apply_to(operand, adapter_tokens, out, in_bytes)[None]

    def apply_gated(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        both: Tensor,
        out: Tensor,
        in_bytes: Bytes | None = None,
        made: Bytes | None = None,
    ) -> None:
        """`apply_to`, where what comes of it is gates and then what they let through: that, into out [tokens, out / 2].

        both [tokens, out] is room for the one and the other, which few rows do not need; made, where there is some, is
        filled with out, which weights in few bits alone do.
        """
        assert made is None, "rows in bytes are for weights in few bits, and all of a layer are"
        assert not adapter_tokens, "a step with adapters needs them packed"
        multiply_gated(self.x_of(operand), self.weight, both, out, self.kernels)

    def operand_for(self, count: int, adapter_tokens: AdapterTokens) -> Tensor | None:
        """Where so many x are to stand for `finish`: in `x_of` it; None where they may stand anywhere."""
        return None

    def finish(
        self,
        x: Tensor,
        operand: Tensor | None,
        adapter_tokens: AdapterTokens,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Apply to x [tokens, in], which stands in what `operand_for` gave, if it gave any; in out, if given.

        in_bytes: the same x, in what `room_for_bytes` gave; without an operand x itself need not be there then.
        """
        return cast(Tensor, self(x, adapter_tokens)) if out is None else self.apply_to(x, adapter_tokens, out)

    def follow(
        self,
        compute: Callable[[Tensor | None], Tensor],
        count: int,
        adapter_tokens: AdapterTokens,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`finish` what `compute` gives, [count, in], which it puts into the tensor that it is called with, if any."""
        operand = self.operand_for(count, adapter_tokens)
        x = compute(None if operand is None else self.x_of(operand))
        return self.finish(x, operand, adapter_tokens, in_bytes, out)


def multiply(x: Tensor, weight: Tensor, out: Tensor, kernels: bool) -> Tensor:
    """x W^T into out, by the fastest there is for so many tokens."""
    if kernels and len(x) <= skinny.most_rows(x.device):
        skinny.multiply(x, weight, out)
    else:
        skinny.plain_multiply(x, weight, out)
    return out


def multiply_gated(x: Tensor, weight: Tensor, both: Tensor, out: Tensor, kernels: bool) -> None:
    """The same through a gate: at once for few rows, else by way of both."""
    if kernels and len(x) <= skinny.most_rows(x.device):
        skinny.multiply(x, weight, out, gated=True)
    else:
        skinny.plain_multiply(x, weight, both)
        gate(both, out)


def _add(y: Tensor, adapter: Adapter, x: Tensor, tokens: Uses) -> Tensor:
    """y with an adapter's share for its tokens."""
    if tokens is None:
        return y + cast(Tensor, adapter(x))
    if isinstance(tokens, slice):
        return torch.cat((y[: tokens.start], y[tokens] + adapter(x[tokens]), y[tokens.stop :]))
    if tokens.dtype is torch.bool:
        return torch.where(tokens[:, None], y + adapter(x), y)
    return y.index_add(0, tokens, adapter(x.index_select(0, tokens)))  # On CUDA the gradient of x[tokens] would sort.


def as_mask(tokens: Uses, count: int, device: torch.device) -> Tensor | None:
    """Tokens as a mask of `count`; None: all."""
    if isinstance(tokens, slice):
        mask = torch.zeros(count, dtype=torch.bool, device=device)
        mask[tokens] = True
        return mask
    if tokens is None or tokens.dtype is torch.bool:
        return tokens
    return tokens.new_zeros(count, dtype=torch.bool).index_fill_(0, tokens, True)


def remove_adapters(model: nn.Module) -> None:
    """Leave the weights alone, in place: for a model into whose weights an adapter is merged."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.adapters = nn.ModuleDict()


def merge_adapter(
    weight: Tensor, a: Tensor, scale: float, read_rows: Callable[[int, int], tuple[Tensor, Tensor]]
) -> None:
    """Fill a weight with W + scale * B A, computed in fp32 and rounded once.

    read_rows gives W and B for outputs from one to before another; so no more than a few pieces are needed beside it.
    """
    wide = a.float()
    rows = max(MERGED_NUMBERS // weight.shape[1], 1)
    for first in range(0, len(weight), rows):
        last = min(first + rows, len(weight))
        w, b = read_rows(first, last)
        weight[first:last] = torch.addmm(w.float(), b.float(), wide, alpha=scale)
