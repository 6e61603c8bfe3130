"""Products with matrices in few bits compile for every card that memphi names, and fit it."""

from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from memphi.model.kernels import dequantise, eight_bits, four_bits, narrow, rounding, shares
from memphi.model.kernels.coded import MOST_ROWS, VECTOR_ROWS, Columns
from memphi.model.kernels.launch import TENSOR_CAPABILITY
from memphi.model.kernels.narrow import Narrow
from memphi.model.kernels.parts import sum_up
from memphi.model.quant.weights import WEIGHTS
from tests.kernels.ahead import SHARED_BYTES, compiled_for
from tests.kernels.test_compile_skinny import RANKS, assert_fits

MODULES = {"int8": eight_bits, "fp8": eight_bits, "int4": four_bits}
ON_TENSOR_CORES = {
    "int8": ["_split_rows", "_multiply_tiles"],
    "fp8": ["_round_rows", "_multiply_tiles"],
    "int4": ["_multiply_tiles"],
}
"""What makes bytes of rows, and multiplies them."""
SHAPES = ((3072, 8192), (16384, 3072))


def launch(scheme, shape, rows, dtype, ranks, **gated):
    n_out, n_in = shape
    operand = torch.empty(rows, sum(RANKS) + n_in, dtype=dtype)
    b, scale = torch.empty(n_out, sum(RANKS), dtype=torch.int8), torch.empty(2, n_out, dtype=torch.bfloat16)
    t = operand[:, :ranks].split([RANKS[0], ranks - RANKS[0]], 1) if ranks > RANKS[0] else (operand[:, :ranks],)
    columns = Columns(b[:, :ranks], scale[: len(t)], t) if ranks else None
    weight, out = WEIGHTS[scheme](n_out, n_in), torch.empty(rows, n_out // 2 if gated else n_out, dtype=dtype)
    sum_up(MODULES[scheme].multiply(operand[:, sum(RANKS) :], *weight.buffers(), out, columns, **gated), out)


def launch_all(scheme, dtype, on_tensor_cores):
    for ranks in (0, *RANKS, sum(RANKS)):
        launch(scheme, SHAPES[ranks != RANKS[1]], 1, dtype, ranks)
        if scheme == "int8":
            launch(scheme, SHAPES[1], 1, dtype, ranks, gated=True)
    if on_tensor_cores:
        for rows, ranks in ((2, 0), (MOST_ROWS, sum(RANKS))):
            launch(scheme, SHAPES[rows == MOST_ROWS], rows, dtype, ranks)
    else:
        launch(scheme, SHAPES[1], VECTOR_ROWS, dtype, RANKS[1])


@pytest.mark.parametrize("scheme", MODULES)
@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
def test_every_product_fits(capability, scheme):
    """On a 7.5 Triton has no tensor cores, so only what is summed number by number runs there."""
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    on_tensor_cores = capability >= TENSOR_CAPABILITY
    with compiled_for(capability) as compiled:
        launch_all(scheme, dtype, on_tensor_cores)
    for made in compiled:
        assert_fits(made, capability)
        assert made.is_dependent == (capability >= (9, 0))
    names = {"_multiply_vectors"} | ({"_sum_parts", *ON_TENSOR_CORES[scheme]} if on_tensor_cores else set())
    assert {made.name for made in compiled} == names


@pytest.mark.parametrize("capability", SHARED_BYTES, ids=str)
def test_what_goes_beside_products_fits(capability):
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    bytes_, words = WEIGHTS["int8"](3072, 8192), WEIGHTS["int4"](3072, 8192)
    with compiled_for(capability) as compiled:
        dequantise.dequantise(*bytes_.buffers(), torch.empty(3072, 8192, dtype=dtype))
        four_bits.dequantise(*words.buffers(), torch.empty(3072, 8192, dtype=dtype))
        dequantise.look_up(*bytes_.buffers(), torch.empty(5, dtype=torch.int64), torch.empty(5, 8192, dtype=dtype))
        rounding.round_rows(
            torch.empty(5, 8192, dtype=dtype), torch.empty(5, 8192, dtype=torch.float8_e4m3fn), torch.empty(5)
        )
        rounding.split_rows(
            torch.empty(5, 8192, dtype=dtype), torch.empty(2, 5, 8192, dtype=torch.int8), torch.empty(5)
        )
    for made in compiled:
        assert_fits(made, capability)
    assert [made.is_dependent for made in compiled] == [
        capability >= (9, 0) and name != "_look_up"
        for name in ("_dequantise", "_dequantise", "_look_up", "_round_rows", "_split_rows")
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [each for each in SHARED_BYTES if each >= TENSOR_CAPABILITY], ids=str)
def test_what_adds_adapters_fits(capability, dtype):
    y, operand = torch.empty(600, 3072, dtype=dtype), torch.empty(600, sum(RANKS) + 3072, dtype=dtype)
    b, scale = torch.empty(3072, sum(RANKS), dtype=torch.int8), torch.empty(2, 3072, dtype=torch.bfloat16)
    uses = torch.empty(600, dtype=torch.bool)
    both = Columns(b, scale, (operand[:, : RANKS[0]], operand[:, -RANKS[1] :]))
    with compiled_for(capability) as compiled:
        shares.add_to(y, both, [uses, uses])
        shares.add_to(y, Columns(b[:, : RANKS[0]], scale[:1], both.t[:1]), [None])
        shares.write_share(y[:256], both, [uses, uses])
        dequantise.write_columns(both, 0, torch.empty(3072, 3072 + sum(RANKS), dtype=dtype))
    for made in compiled:
        assert_fits(made, capability)
        assert made.is_dependent == (capability >= (9, 0))
    assert [made.name for made in compiled] == [
        "_dequantise",
        "_add_to",
        "_dequantise",
        "_add_to",
        "_write_share",
        "_dequantise",
    ]


def test_no_count_of_rows_is_compiled_anew():
    """Of steps of prompts, whose counts hardly come twice: a compilation takes as long as several steps."""
    y, operand = torch.empty(624, 128, dtype=torch.bfloat16), torch.empty(624, 16 + 128, dtype=torch.bfloat16)
    a, scale = torch.empty(16, 128, dtype=torch.int8), torch.empty(1, 128, dtype=torch.bfloat16)
    compiled, do_compile = [], JITFunction._do_compile

    def compile_it(kernel, *arguments):
        compiled.append(kernel.__name__)
        return do_compile(kernel, *arguments)

    with compiled_for((9, 0)), patch.object(JITFunction, "_do_compile", compile_it):
        for rows in (624, 617, 601):
            t = operand[:rows, :16]
            narrow.narrow(operand[:rows, 16:], [Narrow(a, 2.0, None, t, scale[0, :16])])
            shares.add_to(y[:rows], Columns(a.t().contiguous(), scale, (t,)), [None])
    assert compiled == ["_narrow_tiles", "_dequantise", "_add_to"]


@pytest.mark.parametrize("scheme", MODULES)
def test_products_in_fp32_fit(scheme):
    with compiled_for((8, 6)) as compiled:
        launch_all(scheme, torch.float32, on_tensor_cores=True)
    for made in compiled:
        assert_fits(made, (8, 6))
