"""Rounding a matrix on example inputs, so that a product with it loses little: GPTQ (Frantar et al. 2022).

What a product loses, |X W^T - X Q^T|, depends on the inputs X by X^T X alone, here called the Hessian. Columns are
rounded one after another, those of the largest inputs first, and the error of each is fed forward into the columns
still to come, as far as their inputs come with its own. Called by `weights`; `examples` sees to the inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memphi.errors import CheckpointError

DAMPINGS = (0.01, 0.1, 1.0)
"""What is added to the Hessian's diagonal, in parts of its mean: the first that leaves it positive in fp32."""
BLOCK_COLUMNS = 128
"""Columns that are rounded before the others hear of their errors."""

RoundColumn = Callable[[Tensor, int], Tensor]
"""Gives the nearest that can be stored for numbers [out] of the column that is named."""


def gptq(weight: Tensor, hessian: Tensor, rounded: RoundColumn) -> Tensor:
    """What is to be stored for a weight [out, in], in fp32, whose inputs have the Hessian [in, in] fp32.

    Inputs that are always zero are rounded by themselves. Memory: the weight twice in fp32, and four Hessians more.
    Raises CheckpointError for a Hessian with numbers that are infinite or none at all.
    """
    check_finite(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    feed = _feed(hessian[order][:, order])
    columns = weight.t()[order].float().contiguous()  # [in, out]
    numbers = order.tolist()
    for first in range(0, len(columns), BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, len(columns))
        errors = _round_block(columns[first:last], feed[first:last, first:last], numbers[first:last], rounded)
        columns[last:].addmm_(feed[first:last, last:].t(), errors, alpha=-1)
    return torch.empty_like(columns).index_copy_(0, order, columns).t()


def importance(squares: Tensor) -> Tensor:
    """How much an error in each column counts by itself, by its inputs' squares, all together: [in], all above zero.

    Raises CheckpointError as `gptq` does.
    """
    check_finite(squares)
    return squares + DAMPINGS[0] * _mean(squares)


def check_finite(seen: Tensor) -> None:
    """Raise CheckpointError where a model computes no numbers of the texts that it is shown."""
    if not torch.isfinite(seen).all():
        raise CheckpointError(
            "the model makes numbers that are infinite or none at all of the example texts, so no codes can be fitted "
            "to them; int8 needs no texts"
        )


def _round_block(block: Tensor, feed: Tensor, numbers: list[int], rounded: RoundColumn) -> Tensor:
    """Round columns, which stand as rows here, in place; returns what is to be fed to later ones."""
    errors = torch.empty_like(block)
    for place, (column, number) in enumerate(zip(block, numbers, strict=True)):
        meant = rounded(column, number)
        torch.sub(column, meant, out=errors[place]).div_(feed[place, place])
        block[place + 1 :].addr_(feed[place, place + 1 :], errors[place], alpha=-1)
        column.copy_(meant)
    return errors


def _feed(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of the damped Hessian, which is damped in place.

    Found without the inverse: where the Hessian is R R^T with R upper triangular, U is the inverse of R.
    """
    mean, damped = _mean(hessian.diagonal()), 0.0
    for damping in DAMPINGS:
        hessian.diagonal().add_((damping - damped) * mean)
        damped = damping
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            break
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False)
    feed: Tensor = inverse.flip(0, 1)
    return feed


def _mean(squares: Tensor) -> Tensor:
    """One where all inputs are zero."""
    mean = squares.mean()
    return torch.where(mean > 0, mean, 1.0)
