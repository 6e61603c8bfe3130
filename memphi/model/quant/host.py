"""Products that ATen has for a CPU: bf16 activations with int8 or int4 weights, equal to the definitions.

They read the codes as they are, where the definitions write a block in 16 bits first. Measured on a CPU without units
for bf16 (benchmarks/host_products.py); torch._int_mm was slower than bf16 there and is not used.
"""

import torch
from torch import Tensor, nn

from memphi.model.kernels.rounding import Bytes
from memphi.model.quant.weights import Int4Weight, Int8Weight, QuantisedWeight

ALIGNED_NUMBERS, ALIGNED_BYTES = 16, 32
"""ATen's int8 product reads so many inputs at once, from addresses that are multiples of so many bytes, unchecked."""
PACKED_ROWS = 64
"""Outputs that ATen's int4 product keeps together."""


class HostProduct(QuantisedWeight):
    """A weight whose product makes its own output."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T: contiguous [rows, in] bf16 -> [rows, out]."""
        raise NotImplementedError

    def most_rows(self, x: Tensor) -> int:
        return 0

    def makes_blocks(self, x: Tensor) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, self.in_features).contiguous()).view(*x.shape[:-1], self.out_features)

    def multiply_many(
        self, x: Tensor, out: Tensor, most_numbers: int | None = None, in_bytes: Bytes | None = None
    ) -> None:
        out.copy_(self.product(x.contiguous()))


class HostInt8Weight(HostProduct, Int8Weight):
    """The same codes and scales, multiplied by ATen."""

    def __init__(self, weight: Int8Weight) -> None:
        QuantisedWeight.__init__(self, weight.out_features, weight.in_features)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)

    def product(self, x: Tensor) -> Tensor:
        aligned = x.clone() if x.data_ptr() % ALIGNED_BYTES else x
        return torch._weight_int8pack_mm(aligned, self.codes, self.scale)


class HostInt4Weight(HostProduct):
    """An Int4Weight in the order that ATen's product wants: the same bytes, for computing only."""

    codes: Tensor
    affine: Tensor

    def __init__(self, weight: Int4Weight) -> None:
        """Needs a piece of the weight in 32 bits for a while, and the weight in its old order."""
        super().__init__(weight.out_features, weight.in_features)
        self.group = weight.group
        parts = [
            torch._convert_weight_to_int4pack_for_cpu(weight.unpacked(first, first + PACKED_ROWS).int(), 1)
            for first in range(0, weight.out_features, PACKED_ROWS)
        ]
        self.register_buffer("codes", torch.cat(parts))
        self.register_buffer("affine", weight.affine.transpose(0, 1).contiguous())

    def product(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.affine)


def use_host_products(model: nn.Module) -> None:
    """Have a bf16 model's quantised weights multiplied by ATen, where their sizes allow it.

    Weights in int4 are put into another order, in which they cannot be written; needs one of them beside the model.
    """
    for module in model.modules():
        for name, weight in list(module.named_children()):
            if isinstance(weight, Int8Weight) and weight.in_features % ALIGNED_NUMBERS == 0:
                setattr(module, name, HostInt8Weight(weight))
            elif (
                isinstance(weight, Int4Weight)
                and weight.in_features % weight.group == weight.out_features % PACKED_ROWS == 0
            ):
                setattr(module, name, HostInt4Weight(weight))
