"""How four bits stand for a group of numbers: w = scale * code + shift, with codes from -8 to 7.

Rounding to nearest takes the group's least and largest number for ends. `half_quadratic` is what is used where weights
are all that is known: it moves the ends until the error is least, as Badri and Shaji do for the zero point (HQQ, 2023);
scale and shift both, here. `weighted_line` is for whoever knows how much each number's error counts, by what inputs are
like (`gptq.importance`).
"""

import torch
from torch import Tensor

LEAST_CODE, LARGEST_CODE = -8, 7
ROUNDS = 10
"""Of choosing codes and then scale and shift; fifty more make the error a thousandth smaller."""
FIRST_SHARE = 0.9
"""The part of a group's range that the codes span at first: its ends are rare."""
FIRST_SHARES, FEW_ROUNDS = (0.8, 0.95), 5
"""The same, where each is tried, and rounds of each."""
LEAST_SCALE = 1e-30
LEAST_SPREAD = 1e-9
"""Of codes weighted by importance: below it, all that count are one."""

Affine = tuple[Tensor, Tensor]
"""Scale and shift, each [..., 1]."""


def nearest(groups: Tensor, share: float = 1.0) -> Affine:
    """Scale and shift by which codes span this part of each group's range; groups [..., numbers] fp32."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) * (share / (LARGEST_CODE - LEAST_CODE))
    # Halfway between the ends lies half a step above the code 0.
    return stored(scale, (low + high + scale) / 2)


def half_quadratic(groups: Tensor) -> Affine:
    """Scale and shift of the least squared error that turns of choosing codes and fitting them lead to."""
    scale, shift = nearest(groups, FIRST_SHARE)
    for _ in range(ROUNDS):
        scale, shift = fit(choose_codes(groups, scale, shift), groups, scale)
    return stored(scale, shift)


def weighted_line(groups: Tensor, importance: Tensor) -> Affine:
    """Scale and shift of the least squared error, in which a number's error counts by its importance, above zero.

    groups [out, numbers] with importance [numbers], or [groups, out, numbers] with [groups, numbers]. The best of what
    turns of choosing codes and fitting them come to from several ranges.
    """
    share = (importance / importance.sum(-1, keepdim=True))[..., None]
    fits = [_weighted_fit(groups, share, first) for first in FIRST_SHARES]
    errors = torch.cat([_weighted_error(groups, share, *fit) for fit in fits], -1)
    best = errors.argmin(-1, keepdim=True)
    scale, shift = (torch.cat(part, -1).gather(-1, best) for part in zip(*fits, strict=True))
    return scale, shift


def _weighted_fit(groups: Tensor, share: Tensor, first_share: float) -> Affine:
    scale, shift = nearest(groups, first_share)
    middle = groups @ share
    for _ in range(FEW_ROUNDS):
        codes = choose_codes(groups, scale, shift)
        mean = codes @ share
        apart = codes.sub_(mean)
        spread = apart.square() @ share
        fitted = apart.mul_(groups) @ share / spread.clamp(min=LEAST_SPREAD)
        scale = torch.where((spread > LEAST_SPREAD) & (fitted > 0), fitted, scale)
        shift = middle - scale * mean
    return stored(scale, shift)


def _weighted_error(groups: Tensor, share: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[..., 1]"""
    return choose_codes(groups, scale, shift).mul_(scale).add_(shift).sub_(groups).square_() @ share


def choose_codes(groups: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The nearest codes, whole numbers in fp32."""
    return groups.sub(shift).div_(scale.clamp(min=LEAST_SCALE)).round_().clamp_(LEAST_CODE, LARGEST_CODE)


def fit(codes: Tensor, wanted: Tensor, scale: Tensor) -> Affine:
    """The line through what the codes should stand for; the scale before, where all codes are one."""
    mean, middle = codes.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    apart = codes - mean
    spread = apart.square().sum(-1, keepdim=True)
    fitted = apart.mul_(wanted).sum(-1, keepdim=True) / spread.clamp(min=1e-6)
    scale = torch.where((spread > 0) & (fitted > 0), fitted, scale)
    return scale, middle - scale * mean


def stored(scale: Tensor, shift: Tensor) -> Affine:
    """As they are kept, so that codes are chosen for what is kept."""
    return scale.clamp(min=LEAST_SCALE).bfloat16().float(), shift.bfloat16().float()
