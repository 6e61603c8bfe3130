"""What each scheme stores, what that stands for, and products with it; how four bits are chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.prices import Peak
from benchmarks.quality import POWER, robust_fit
from memphi.config import AdapterConfig, group_size
from memphi.errors import CheckpointError
from memphi.model import packing
from memphi.model.adapters import AdaptedLinear, AdapterTokens
from memphi.model.language import TiedEmbedding
from memphi.model.quant import calibration, swap, weights
from memphi.model.quant.calibration import choose_codes, half_quadratic, nearest
from memphi.model.quant.linears import (
    QuantisedAdaptedLinear,
    QuantisedAdapter,
    QuantisedEmbedding,
    QuantisedLinear,
    QuantisedPointwise,
)
from memphi.model.quant.packed import PackedQuantisedLinear
from memphi.model.quant.weights import WEIGHTS, Int4Weight, Int8Weight, round_rows

SCHEMES = pytest.mark.parametrize("scheme", list(WEIGHTS))
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 300))
SEEDS = st.integers(0, 99)
ERRORS = {"int8": 0.012, "int4": 0.13, "fp8": 0.04}
"""The largest relative error of normal numbers."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(scheme, matrix):
    weight = WEIGHTS[scheme](*matrix.shape)
    swap.store(weight, "w", 0, matrix)
    return weight


def meant(weight, dtype=torch.float32):
    return weight.dequantise(0, weight.out_features, dtype)


def relative(real, wanted):
    return float((real.double() - wanted.double()).norm() / wanted.double().norm())


# --- what is stored ------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize("deviation", [1e-4, 0.02, 30.0])
def test_normal_numbers_come_back_nearly(scheme, deviation):
    matrix = normal(32, 384) * deviation
    assert 0 < relative(meant(stored(scheme, matrix)), matrix) < ERRORS[scheme]


@SCHEMES
@given(size=SIZES, seed=SEEDS)
def test_every_output_is_stored_by_itself(scheme, size, seed):
    matrix = normal(*size, seed=seed)
    whole, apart = stored(scheme, matrix), WEIGHTS[scheme](*size)
    for row in reversed(range(size[0])):
        apart.store(row, matrix[row : row + 1])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole.buffers(), apart.buffers(), strict=True))


@SCHEMES
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_numbers_that_are_all_the_same_come_back(scheme, value):
    assert torch.allclose(meant(stored(scheme, torch.full((3, 70), value))), torch.tensor(value), rtol=2**-8)


@given(size=SIZES, seed=SEEDS)
def test_what_eight_bits_can_say_comes_back_exactly(size, seed):
    matrix = torch.randint(-127, 128, size, generator=torch.Generator().manual_seed(seed)) / 64.0
    matrix[:, 0] = 127 / 64
    assert torch.equal(meant(stored("int8", matrix)), matrix)


@SCHEMES
def test_numbers_in_16_bits_are_quantised_as_they_are(scheme):
    matrix = normal(8, 256).bfloat16()
    assert torch.equal(meant(stored(scheme, matrix)), meant(stored(scheme, matrix.float())))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@SCHEMES
def test_a_number_that_is_none_is_told(scheme, wrong):
    matrix = normal(8, 64)
    matrix[5, 7] = wrong
    with pytest.raises(CheckpointError, match="w holds a number that is infinite or none at all"):
        stored(scheme, matrix)


@pytest.mark.parametrize(("n_in", "group", "groups"), [(3072, 128, 24), (320, 64, 5), (72, 64, 2), (40, 64, 1)])
def test_groups_of_four_bits(n_in, group, groups):
    assert group_size(n_in) == group
    weight = Int4Weight(16, n_in)
    assert weight.codes.shape == (16, groups, group // 2)
    assert weight.affine.shape == (16, groups, 2)


def test_a_ragged_group_is_as_good_as_a_full_one():
    matrix = normal(64, 96)
    parts = meant(stored("int4", matrix)) - matrix
    assert parts[:, 64:].norm() / 32**0.5 < 1.1 * parts[:, :64].norm() / 8


# --- four bits -----------------------------------------------------------------------------------------------------


def groups_of(kind):
    torch.manual_seed(1)
    shape = (2048, 128)
    draws = {
        "normal": torch.randn(shape),
        "heavy": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "heavier": torch.distributions.StudentT(4.0).sample(shape),
        "to one side": torch.rand(shape) ** 3,
    }
    return draws[kind] * 0.02


def error(groups, affine):
    scale, shift = affine
    return groups - choose_codes(groups, scale, shift) * scale - shift


@pytest.mark.parametrize("kind", ["normal", "heavy", "heavier", "to one side"])
def test_half_quadratic_is_better_than_rounding_to_nearest(kind):
    groups = groups_of(kind)
    assert error(groups, half_quadratic(groups)).norm() < 0.95 * error(groups, nearest(groups)).norm()


@pytest.mark.parametrize("kind", ["normal", "heavy", "heavier"])
def test_the_robust_fit_leaves_outliers(kind):
    groups = groups_of(kind)
    robust, squared, rounded = (
        error(groups, choose(groups)).abs().pow(POWER).sum() for choose in (robust_fit, half_quadratic, nearest)
    )
    assert robust < squared < rounded


def test_more_rounds_change_little(monkeypatch):
    groups = groups_of("normal")
    few = error(groups, half_quadratic(groups)).norm()
    monkeypatch.setattr(calibration, "ROUNDS", 100)
    assert few < 1.01 * error(groups, half_quadratic(groups)).norm()


# --- products ------------------------------------------------------------------------------------------------------


@SCHEMES
@given(size=SIZES, rows=st.integers(1, 9), numbers=st.sampled_from([1, 500, 10**6]), seed=SEEDS)
def test_a_product_is_that_with_what_is_meant(scheme, size, rows, numbers, seed):
    x, weight = normal(rows, size[1], seed=seed + 1), stored(scheme, normal(*size, seed=seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "DEQUANTISED_NUMBERS", numbers)
        real = weight(x)
        if scheme == "fp8":
            codes, scale = round_rows(x)
            x = codes.float() * scale[:, None]
    assert torch.allclose(real, x @ meant(weight).t(), atol=1e-4)


def test_one_block_is_there_at_a_time(monkeypatch):
    """As their price says."""
    monkeypatch.setattr(weights, "DEQUANTISED_NUMBERS", 2**20)
    monkeypatch.setattr(Int8Weight, "write_block", lambda *_: None)
    with torch.device("meta"):
        weight, x, out = Int8Weight(4096, 1024), torch.empty(8, 1024), torch.empty(8, 4096)
    with Peak([x, out]) as peak:
        weight.multiply(x, out)
    assert peak.bytes == 2**20 * x.itemsize


@given(rows=st.integers(0, 20_000), columns=st.integers(1, 20_000_000))
def test_blocks_cover_all_rows_and_begin_where_cards_multiply_fast(rows, columns):
    most, even = weights.DEQUANTISED_NUMBERS, weights.EVEN_ROWS
    cuts = list(weights.blocks(rows, columns))
    assert [first for first, _ in cuts] == [0, *(last for _, last in cuts)][: len(cuts)]
    assert [last for _, last in cuts][-1:] == [rows][:rows]
    assert all(last - first == 1 or 0 < (last - first) * columns <= most for first, last in cuts)
    assert most // columns < even or all(first % even == 0 for first, _ in cuts)
    sizes = [last - first for first, last in cuts]
    assert most // columns < even or all(size < rows / len(sizes) + even for size in sizes)


@SCHEMES
def test_a_row_does_not_depend_on_its_company(scheme):
    x, weight = normal(7, 200), stored(scheme, normal(30, 200))
    x[5] *= 1000
    assert torch.allclose(weight(x)[3:4], weight(x[3:4]), atol=1e-4)


@SCHEMES
def test_rows_may_stand_in_a_wider_matrix_and_have_more_axes(scheme):
    x, weight = normal(6, 300)[:, 17:217], stored(scheme, normal(30, 200))
    # Sums of rows that stand elsewhere in memory may be taken in another order.
    assert torch.allclose(weight(x.unflatten(0, (2, 3))), weight(x.contiguous()).unflatten(0, (2, 3)), atol=1e-4)


@SCHEMES
def test_no_rows_ask_nothing_of_the_weight(scheme, monkeypatch):
    """A prompt's chunk that scores nothing would have the whole embedding made 16 bits again."""
    weight = stored(scheme, normal(8, 64))
    monkeypatch.setattr(weight, "dequantise_into", lambda *_: pytest.fail("dequantised"))
    assert weight(torch.empty(0, 64)).shape == (0, 8)


def test_rows_of_fp8_keep_their_scale():
    x = normal(5, 300) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.0])[:, None]
    codes, scale = round_rows(x)
    error = (codes.float() * scale[:, None] - x).norm(dim=1)
    assert (error <= 0.04 * x.norm(dim=1)).all()


# --- modules -------------------------------------------------------------------------------------------------------


def test_a_linear_keeps_its_bias():
    linear = nn.Linear(200, 30)
    model = nn.Sequential(linear)
    swap.quantise(model, "int4", "int8")
    assert isinstance(model[0], QuantisedLinear)
    assert isinstance(model[0].weight, Int8Weight)
    x = normal(2, 3, 200)
    assert torch.allclose(model(x), x @ meant(model[0].weight).t() + linear.bias, atol=1e-5)


@torch.no_grad()
def test_a_convolution_of_length_one_is_a_linear():
    convolution, longer = nn.Conv1d(40, 30, 1), nn.Conv1d(30, 30, 3, groups=30)
    model, x = nn.Sequential(convolution, longer), normal(2, 40, 7)
    swap.quantise(model, "int4", "int8")
    assert isinstance(model[0], QuantisedPointwise)
    assert model[1] is longer
    convolution.weight.copy_(meant(model[0].weight)[..., None])
    assert torch.allclose(model[0](x), convolution(x), atol=1e-4)


@torch.no_grad()
def test_an_embedding_is_its_own_head():
    table = TiedEmbedding(50, 96)
    model = nn.Sequential(table)
    swap.quantise(model, "int4", "int8")
    assert isinstance(model[0], QuantisedEmbedding)
    rows = meant(model[0].weight)
    assert relative(rows, table.weight) < ERRORS["int8"]
    assert torch.equal(model[0](torch.tensor([3, 49])), rows[[3, 49]])
    assert torch.allclose(model[0].score(normal(4, 96)), normal(4, 96) @ rows.t(), atol=1e-5)


def adapted_linear():
    linear = AdaptedLinear(96, 40, {"vision": AdapterConfig(4, 8.0), "speech": AdapterConfig(6, 9.0)})
    for parameter in linear.parameters():
        parameter.data = normal(*parameter.shape)
    return linear


@SCHEMES
@torch.no_grad()
def test_adapters_are_live_and_in_8_bits(scheme):
    linear = adapted_linear()
    adapters = dict(linear.adapters)
    model = nn.ModuleList([linear])
    swap.quantise(model, scheme, "int8")
    other, x = model[0], normal(5, 96)
    assert isinstance(other, QuantisedAdaptedLinear)
    for name, adapter in adapters.items():
        kept = other.adapter(name)
        assert isinstance(kept, QuantisedAdapter)
        matrix = meant(kept.b) @ meant(kept.a)
        assert relative(matrix, adapter.b @ adapter.a) < 0.02
        assert torch.allclose(kept(x), adapter.scale * x @ matrix.t(), atol=1e-4)
    mask = torch.tensor([True, False, True, False, False])
    real = other(x, AdapterTokens({"vision": mask, "speech": slice(3, 5)}))
    wanted = other.base(x)
    wanted[mask] += other.adapter("vision")(x[mask])
    wanted[3:5] += other.adapter("speech")(x[3:5])
    assert torch.allclose(real, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "used",
    [
        {"vision": None},
        {"speech": slice(1, 4)},
        {"vision": slice(0, 2), "speech": None},
        {"vision": slice(0, 2), "speech": slice(3, 5)},
    ],
)
@pytest.mark.parametrize("read_tokens", [1, packing.READ_TOKENS])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adapters_beside_a_base_are_views_that_follow(used, read_tokens, scheme, dtype, monkeypatch):
    """Of two matrices in int8 and of their scales, whatever is done to the module; in one product or span by span."""
    monkeypatch.setattr(packing, "READ_TOKENS", read_tokens)
    monkeypatch.setattr(weights, "DEQUANTISED_NUMBERS", 1000)  # Of several blocks.
    model = nn.ModuleList([adapted_linear()]).to(dtype)
    swap.quantise(model, scheme, "int8")
    used = AdapterTokens(used)
    x, expected = normal(5, 96).to(dtype), model[0](normal(5, 96).to(dtype), used)
    packed = PackedQuantisedLinear(model[0])
    for _ in range(2):
        assert packed.operand(3).dtype is dtype
        assert relative(packed(x, used), expected) < (1e-2 if dtype is torch.bfloat16 else 1e-5)
        held = {packed.wide, packed.wide_scale, packed.narrow, packed.narrow_scale}
        places = {tensor.untyped_storage().data_ptr() for tensor in held}
        assert all(t.untyped_storage().data_ptr() in places for t in packed.adapters.buffers())
        packed = packed._apply(torch.clone)
