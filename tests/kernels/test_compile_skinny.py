"""Products of a few rows compile for every card that memphi names, and fit it."""

import pytest
import torch

pytest.importorskip("triton")

from memphi.model.kernels import narrow, skinny
from memphi.model.kernels.launch import TENSOR_CAPABILITY
from memphi.model.kernels.narrow import Narrow
from tests.kernels.ahead import REGISTERS, SHARED_BYTES, compiled_for

RANKS = (256, 320)
WORD_BYTES = 8
"""Triton 3.7.1 leaves one address on the stack for a 12.0, with registers to spare."""
LINEARS = {(5120, 3072): 3072, (3072, 3072): 3648, (16384, 3072): 3328, (3072, 8192): 8512}
"""The four of a layer, and a range of columns for each: no adapter, both, the first, the second."""


def launch_products(dtype, rows, places=slice(None)):
    for (n_out, n_in), width in list(LINEARS.items())[places]:
        wide = torch.empty(n_out, n_in + sum(RANKS), dtype=dtype)
        operand = torch.empty(rows, n_in + sum(RANKS), dtype=dtype)
        skinny.multiply(operand[:, -width:], wide[:, -width:], torch.empty(rows, n_out, dtype=dtype))
        if n_out == 16384:
            inner = torch.empty(rows, n_out // 2, dtype=dtype)
            skinny.multiply(operand[:, -width:], wide[:, -width:], inner, gated=True)


def launch_narrow(dtype, rows, is_coded=False):
    for n_in in (3072, 8192):
        a = torch.empty(sum(RANKS), n_in, dtype=torch.int8 if is_coded else dtype)
        scale = torch.empty(sum(RANKS), dtype=torch.bfloat16)
        scales = scale.split(RANKS) if is_coded else (None, None)
        operand, uses = torch.empty(rows, n_in + sum(RANKS), dtype=dtype), torch.empty(rows, dtype=torch.bool)
        x = operand[:, RANKS[0] : RANKS[0] + n_in]
        first = Narrow(a[: RANKS[0]], 2.0, uses, operand[:, : RANKS[0]], scales[0])
        second = Narrow(a[RANKS[0] :], 2.0, uses, operand[:, RANKS[0] + n_in :], scales[1])
        narrow.narrow(x, [first, second])


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
def test_every_product_fits(capability):
    """On a 7.5 Triton has no tensor cores, so only what is summed number by number runs there."""
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    with compiled_for(capability) as compiled:
        launch_products(dtype, rows=1)
        launch_products(dtype, rows=skinny.VECTOR_ROWS, places=slice(1, 3))
        launch_narrow(dtype, rows=skinny.VECTOR_ROWS)
        launch_narrow(dtype, rows=skinny.VECTOR_ROWS, is_coded=True)
        if capability >= TENSOR_CAPABILITY:
            launch_products(dtype, rows=skinny.FEW_ROWS, places=slice(1, 3))
            launch_products(dtype, rows=skinny.MOST_ROWS, places=slice(1, 3))
            for rows in (narrow.FEW_ROWS + 1, narrow.MANY_ROWS):
                launch_narrow(dtype, rows)
                launch_narrow(dtype, rows, is_coded=True)
                launch_narrow(torch.float32, rows)
            launch_narrow(dtype, narrow.MOST_ROWS + 1, is_coded=True)
            launch_narrow(torch.float32, narrow.MOST_ROWS + 1, is_coded=True)
    for made in compiled:
        assert_fits(made, capability)
        assert made.is_dependent == (capability >= (9, 0))
    assert {made.name for made in compiled} == {"_multiply_vectors", "_narrow"} | (
        {"_multiply_tiles", "_narrow_tiles"} if capability >= TENSOR_CAPABILITY else set()
    )


def test_products_in_fp32_fit():
    with compiled_for((8, 6)) as compiled:
        launch_products(torch.float32, rows=2, places=slice(1, 3))
        launch_products(torch.float32, rows=skinny.MOST_ROWS, places=slice(1, 3))
    for made in compiled:
        assert_fits(made, (8, 6))


def assert_fits(made, capability):
    assert made.shared_bytes <= SHARED_BYTES[capability], made
    assert made.registers * made.threads <= REGISTERS, made
    assert made.stack_bytes <= WORD_BYTES, made
