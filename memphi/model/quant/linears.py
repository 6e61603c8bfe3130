"""What takes the place of a linear, of one with adapters, of an adapter, of the embedding, and of a convolution that is
a linear for every moment, where their matrices are quantised.
"""

from typing import cast

import torch
from torch import Tensor, nn

from memphi.memory.costs import dequantised_numbers
from memphi.model.adapters import AdaptedLinear, Adapter, AdapterTokens
from memphi.model.kernels.gate import gate
from memphi.model.kernels.rounding import Bytes
from memphi.model.language import TiedEmbedding
from memphi.model.quant.weights import Int8Weight, QuantisedWeight


class QuantisedLinear(nn.Module):
    """y = W x + b."""

    def __init__(self, linear: nn.Linear | nn.Conv1d, weight: QuantisedWeight) -> None:
        super().__init__()
        self.weight, self.bias = weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.weight(x))
        return y if self.bias is None else y.add_(self.bias)


class QuantisedPointwise(QuantisedLinear):
    """A convolution over time of length one: y = W x + b, with x [..., in, time] as it was."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(-1, -2)).transpose(-1, -2)


class QuantisedAdapter(Adapter):
    """An Adapter with A in int8, a scale for each rank, and B in int8, a scale for each output; both see x as it is."""

    a: Int8Weight  # type: ignore[assignment]  # modules in the parameters' places
    b: Int8Weight  # type: ignore[assignment]

    def __init__(self, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.a, self.b = Int8Weight(*adapter.a.shape), Int8Weight(*adapter.b.shape)
        self.scale, self.dtype = adapter.scale, adapter.a.dtype

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.b(self.a(x)) * self.scale)


class LinearOfCodes(AdaptedLinear):
    """What AdaptedLinears with W in few bits share."""

    @property
    def base_weight(self) -> QuantisedWeight:
        return cast(QuantisedWeight, self.weight)

    def base(self, x: Tensor) -> Tensor:
        return multiply_base(self.base_weight, x)

    def room_for_bytes(self, count: int, like: Tensor, adapter_tokens: AdapterTokens) -> Bytes | None:
        return self.base_weight.room_for_bytes(count, like)


class QuantisedAdaptedLinear(LinearOfCodes):
    """An AdaptedLinear with W in few bits; its adapters, which are quantised by themselves, see x as it is."""

    def __init__(self, linear: AdaptedLinear, weight: QuantisedWeight) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = weight  # type: ignore[assignment]  # a module in the parameter's place
        self.adapters = linear.adapters

    def room_for_bytes(self, count: int, like: Tensor, adapter_tokens: AdapterTokens) -> Bytes | None:
        return None if adapter_tokens else super().room_for_bytes(count, like, adapter_tokens)  # They see x itself.

    def apply_to(
        self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor, in_bytes: Bytes | None = None
    ) -> Tensor:
        assert not adapter_tokens, "a step with adapters needs them packed"
        return multiply_base(self.base_weight, operand, out, in_bytes)

    def apply_in_parts(
        self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor, in_bytes: Bytes | None = None
    ) -> Tensor:
        if adapter_tokens or not self.base_weight.is_for_few(operand):
            return super().apply_in_parts(operand, adapter_tokens, out, in_bytes)
        return self.base_weight.multiply_few(operand, out, None, in_bytes)

    def apply_gated(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        both: Tensor,
        out: Tensor,
        in_bytes: Bytes | None = None,
        made: Bytes | None = None,
    ) -> None:
        if self.base_weight.gates(operand) and not adapter_tokens:
            self.base_weight.multiply_gated(operand, out, None)
        else:
            gate(self.apply_in_parts(operand, adapter_tokens, both, in_bytes), out, made)

    def finish(
        self,
        x: Tensor,
        operand: Tensor | None,
        adapter_tokens: AdapterTokens,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if adapter_tokens:
            return super().finish(x, operand, adapter_tokens, in_bytes, out)
        return multiply_base(self.base_weight, x, out, in_bytes)


def multiply_base(
    weight: QuantisedWeight, x: Tensor, out: Tensor | None = None, in_bytes: Bytes | None = None
) -> Tensor:
    """x W^T with a decoder's weight: x [tokens, in] -> [tokens, out]; in out, where one is given."""
    out = x.new_empty(len(x), weight.out_features) if out is None else out
    weight.multiply(x, out, most_numbers(weight, len(x)), in_bytes)
    return out


def most_numbers(weight: QuantisedWeight, tokens: int) -> int | None:
    """Of a block of a decoder's weight beside so many tokens, as steps through kernels are priced; None: as others."""
    return dequantised_numbers(tokens) if weight.kernels else None


class QuantisedEmbedding(nn.Module):
    """A TiedEmbedding in int8, a scale for each row."""

    def __init__(self, embedding: TiedEmbedding, weight: Int8Weight) -> None:
        super().__init__()
        self.weight, self.dtype = weight, embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.look_up(ids, self.dtype)

    def look_up(self, ids: Tensor, out: Tensor) -> None:
        """As `forward`, into out [tokens, hidden]."""
        self.weight.look_up_into(ids, out)

    def score(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows, hidden] -> [rows, vocab_size]; in out, where one is given."""
        if out is None:
            return cast(Tensor, self.weight(hidden))
        self.weight.multiply(hidden, out)
        return out


def quantised(module: nn.Module, weight: type[QuantisedWeight], others: type[QuantisedWeight]) -> nn.Module | None:
    """What takes a module's place, empty, on the module's device; None where it stays as it is.

    A decoder's linear, which has adapters or had them, is kept in the one form; every other matrix in the other, but
    for adapters and the embedding, which are in int8.
    """
    with torch.device(next(module.parameters(recurse=False), torch.empty(0)).device):
        if type(module) is AdaptedLinear:
            return QuantisedAdaptedLinear(module, weight(module.out_features, module.in_features))
        if type(module) is Adapter:
            return QuantisedAdapter(module)
        if type(module) is nn.Linear:
            return QuantisedLinear(module, others(module.out_features, module.in_features))
        if type(module) is nn.Conv1d and module.kernel_size == (1,) and module.groups == 1:
            return QuantisedPointwise(module, others(module.out_channels, module.in_channels))
        if type(module) is TiedEmbedding:
            return QuantisedEmbedding(module, Int8Weight(module.num_embeddings, module.embedding_dim))
    return None
