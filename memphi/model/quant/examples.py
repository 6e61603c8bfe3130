"""Tokens of example texts on their way through the decoder, and its layers quantised by what they see of them.

Knows layers as modules, adapters unused, and no files. Called by `checkpoint.calibration`, `checkpoint.filling` and by
benchmarks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memphi.config import LanguageConfig
from memphi.memory.costs import EXAMPLE_BATCH_TOKENS
from memphi.model.adapters import AdaptedLinear
from memphi.model.language import DecoderLayer
from memphi.model.quant.weights import QuantisedWeight, blocks
from memphi.model.rotary import rotary_table
from memphi.model.rows import Packing, Row, pack


@dataclass(frozen=True)
class CalibratedLinear:
    """A layer's linear as it was and as it is quantised."""

    name: str
    """Within the layer."""
    original: Tensor
    weight: QuantisedWeight


class Examples:
    """Whole rows of text between two layers."""

    def __init__(self, config: LanguageConfig, lengths: Sequence[int], hidden: Tensor) -> None:
        """Take rows of so many tokens, end to end, with their embeddings [tokens, hidden], which are written over."""
        self._hidden = hidden
        self._batches: list[tuple[slice, Packing, tuple[Tensor, Tensor]]] = []
        first = 0
        for batch in _divide(lengths):
            packing = pack([Row(length) for length in batch], hidden.device)
            rotary = rotary_table(config, packing.positions, packing.long, hidden.dtype)
            self._batches.append((slice(first, first + sum(batch)), packing, rotary))
            first += sum(batch)

    @torch.no_grad()
    def quantise(self, layer: DecoderLayer, kind: type[QuantisedWeight]) -> Iterator[CalibratedLinear]:
        """Quantise the linears of the next layer one by one, and have the rows go through what comes of it.

        A linear's original has to be done with when the next is asked for: what is stored is then put in its place.
        Raises CheckpointError for inputs that are infinite or none at all.
        """
        hessians = self._hessians(layer)
        for name, linear in adapted_linears(layer).items():
            with torch.device(linear.weight.device):
                weight = kind(linear.out_features, linear.in_features)
            weight.store_calibrated(linear.weight, hessians.pop(name))
            yield CalibratedLinear(name, linear.weight, weight)
            put_in_place(linear, weight)
        self.advance(layer)

    @torch.no_grad()
    def advance(self, layer: DecoderLayer) -> None:
        """Have the rows go through a layer, to where the next one finds them."""
        for span, packing, rotary in self._batches:
            self._hidden[span] = layer(self._hidden[span], packing, rotary, None)

    def _hessians(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """X^T X of what each linear of a layer sees, in fp32: [in, in], by its name within the layer."""
        hessians, hooks = dict[str, Tensor](), []
        for name, linear in adapted_linears(layer).items():
            size, device = linear.in_features, linear.weight.device
            hessians[name] = torch.zeros((size, size), device=device)
            hooks.append(linear.register_forward_pre_hook(_adding_to(hessians[name])))
        for span, packing, rotary in self._batches:
            layer(self._hidden[span], packing, rotary, None)
        for hook in hooks:
            hook.remove()
        return hessians


class StandIn(AdaptedLinear):
    """In the place of a linear, whose weight need not be there, whatever computes its outputs from its inputs."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.base = compute  # type: ignore[assignment,method-assign]


def put_in_place(linear: AdaptedLinear, weight: QuantisedWeight) -> None:
    """Have a linear compute with what a quantised weight stands for."""
    for first, last in blocks(weight.out_features, weight.in_features):
        linear.weight[first:last] = weight.dequantise(first, last, linear.weight.dtype)


def adapted_linears(layer: nn.Module) -> dict[str, AdaptedLinear]:
    """A layer's linears by their names within it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, AdaptedLinear)}


def _adding_to(hessian: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        hessian.addmm_(x.t(), x)

    return add


def _divide(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in order, as many at once as EXAMPLE_BATCH_TOKENS allows, one at least."""
    batches: list[list[int]] = []
    for length in lengths:
        if batches and sum(batches[-1]) + length <= EXAMPLE_BATCH_TOKENS:
            batches[-1].append(length)
        else:
            batches.append([length])
    return batches
