"""Adapters as columns of the weight they adapt, for inference: one product computes a linear and its adapters.

    wide [out, left + in + right]         B of the first adapter | W | B of the second
    narrow [left + right, in]             A of the first above A of the second
    operand [tokens, left + in + right]   t of the first | x | t of the second, where t = scale * A x

With no adapter in use, or one, the product takes a range of the columns, which is a view. A token that does not use an
adapter of the range has zeros for its t. `AdaptedLinear` is the definition, and what training keeps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from memphi.model.adapters import AdaptedLinear, AdapterTokens, Uses, as_mask, multiply, multiply_gated
from memphi.model.kernels import narrow
from memphi.model.kernels.narrow import Narrow
from memphi.model.kernels.rounding import Bytes

READ_TOKENS = 256
"""To read a weight takes as long as to multiply so many tokens by it (an H100: 794 TFLOP/s, 3.1 TB/s, 2 bytes)."""

Span = tuple[str | None, slice]
"""Tokens side by side, and the adapter that all of them use."""


@dataclass(frozen=True)
class Product:
    """A product for some tokens side by side."""

    names: tuple[str, ...]
    """The adapters that it applies, each to those of the tokens that use it."""
    columns: slice
    span: slice


class PackedLinear(AdaptedLinear):
    """An AdaptedLinear whose parameters, by the same names, are views of the two packed matrices.

    Whoever computes x may do so in its place in an operand: `operand`, `x_of`, then `apply_to`.
    """

    def __init__(self, linear: AdaptedLinear) -> None:
        """Copy a linear of at most two adapters; on the meta device, its shapes."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.adapters = linear.weight, linear.adapters
        n_out, n_in = linear.weight.shape
        left, right = ([len(linear.adapter(name).a) for name in linear.adapters] + [0, 0])[:2]
        self._x = slice(left, left + n_in)
        ends = (slice(0, left), slice(left + n_in, left + n_in + right))
        self._t = dict(zip(linear.adapters, ends, strict=False))
        self._a = dict(zip(linear.adapters, (slice(0, left), slice(left, left + right)), strict=False))
        with torch.no_grad():
            wide, narrow = linear.weight.new_empty(n_out, ends[1].stop), linear.weight.new_empty(left + right, n_in)
            wide[:, self._x] = linear.weight
            for name in linear.adapters:
                wide[:, self._t[name]], narrow[self._a[name]] = linear.adapter(name).b, linear.adapter(name).a
        self._shape = n_out, n_in, left, right
        self._view(wide, narrow)

    def forward(
        self,
        x: Tensor,
        adapter_tokens: AdapterTokens,
        operand: Tensor | None = None,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As the definition; an operand holds x already. Raises RuntimeError where gradients are asked for."""
        if not adapter_tokens:
            out = x.new_empty(len(x), self.out_features) if out is None else out
            return multiply(x, self.weight, out, self.kernels)
        if operand is None:
            operand = self.operand(len(x))
            self.x_of(operand).copy_(x)
        return self.apply_to(operand, adapter_tokens, out, in_bytes)

    def operand_for(self, count: int, adapter_tokens: AdapterTokens) -> Tensor | None:
        return self.operand(count) if adapter_tokens else None

    def finish(
        self,
        x: Tensor,
        operand: Tensor | None,
        adapter_tokens: AdapterTokens,
        in_bytes: Bytes | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return cast(Tensor, self(x, adapter_tokens, operand, in_bytes, out))

    @property
    def width(self) -> int:
        """Columns of an operand."""
        return self.wide.shape[1]

    def operand(self, tokens: int) -> Tensor:
        """Room for x and for what the adapters make of it: [tokens, left + in + right]."""
        return self.wide.new_empty(tokens, self.width)

    def x_of(self, operand: Tensor) -> Tensor:
        """The place of x in an operand: a view [tokens, in]."""
        return operand[:, self._x]

    def apply_to(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        out: Tensor | None = None,
        in_bytes: Bytes | None = None,
    ) -> Tensor:
        """Apply to the x that stands in an operand, whose other columns are overwritten; into out [tokens, out]."""
        y = operand.new_empty(len(operand), self.out_features) if out is None else out
        for x, weight, span in self._factors(operand, adapter_tokens):
            multiply(x, weight, y[span], self.kernels)
        return y

    def apply_gated(
        self,
        operand: Tensor,
        adapter_tokens: AdapterTokens,
        both: Tensor,
        out: Tensor,
        in_bytes: Bytes | None = None,
        made: Bytes | None = None,
    ) -> None:
        assert made is None, "rows in bytes are for weights in few bits, and all of a layer are"
        for x, weight, span in self._factors(operand, adapter_tokens):
            multiply_gated(x, weight, both[span], out[span], self.kernels)

    def _factors(self, operand: Tensor, adapter_tokens: AdapterTokens) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """What is to be multiplied by what, and for which tokens; every t is in its place."""
        products = self._products(adapter_tokens, len(operand))
        self._narrow(operand, adapter_tokens, products)
        for product in products:
            yield operand[product.span, product.columns], self.wide[:, product.columns], product.span

    def columns(self, names: Iterable[str]) -> slice:
        """The columns of a product in which these adapters are in use."""
        parts = [self._x, *(self._t[name] for name in names)]
        return slice(min(part.start for part in parts), max(part.stop for part in parts))

    def _products(self, adapter_tokens: AdapterTokens, count: int) -> list[Product]:
        """The products that take the least: one for all tokens, or one for each span of its own columns.

        Each reads the weights anew.
        """
        known: list[Product] | None = adapter_tokens.products.get(self._shape)
        if known is None:
            whole = [self._product(list(adapter_tokens), slice(0, count))]
            apart = [self._product([name] if name else [], span) for name, span in _spans(adapter_tokens, count)]
            known = apart if apart and sum(map(_price, apart)) < sum(map(_price, whole)) else whole
            adapter_tokens.products[self._shape] = known
        return known

    def _product(self, names: Sequence[str], span: slice) -> Product:
        return Product(tuple(names), self.columns(names), span)

    def _narrow(self, operand: Tensor, adapter_tokens: AdapterTokens, products: Sequence[Product]) -> None:
        """Put every t = scale * A x that a product reads in its place, scaled before it is rounded.

        Zeros for a product's tokens that do not use the adapter.
        """
        if masks := self._masks_at_once(operand, adapter_tokens):
            narrow.narrow(self.x_of(operand), [self._part(operand, *each) for each in masks.items()])
            return
        for product in products:
            for name in product.names:
                self._narrow_plainly(operand, name, adapter_tokens[name], product.span)

    def _masks_at_once(self, operand: Tensor, adapter_tokens: AdapterTokens) -> dict[str, Tensor | None]:
        """Masks of the adapters in use, where one launch makes every t, and zeros for tokens without it; else none."""
        used = [(name, adapter_tokens.mask(name)) for name in self.adapters if name in adapter_tokens]
        masks = {name: tokens for name, tokens in used if _is_mask(tokens)}
        return masks if len(masks) == len(used) and self._narrows_at_once(operand, list(masks.values())) else {}

    def _narrows_at_once(self, operand: Tensor, masks: Sequence[Tensor | None]) -> bool:
        """Whether a kernel does so for these."""
        if not (self.kernels and len(operand) <= narrow.most_rows(operand.device)):
            return False
        # What all of many tokens use, torch's own product makes at less expense of the host.
        return len(operand) <= narrow.MOST_VECTOR_ROWS or any(mask is not None for mask in masks)

    def _narrow_plainly(self, operand: Tensor, name: str, tokens: Uses, span: slice) -> None:
        if tokens == span or tokens is None:
            within = operand[span]
            narrow.plain_narrow(self.x_of(within), [self._wide_part(within, name, None)])
        elif isinstance(tokens, slice):
            self._narrow_plainly(operand, name, tokens, tokens)
            operand[span.start : tokens.start, self._t[name]] = 0
            operand[tokens.stop : span.stop, self._t[name]] = 0
        else:
            mask = as_mask(tokens, len(operand), operand.device)
            narrow.plain_narrow(self.x_of(operand), [self._wide_part(operand, name, mask)])

    def _part(self, operand: Tensor, name: str, uses: Tensor | None) -> Narrow:
        adapter = self.adapter(name)
        return Narrow(adapter.a, adapter.scale, uses, operand[:, self._t[name]])

    def _wide_part(self, operand: Tensor, name: str, uses: Tensor | None) -> Narrow:
        """The same with an A of numbers."""
        return self._part(operand, name, uses)

    def _view(self, wide: Tensor, narrow: Tensor) -> None:
        """Make the parameters views of these."""
        trains = self.weight.requires_grad
        self.wide, self.narrow = wide, narrow
        self.weight = nn.Parameter(wide[:, self._x], trains)
        for name in self.adapters:
            adapter = self.adapter(name)
            adapter.b = nn.Parameter(wide[:, self._t[name]], trains)
            adapter.a = nn.Parameter(narrow[self._a[name]], trains)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """What `to`, `to_empty` and their like go through: the matrices are changed, the views follow."""
        self._view(fn(self.wide), fn(self.narrow))
        return self


def pack_adapters(model: nn.Module, forms: Mapping[type[nn.Module], Callable[[Any], PackedLinear]]) -> None:
    """Swap every linear of these kinds for its packed form; needs the memory of one of them beside the model."""
    # Paths, not modules: a list of those would keep what is swapped out.
    for path in [path for path, module in model.named_modules() if type(module) in forms]:
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above)
        linear = getattr(parent, name)
        setattr(parent, name, forms[type(linear)](linear))
        del linear


def _price(product: Product) -> int:
    return max(_length(product.span), READ_TOKENS) * _length(product.columns)


def _length(span: slice) -> int:
    return int(span.stop) - int(span.start)


def _is_mask(tokens: Uses) -> TypeGuard[Tensor | None]:
    """Whether these are the tokens of a mask, or all."""
    return tokens is None or (isinstance(tokens, Tensor) and tokens.dtype is torch.bool)


def _spans(adapter_tokens: AdapterTokens, count: int) -> list[Span]:
    """Tokens divided by the adapter they use; empty where those of one do not stand side by side, or use two."""
    if any(isinstance(tokens, Tensor) for tokens in adapter_tokens.values()):
        return []
    everything = slice(0, count)
    parts = [(tokens if isinstance(tokens, slice) else everything, name) for name, tokens in adapter_tokens.items()]
    spans: list[Span] = []
    end = 0
    for part, name in sorted(parts, key=lambda item: item[0].start):
        if part.start < end:
            return []
        if part.start > end:
            spans.append((None, slice(end, part.start)))
        spans.append((name, part))
        end = part.stop
    return [*spans, (None, slice(end, count))] if end < count else spans
