"""How four bits stand for a group of numbers: w = scale * code + shift, with codes from -8 to 7; by the weights alone.

Rounding to nearest takes the group's least and largest number for ends. `half_quadratic` is what is used: it moves the
ends until the error is least, as Badri and Shaji do for the zero point (HQQ, 2023); scale and shift both, here.
"""

import torch
from torch import Tensor

LEAST_CODE, LARGEST_CODE = -8, 7
ROUNDS = 10
"""Of choosing codes and then scale and shift; fifty more make the error a thousandth smaller."""
FIRST_SHARE = 0.9
"""The part of a group's range that the codes span at first: its ends are rare."""
POWER, STRENGTH = 0.7, 10.0
"""Of the norm that a robust fit makes small, and how little of an error it takes for an outlier."""
LEAST_SCALE = 1e-30

Affine = tuple[Tensor, Tensor]
"""Scale and shift, each [..., 1]."""


def nearest(groups: Tensor, share: float = 1.0) -> Affine:
    """Scale and shift by which codes span this part of each group's range; groups [..., numbers] fp32."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) * (share / (LARGEST_CODE - LEAST_CODE))
    # Halfway between the ends lies half a step above the code 0.
    return _stored(scale, (low + high + scale) / 2)


def half_quadratic(groups: Tensor, robust: bool = False) -> Affine:
    """Scale and shift of the least squared error that turns of choosing codes and fitting them lead to.

    robust: errors that the norm of POWER would rather leave than share out are taken for outliers, and not fitted; the
    half-quadratic splitting of HQQ, with errors in steps. It makes that norm smaller and the squared error, which is
    what a product sees of it, larger; for comparison.
    """
    scale, shift = nearest(groups, FIRST_SHARE)
    for _ in range(ROUNDS):
        codes = choose_codes(groups, scale, shift)
        wanted = groups - _outliers(groups, codes, scale, shift) if robust else groups
        scale, shift = _fit(codes, wanted, scale)
    return _stored(scale, shift)


def choose_codes(groups: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The nearest codes, whole numbers in fp32."""
    return groups.sub(shift).div_(scale.clamp(min=LEAST_SCALE)).round_().clamp_(LEAST_CODE, LARGEST_CODE)


def _fit(codes: Tensor, wanted: Tensor, scale: Tensor) -> Affine:
    """The line through what the codes should stand for; the scale before, where all codes are one."""
    mean, middle = codes.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    apart = codes - mean
    spread = apart.square().sum(-1, keepdim=True)
    fitted = apart.mul_(wanted).sum(-1, keepdim=True) / spread.clamp(min=1e-6)
    scale = torch.where((spread > 0) & (fitted > 0), fitted, scale)
    return scale, middle - scale * mean


def _outliers(groups: Tensor, codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The part of each error that the norm leaves: what remains when it is shrunk."""
    steps = (groups - codes * scale - shift) / scale.clamp(min=LEAST_SCALE)
    size = steps.abs()
    return steps.sign() * torch.relu(size - size.clamp(min=1e-6) ** (POWER - 1) / STRENGTH) * scale


def _stored(scale: Tensor, shift: Tensor) -> Affine:
    """As they are kept, so that codes are chosen for what is kept."""
    return scale.clamp(min=LEAST_SCALE).bfloat16().float(), shift.bfloat16().float()
