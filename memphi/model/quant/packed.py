"""Adapters in one matrix beside a base in few bits, whose columns it cannot share; all of it in int8.

    wide [out, first + second]             B of the first adapter | B of the second, with scales [adapters, out]
    narrow [first + second, in]            A of the first above A of the second, with scales [first + second]
    operand [tokens, first + in + second]  t of the first | x | t of the second

A product with adapters is the base's, and t B^T of the columns in use: by one kernel for few rows. For many a block of
the base is made 16 bits again with those columns beside it, as `PackedLinear` has them always. Where the base is
multiplied as it is, another pass adds the adapters, and y is read, written and rounded once more.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from memphi.model.adapters import AdapterTokens
from memphi.model.kernels import narrow
from memphi.model.kernels.beside import beside
from memphi.model.kernels.coded import Columns
from memphi.model.kernels.dequantise import dequantise, plain_write_columns, write_columns
from memphi.model.kernels.gate import gate
from memphi.model.kernels.launch import is_available
from memphi.model.kernels.narrow import Narrow
from memphi.model.kernels.parts import sum_up
from memphi.model.kernels.rounding import Bytes
from memphi.model.kernels.shares import add_to, adds_at_once, write_share
from memphi.model.packing import PackedLinear, Product
from memphi.model.quant.linears import (
    LinearOfCodes,
    QuantisedAdaptedLinear,
    QuantisedAdapter,
    most_numbers,
    multiply_base,
)
from memphi.model.quant.weights import blocks, multiply_by_blocks

MOST_BESIDE = 256
"""Up to so many rows neither torch's product nor what adapters add to it fills a card."""


class PackedQuantisedLinear(LinearOfCodes, PackedLinear):
    """A QuantisedAdaptedLinear whose adapters, by the same names, are views of the two matrices and their scales."""

    def __init__(self, linear: QuantisedAdaptedLinear) -> None:
        """Copy the adapters of a linear, two at most; on the meta device, their shapes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.adapters = linear.weight, linear.adapters
        adapters = [self.adapter(name) for name in linear.adapters]
        first = len(adapters[0].a.codes)
        ranks = sum(len(adapter.a.codes) for adapter in adapters)
        self._x = slice(first, first + linear.in_features)
        self._width = ranks + linear.in_features
        self._t = dict(zip(linear.adapters, (slice(0, first), slice(self._x.stop, self._width)), strict=False))
        self._a = dict(zip(linear.adapters, (slice(0, first), slice(first, ranks)), strict=False))
        self._shape = linear.out_features, linear.in_features, first, ranks - first
        self.dtype = adapters[0].dtype
        codes, scale = adapters[0].a.codes, adapters[0].a.scale
        wide, wide_scale = codes.new_empty(self.out_features, ranks), scale.new_empty(len(adapters), self.out_features)
        narrow, narrow_scale = codes.new_empty(ranks, self.in_features), scale.new_empty(ranks)
        # Not joined: on the meta device that would bring torch's compiler along, a second or more of every start.
        for number, (name, adapter) in enumerate(zip(linear.adapters, adapters, strict=True)):
            at = self._a[name]
            wide[:, at], wide_scale[number] = adapter.b.codes, adapter.b.scale
            narrow[at], narrow_scale[at] = adapter.a.codes, adapter.a.scale
        self._point(wide, wide_scale, narrow, narrow_scale)

    def adapter(self, name: str) -> QuantisedAdapter:
        return cast(QuantisedAdapter, self.adapters[name])

    @property
    def width(self) -> int:
        return self._width

    def operand(self, tokens: int) -> Tensor:
        return torch.empty((tokens, self.width), dtype=self.dtype, device=self.wide.device)

    def forward(
        self,
        x: Tensor,
        adapter_tokens: AdapterTokens,
        operand: Tensor | None = None,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        if not adapter_tokens:
            return multiply_base(self.base_weight, x, out, in_bytes)
        return super().forward(x, adapter_tokens, operand, in_bytes, out)

    def apply_to(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        out: Tensor | None = None,
        in_bytes: Bytes | None = None,
    ) -> Tensor:
        y = operand.new_empty(len(operand), self.out_features) if out is None else out
        sum_up(self.apply_in_parts(operand, adapter_tokens, y, in_bytes), y)
        return y

    def apply_in_parts(
        self, operand: Tensor, adapter_tokens: AdapterTokens, out: Tensor, in_bytes: Bytes | None = None
    ) -> Tensor:
        products, x, weight = self._products(adapter_tokens, len(operand)), self.x_of(operand), self.base_weight
        is_for_few = weight.is_for_few(x) and len(products) == 1
        if is_for_few and in_bytes is None:
            in_bytes = weight.bytes_of(x)  # Before what makes t, which such a product does not wait for.
        if self._leaves_room(x) and (masks := self._masks_at_once(operand, adapter_tokens)):
            return self._multiply_beside(operand, adapter_tokens, masks, out, in_bytes)
        self._narrow(operand, adapter_tokens, [product for product in products if product.names])
        if is_for_few:
            return weight.multiply_few(x, out, self._columns_of(products[0].names, operand), in_bytes)
        if weight.makes_blocks(x):
            self._multiply_by_blocks(operand, products, out)
        else:
            weight.multiply_many(x, out, None, in_bytes)
            self._add_adapters(operand, adapter_tokens, products, out)
        return out[None]

    def _leaves_room(self, x: Tensor) -> bool:
        """Whether what adapters make of such rows finds room on a card beside torch's product with the base."""
        weight = self.base_weight
        by_torch = not (weight.is_for_few(x) or weight.makes_blocks(x))
        return by_torch and len(x) <= MOST_BESIDE and adds_at_once(x.device)

    def _multiply_beside(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        masks: Mapping[str, Tensor | None],
        like: Tensor,
        in_bytes: Bytes | None,
    ) -> Tensor:
        """The base's product and what the adapters in use add, side by side: [2, rows, out]."""
        made, columns = like.new_empty((2, *like.shape)), self._columns_of(masks, operand)
        assert columns is not None
        with beside(operand.device) as join:
            self._narrow(operand, adapter_tokens, ())
            write_share(made[1], columns, list(masks.values()))
        try:
            self.base_weight.multiply_many(self.x_of(operand), made[0], None, in_bytes)
        finally:
            join()  # Or what is written beside it might be freed before.
        return made

    def apply_gated(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        both: Tensor,
        out: Tensor,
        in_bytes: Bytes | None = None,
        made: Bytes | None = None,
    ) -> None:
        products, x, weight = self._products(adapter_tokens, len(operand)), self.x_of(operand), self.base_weight
        if not (weight.gates(x) and len(products) == 1):
            gate(self.apply_in_parts(operand, adapter_tokens, both, in_bytes), out, made)
            return
        self._narrow(operand, adapter_tokens, products)
        weight.multiply_gated(x, out, self._columns_of(products[0].names, operand))

    def _multiply_by_blocks(self, operand: Tensor, products: Sequence[Product], y: Tensor) -> None:
        """y = the products, whose adapters' t are in their places, by blocks of the base and of every B in use."""
        used = {name for product in products for name in product.names}
        names = [name for name in self.adapters if name in used]
        everything, columns = self.columns(names), self._columns_of(names, operand)

        def moved(at: slice) -> slice:
            return slice(at.start - everything.start, at.stop - everything.start)

        writers = [(self.base_weight.write_block, moved(self._x))]
        if columns is not None:
            write = write_columns if self.kernels and is_available(y.device) else plain_write_columns
            at = slice(self._t[names[0]].start, self._t[names[-1]].stop)
            writers.append((partial(write, columns), moved(at)))
        factors = [(operand[each.span, each.columns], moved(each.columns), each.span) for each in products]
        multiply_by_blocks(writers, factors, y, most_numbers(self.base_weight, len(operand)))

    def _add_adapters(
        self, operand: Tensor, adapter_tokens: AdapterTokens, products: Sequence[Product], y: Tensor
    ) -> None:
        """y += t B^T of the adapters in use."""
        masks = self._masks_at_once(operand, adapter_tokens)
        columns = self._columns_of(masks, operand)
        if columns is not None and adds_at_once(y.device):
            add_to(y, columns, list(masks.values()))
        else:
            self._add_by_blocks(operand, products, y)

    def _add_by_blocks(self, operand: Tensor, products: Sequence[Product], y: Tensor) -> None:
        """The same, a product after another, and a block of B."""
        for product in products:
            for name in product.names:
                b, t, rows = self.adapter(name).b, operand[product.span, self._t[name]], y[product.span]
                for first, last in blocks(b.out_features, b.in_features):
                    wide = y.new_empty(last - first, b.in_features)
                    b.write_block(first, wide)
                    rows[:, first:last].addmm_(t, wide.t())
                    del wide  # Or the next one would come beside it.

    def _narrow(self, operand: Tensor, adapter_tokens: AdapterTokens, products: Sequence[Product]) -> None:
        """As of any PackedLinear; of two adapters' A, for many tokens, all is made 16 bits first, in one launch."""
        masks = self._masks_at_once(operand, adapter_tokens) if len(operand) > narrow.MOST_ROWS else {}
        if len(masks) < 2:
            super()._narrow(operand, adapter_tokens, products)
            return
        wide, x = operand.new_empty(self.narrow.shape), self.x_of(operand)
        dequantise(self.narrow, self.narrow_scale, wide)
        parts = {name: self._part(operand, name, mask, wide[self._a[name]]) for name, mask in masks.items()}
        if self._is_told_apart(products, adapter_tokens) and self.base_weight.makes_blocks(x):
            for product in products:
                (name,), span = product.names, product.span
                narrow.plain_narrow(x[span], [replace(parts[name], uses=None, t=parts[name].t[span])])
        else:
            narrow.narrow(x, list(parts.values()))

    def _is_told_apart(self, products: Sequence[Product], adapter_tokens: AdapterTokens) -> bool:
        """Whether each is of the tokens of one adapter, and nobody reads what others have for its t."""
        uses = [(product.span, adapter_tokens[name]) for product in products for name in product.names]
        return len(uses) == len(products) and all(isinstance(each, slice) and each == span for span, each in uses)

    def _narrows_at_once(self, operand: Tensor, masks: Sequence[Tensor | None]) -> bool:
        return self.kernels and len(operand) <= narrow.most_rows(operand.device, of_two=len(masks) > 1)

    def _columns_of(self, names: Collection[str], operand: Tensor) -> Columns | None:
        """Those of one adapter or of both, beside the t that stands in an operand; None for none."""
        used = [number for number, name in enumerate(self.adapters) if name in names]
        if not used:
            return None
        parts = [self._a[name] for name in names]
        codes = self.wide[:, min(part.start for part in parts) : max(part.stop for part in parts)]
        t = tuple(operand[:, self._t[name]] for name in self.adapters if name in names)
        return Columns(codes, self.wide_scale[used[0] : used[-1] + 1], t)

    def _part(self, operand: Tensor, name: str, uses: Tensor | None, wide: Tensor | None = None) -> Narrow:
        """With A in codes, or as it is here."""
        adapter, t = self.adapter(name), operand[:, self._t[name]]
        if wide is None:
            return Narrow(adapter.a.codes, adapter.scale, uses, t, adapter.a.scale)
        return Narrow(wide, adapter.scale, uses, t)

    def _wide_part(self, operand: Tensor, name: str, uses: Tensor | None) -> Narrow:
        codes = self.adapter(name).a
        wide = operand.new_empty(codes.codes.shape)
        codes.write_block(0, wide)
        return self._part(operand, name, uses, wide)

    def _point(self, wide: Tensor, wide_scale: Tensor, narrow: Tensor, narrow_scale: Tensor) -> None:
        """Make the adapters views of these."""
        self.wide, self.wide_scale, self.narrow, self.narrow_scale = wide, wide_scale, narrow, narrow_scale
        for number, name in enumerate(self.adapters):
            adapter = self.adapter(name)
            adapter.a.codes, adapter.a.scale = narrow[self._a[name]], narrow_scale[self._a[name]]
            adapter.b.codes, adapter.b.scale = wide[:, self._a[name]], wide_scale[number]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.base_weight._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module's has no types
        self._point(fn(self.wide), fn(self.wide_scale), fn(self.narrow), fn(self.narrow_scale))
        return self
