"""Adapters in one matrix beside a base in few bits, whose columns it cannot share; all of it in int8.

    wide [out, first + second]             B of the first adapter | B of the second, with scales [adapters, out]
    narrow [first + second, in]            A of the first above A of the second, with scales [first + second]
    operand [tokens, first + second + in]  t of the first | t of the second | x

A product with adapters is the base's, and t B^T of the columns in use: by one kernel for few rows; for many a second
product adds it, with a block of B after another in 16 bits, and y is read, written and rounded once more.
"""

from collections.abc import Callable, Collection, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from memphi.model.adapters import AdapterTokens
from memphi.model.kernels.coded import Columns
from memphi.model.kernels.gate import gate
from memphi.model.kernels.skinny import Narrow
from memphi.model.packing import PackedLinear
from memphi.model.quant.linears import QuantisedAdaptedLinear, QuantisedAdapter
from memphi.model.quant.weights import QuantisedWeight, add_columns


class PackedQuantisedLinear(PackedLinear):
    """A QuantisedAdaptedLinear whose adapters, by the same names, are views of the two matrices and their scales."""

    def __init__(self, linear: QuantisedAdaptedLinear) -> None:
        """Copy the adapters of a linear, two at most; on the meta device, their shapes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.adapters = linear.weight, linear.adapters
        adapters = [self.adapter(name) for name in linear.adapters]
        first = len(adapters[0].a.codes)
        ranks = sum(len(adapter.a.codes) for adapter in adapters)
        self._t = dict(zip(linear.adapters, (slice(0, first), slice(first, ranks)), strict=False))
        self._a = self._t
        self._x = slice(ranks, ranks + linear.in_features)
        self._shape = linear.out_features, linear.in_features, first, ranks - first
        self.dtype = adapters[0].dtype
        self._point(
            torch.cat([each.b.codes for each in adapters], 1),
            torch.stack([each.b.scale for each in adapters]),
            torch.cat([each.a.codes for each in adapters]),
            torch.cat([each.a.scale for each in adapters]),
        )

    def adapter(self, name: str) -> QuantisedAdapter:
        return cast(QuantisedAdapter, self.adapters[name])

    @property
    def base_weight(self) -> QuantisedWeight:
        return cast(QuantisedWeight, self.weight)

    @property
    def width(self) -> int:
        return self._x.stop

    def operand(self, tokens: int) -> Tensor:
        return torch.empty((tokens, self.width), dtype=self.dtype, device=self.wide.device)

    def base(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.base_weight(x))

    def forward(self, x: Tensor, adapter_tokens: AdapterTokens, operand: Tensor | None = None) -> Tensor:
        return super().forward(x, adapter_tokens, operand) if adapter_tokens else self.base(x)

    def apply_to(self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor | None = None) -> Tensor:
        y = operand.new_empty(len(operand), self.out_features) if out is None else out
        adding = [product for product in self._products(adapter_tokens, len(operand)) if product.names]
        self._narrow(operand, adapter_tokens, adding)
        products = [(self._columns_of(product.names, operand[product.span]), product.span) for product in adding]
        if len(products) == 1 and len(products[0][0].t) == len(operand):
            self.base_weight.multiply(self.x_of(operand), y, products[0][0])
            return y
        self.base_weight.multiply(self.x_of(operand), y)
        for columns, span in products:
            add_columns(y[span], columns)
        return y

    def apply_gated(self, operand: Tensor, adapter_tokens: AdapterTokens, both: Tensor, out: Tensor) -> None:
        gate(self.apply_to(operand, adapter_tokens, both), out)

    def columns(self, names: Iterable[str]) -> slice:
        """The columns of the adapters in use."""
        parts = [self._t[name] for name in names]
        return slice(min((part.start for part in parts), default=0), max((part.stop for part in parts), default=0))

    def _columns_of(self, names: Collection[str], operand: Tensor) -> Columns:
        """Those of one adapter or of both, beside the t that stands in an operand."""
        at = self.columns(names)
        used = [number for number, name in enumerate(self.adapters) if name in names]
        border = len(self.adapter(list(self.adapters)[used[0]]).a.codes)
        return Columns(self.wide[:, at], self.wide_scale[used[0] : used[-1] + 1], operand[:, at], border)

    def _part(self, operand: Tensor, name: str, uses: Tensor | None) -> Narrow:
        adapter = self.adapter(name)
        return Narrow(adapter.a.codes, adapter.scale, uses, operand[:, self._t[name]], adapter.a.scale)

    def _point(self, wide: Tensor, wide_scale: Tensor, narrow: Tensor, narrow_scale: Tensor) -> None:
        """Make the adapters views of these."""
        self.wide, self.wide_scale, self.narrow, self.narrow_scale = wide, wide_scale, narrow, narrow_scale
        for number, name in enumerate(self.adapters):
            adapter = self.adapter(name)
            adapter.a.codes, adapter.a.scale = narrow[self._a[name]], narrow_scale[self._a[name]]
            adapter.b.codes, adapter.b.scale = wide[:, self._t[name]], wide_scale[number]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.base_weight._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module's has no types
        self._point(fn(self.wide), fn(self.wide_scale), fn(self.narrow), fn(self.narrow_scale))
        return self
