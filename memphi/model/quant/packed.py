"""Adapters in one matrix beside a base in few bits, whose columns it cannot share.

    wide [out, first + second]             B of the first adapter | B of the second
    narrow [first + second, in]            A of the first above A of the second
    operand [tokens, first + second + in]  t of the first | t of the second | x

A product with adapters is the base's, and t B^T of the columns in use: by one kernel for few rows; for many a second
product adds it, and y is read, written and rounded once more.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from memphi.model.adapters import AdapterTokens
from memphi.model.kernels.coded import Columns
from memphi.model.packing import PackedLinear
from memphi.model.quant.linears import QuantisedAdaptedLinear
from memphi.model.quant.weights import QuantisedWeight


class PackedQuantisedLinear(PackedLinear):
    """A QuantisedAdaptedLinear whose adapters, by the same names, are views of the two matrices."""

    def __init__(self, linear: QuantisedAdaptedLinear) -> None:
        """Copy the adapters of a linear, two at most; on the meta device, their shapes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.adapters = linear.weight, linear.adapters
        adapters = [linear.adapter(name) for name in linear.adapters]
        first = len(adapters[0].a)
        ranks = sum(len(adapter.a) for adapter in adapters)
        self._t = dict(zip(linear.adapters, (slice(0, first), slice(first, ranks)), strict=False))
        self._a = self._t
        self._x = slice(ranks, ranks + linear.in_features)
        self._shape = linear.out_features, linear.in_features, first, ranks - first
        with torch.no_grad():
            self._view(torch.cat([each.b for each in adapters], 1), torch.cat([each.a for each in adapters]))

    @property
    def base_weight(self) -> QuantisedWeight:
        return cast(QuantisedWeight, self.weight)

    @property
    def width(self) -> int:
        return self._x.stop

    def base(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.base_weight(x))

    def forward(self, x: Tensor, adapter_tokens: AdapterTokens, operand: Tensor | None = None) -> Tensor:
        return super().forward(x, adapter_tokens, operand) if adapter_tokens else self.base(x)

    def apply_to(self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor | None = None) -> Tensor:
        y = operand.new_empty(len(operand), self.out_features) if out is None else out
        adding = [product for product in self._products(adapter_tokens, len(operand)) if product.names]
        self._narrow(operand, adapter_tokens, adding)
        products = [
            (Columns(self.wide[:, product.columns], operand[product.span, product.columns]), product.span)
            for product in adding
        ]
        if len(products) == 1 and len(products[0][0].t) == len(operand):
            self.base_weight.multiply(self.x_of(operand), y, products[0][0])
            return y
        self.base_weight.multiply(self.x_of(operand), y)
        for columns, span in products:
            y[span].addmm_(columns.t, columns.b.t())
        return y

    def columns(self, names: Iterable[str]) -> slice:
        """The columns of the adapters in use."""
        parts = [self._t[name] for name in names]
        return slice(min((part.start for part in parts), default=0), max((part.stop for part in parts), default=0))

    def _view(self, wide: Tensor, narrow: Tensor) -> None:
        self.wide, self.narrow = wide, narrow
        for name in self.adapters:
            adapter = self.adapter(name)
            adapter.b = nn.Parameter(wide[:, self._t[name]], adapter.b.requires_grad)
            adapter.a = nn.Parameter(narrow[self._a[name]], adapter.a.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.base_weight._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module's has no types
        return super()._apply(fn, recurse)
