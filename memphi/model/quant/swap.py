"""Which modules of a model are kept under a scheme, and filling them piece by piece from weights of 16 bits."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from memphi.config import Scheme
from memphi.errors import CheckpointError
from memphi.memory.costs import QUANTISED_NUMBERS
from memphi.model.quant.linears import quantised
from memphi.model.quant.weights import WEIGHTS, QuantisedWeight

ReadRows = Callable[[int, int], Tensor]
"""Gives a weight's outputs from one to before another: [last - first, in], or as `store` takes them."""


@torch.no_grad()
def quantise(model: nn.Module, scheme: Scheme, other_scheme: Scheme) -> None:
    """Swap every linear, adapter, pointwise convolution over time and the embedding for one in few bits, in place.

    Linears of the decoder, which have adapters, are kept under the first, all others under the second. Needs the memory
    of one linear in few bits beside the model; on the meta device none, and `fill` is for whoever has the weights.
    """
    if scheme == "bf16":
        return
    for path in [path for path, _ in model.named_modules()]:  # Paths: a list of modules would keep those that go.
        above, _, name = path.rpartition(".")
        if (other := _quantised(model.get_submodule(path), path, scheme, other_scheme)) is not None:
            setattr(model.get_submodule(above), name, other)


def _quantised(module: nn.Module, path: str, scheme: Scheme, other_scheme: Scheme) -> nn.Module | None:
    """What takes a module's place, with its matrices quantised unless they are on the meta device."""
    other = quantised(module, WEIGHTS[scheme], WEIGHTS[other_scheme])
    for name, weight in quantised_weights(other).items() if other is not None else ():
        matrix = module.get_parameter(name)
        if not matrix.is_meta:
            store(weight, f"{path}.{name}", 0, matrix)
    return other


def quantised_weights(model: nn.Module) -> dict[str, QuantisedWeight]:
    """The quantised weights inside, by the names that they have where they are not quantised."""
    return {path: weight for path, weight in model.named_modules() if isinstance(weight, QuantisedWeight)}


def fill(weight: QuantisedWeight, name: str, read_rows: ReadRows) -> None:
    """Quantise a weight from what is read, piece by piece; raises CheckpointError for a number that is none."""
    for first, last in pieces(weight.out_features, weight.in_features):
        store(weight, name, first, read_rows(first, last))


@torch.no_grad()
def fill_by_inputs(weight: QuantisedWeight, name: str, read_rows: ReadRows, x: Tensor) -> Tensor:
    """`fill`, with codes that suit inputs x [tokens, in]; returns x W^T, with what is read.

    Raises CheckpointError also for inputs that are infinite or none at all.
    """
    y, squares = x.new_empty(len(x), weight.out_features), x.float().square().sum(0)
    for first, last in pieces(weight.out_features, weight.in_features):
        rows = read_rows(first, last)
        y[:, first:last] = x @ rows.t().to(x.dtype)
        store(weight, name, first, rows, squares)
    return y


@torch.no_grad()
def store(weight: QuantisedWeight, name: str, first: int, rows: Tensor, squares: Tensor | None = None) -> None:
    """Quantise the outputs from `first` on, piece by piece; raises CheckpointError for a number that is none.

    Those of a convolution have an axis more, of length one. squares: as `QuantisedWeight.store` takes them.
    """
    rows = rows.flatten(1)
    for start, end in pieces(*rows.shape):
        weight.store(first + start, checked(rows[start:end], name), squares)


def pieces(rows: int, columns: int, most_numbers: int | None = None) -> Iterator[tuple[int, int]]:
    """Rows from one to before another, so many that a piece has most_numbers at most, or is one row.

    None: as many as are quantised at once.
    """
    most = max((most_numbers or QUANTISED_NUMBERS) // columns, 1)
    for first in range(0, rows, most):
        yield first, min(first + most, rows)


def checked(rows: Tensor, name: str) -> Tensor:
    """The rows, if all their numbers are finite: one that is not would spoil its whole group in silence."""
    if not torch.isfinite(rows).all():
        raise CheckpointError(f"{name} holds a number that is infinite or none at all; it cannot be quantised")
    return rows
