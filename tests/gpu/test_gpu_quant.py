"""Quantised weights on CUDA: products equal their definitions, and weights take what the plan says."""

import pytest
import torch

from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.quantisation import CALIBRATED, quantise_folder
from memphi.checkpoint.random import random_model
from memphi.config import AdapterConfig
from memphi.memory import costs
from memphi.model.adapters import AdaptedLinear, AdapterTokens, remove_adapters
from memphi.model.attention import select_attention
from memphi.model.kernels import narrow
from memphi.model.kernels.coded import Columns, plain_add
from memphi.model.kernels.narrow import Narrow
from memphi.model.kernels.parts import sum_up
from memphi.model.language import DecoderLayer
from memphi.model.quant import swap
from memphi.model.quant.examples import Examples, adapted_linears
from memphi.model.quant.linears import QuantisedAdaptedLinear, QuantisedAdapter
from memphi.model.quant.packed import PackedQuantisedLinear
from memphi.model.quant.weights import WEIGHTS, Fp8Weight, has_fp8_products
from memphi.model.rows import Row
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.scenes import Stage, alone, lively_model, mixed_requests, tiny_tokenizer

DEVICE = torch.device("cuda")
SCHEMES = pytest.mark.parametrize("scheme", list(WEIGHTS))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def relative(real, wanted):
    return float((real.double() - wanted.double()).norm() / wanted.double().norm())


def made(scheme, n_out, n_in):
    with DEVICE:
        weight = WEIGHTS[scheme](n_out, n_in)
        swap.store(weight, "w", 0, torch.randn(n_out, n_in) / n_in**0.5)
    return weight


@SCHEMES
def test_what_is_stored_is_what_the_cpu_stores(scheme):
    """But for codes that lie on the border between two."""
    rows = torch.randn(64, 384)
    here, there = WEIGHTS[scheme](64, 384), WEIGHTS[scheme](64, 384).to(DEVICE)
    here.store(0, rows)
    there.store(0, rows.to(DEVICE))
    assert relative(there.dequantise(0, 64, torch.float32).cpu(), here.dequantise(0, 64, torch.float32)) < 0.01


@pytest.mark.parametrize("placement", ["resident", "shared", "streamed"])
def test_int4_made_while_loading_is_what_the_cpu_makes(placement, tmp_path):
    """Wherever its weights lie; but for codes that lie on the border between two."""
    folder = tiny_checkpoint(tmp_path / "model", dtype=torch.float32)
    examples = [[5, 9, 200, 31, 7, 7, 54], [77, 3, 150, 9, 61, 12]]
    settings = {"scheme": "int4", "examples": examples}
    here = swap.quantised_weights(load_model(folder, "cpu", torch.float32, **settings))
    there = swap.quantised_weights(load_model(folder, DEVICE, torch.float32, placement=placement, **settings))
    assert here.keys() == there.keys()
    for name, weight in here.items():
        meant = (each.dequantise(0, each.out_features, torch.float32).cpu() for each in (there[name], weight))
        assert relative(*meant) < 0.02, name


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_codes_fitted_to_examples_lose_as_little_as_on_the_cpu(scheme):
    rows, x = torch.randn(64, 512), torch.randn(2000, 64) @ torch.randn(64, 512) + torch.randn(2000, 512)
    exact, losses = x @ rows.t(), []
    for device in ("cpu", DEVICE):
        weight = WEIGHTS[scheme](64, 512).to(device)
        weight.store_calibrated(rows.to(device), (x.t() @ x).to(device))
        losses.append(relative(x @ weight.dequantise(0, 64, torch.float32).cpu().t(), exact))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_an_interrupted_calibration_goes_on_where_it_ended(scheme, tmp_path):
    source = tiny_checkpoint(tmp_path / "source")

    def interrupt(done, total):
        if done >= 0.6 * total:
            raise KeyboardInterrupt

    quantise_folder(source, tmp_path / "whole", scheme, DEVICE)
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(source, tmp_path / "small", scheme, DEVICE, interrupt)
    quantise_folder(source, tmp_path / "small", scheme, DEVICE)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_calibrating_a_layer_of_official_size_takes_what_it_is_priced_at(scheme):
    config = read_config(official.folder())
    tokens, before = 4096, torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    with DEVICE, torch.no_grad():
        layer = DecoderLayer(config, 0, select_attention("auto")).to(torch.bfloat16)
        remove_adapters(layer)
        for linear in adapted_linears(layer).values():
            linear.weight.normal_(0, 0.02)
        hidden = torch.randn(tokens, config.language.hidden_size).bfloat16()
        rows = Examples(config.language, [1024] * 4, hidden)
    for linear in rows.quantise(layer, WEIGHTS[scheme]):
        assert linear.weight.out_features
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    assert peak <= costs.calibrating(config, 2, tokens).bytes + 64 * 2**20  # libraries' work space


@SCHEMES
@pytest.mark.parametrize("rows", [1, 3, 16, 100, 2048])
@pytest.mark.parametrize("shape", [(5120, 3072), (3072, 8192), (200, 72)])
@torch.inference_mode()
def test_a_product_is_its_definition(scheme, rows, shape):
    weight = made(scheme, *shape)
    x = torch.randn(rows, shape[1] + 64, device=DEVICE, dtype=torch.bfloat16)[:, 64:]
    plain = torch.empty(rows, shape[0], device=DEVICE, dtype=torch.bfloat16)
    weight.plain_multiply(x, plain)
    exact = torch.empty(rows, shape[0], device=DEVICE)
    weight.plain_multiply(x.float(), exact)
    assert relative(weight(x), exact) <= 1.5 * relative(plain, exact) + 1e-3
    if scheme != "fp8":
        return
    into = torch.full((rows, shape[0]), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    weight.multiply(x, into)
    assert torch.equal(into, weight(x))


def test_fp8_goes_through_the_cards_own_units(monkeypatch):
    if not has_fp8_products(DEVICE):
        pytest.skip("needs Ada or later")
    weight = made("fp8", 256, 512)
    monkeypatch.setattr(Fp8Weight, "plain_multiply", lambda *_: pytest.fail("computed plainly"))
    weight(torch.randn(5, 512, device=DEVICE, dtype=torch.bfloat16))


@SCHEMES
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_logits_are_those_of_the_cpu(scheme, packed):
    ids, rows = torch.arange(40), [Row(15, adapter="vision"), Row(20, adapter="speech"), Row(5)]
    model = lively_model(tiny_config())
    model.quantise(scheme)
    model.keep_adapters(packed, None)
    expected = model(ids, rows, logits_at=range(40))
    real = model.to(DEVICE)(ids.to(DEVICE), rows, logits_at=range(40))
    assert relative(real.cpu(), expected) < 1e-2


@SCHEMES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("shape", [(5120, 3072), (3072, 8192), (200, 72)])
@torch.inference_mode()
def test_products_by_kernels_are_as_exact(scheme, rows, shape):
    """With adapters' columns beside them, for few rows."""
    weight = made(scheme, *shape)
    weight.kernels = True
    operand = torch.randn(rows, 96 + shape[1], device=DEVICE, dtype=torch.bfloat16)
    codes = torch.randint(-127, 128, (shape[0], 96), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(2, shape[0], device=DEVICE).div(1000).bfloat16()
    columns = Columns(codes, scale, operand[:, :96].split([40, 56], 1))
    x, (plain, real) = operand[:, 96:], torch.empty(2, rows, shape[0], device=DEVICE, dtype=torch.bfloat16)
    exact = torch.empty(rows, shape[0], device=DEVICE)
    weight.plain_multiply(x, plain)
    weight.plain_multiply(x.float(), exact)
    weight.multiply(x, real)
    assert relative(real, exact) <= 1.5 * relative(plain, exact) + 1e-3
    if weight.is_for_few(x):
        sum_up(weight.multiply_few(x, real, columns), real)
        assert relative(real, plain_add(exact, columns)) <= 1.5 * relative(plain, exact) + 4e-3


@pytest.mark.parametrize("rows", [1, 4, 5, 64, 1000])
@pytest.mark.parametrize("n_in", [3072, 8192])
@torch.inference_mode()
def test_what_adapters_in_int8_make_of_x(rows, n_in):
    """Both at official ranks, of rows that use them or not."""
    codes = torch.randint(-127, 128, (576, n_in), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(576, device=DEVICE).div(1000).bfloat16()
    x, uses = torch.randn(rows, n_in, device=DEVICE, dtype=torch.bfloat16), torch.arange(rows, device=DEVICE) % 3 == 0
    results = []
    for run, dtype in ((narrow.narrow, torch.bfloat16), (narrow.plain_narrow, torch.float32)):
        t = torch.full((rows, 576), float("nan"), device=DEVICE, dtype=dtype)
        parts = [
            Narrow(codes[:256], 2.0, uses, t[:, :256], scale[:256]),
            Narrow(codes[256:], 1.5, ~uses, t[:, 256:], scale[256:]),
        ]
        run(x.to(dtype), parts)
        results.append(t)
    assert relative(*results) < 4e-3


def adapted_linear(scheme, n_out, n_in):
    """Two adapters of official ranks beside a matrix in codes, all of random numbers."""
    with DEVICE:
        linear = AdaptedLinear(n_in, n_out, {"vision": AdapterConfig(256, 512), "speech": AdapterConfig(320, 640)})
        for name in list(linear.adapters):
            adapter = QuantisedAdapter(linear.adapter(name).bfloat16())
            for weight in (adapter.a, adapter.b):
                weight.store(0, torch.randn(weight.out_features, weight.in_features) / weight.in_features**0.5)
            linear.adapters[name] = adapter
        return QuantisedAdaptedLinear(linear, made(scheme, n_out, n_in))


@SCHEMES
@pytest.mark.parametrize("rows", [1, 3, 40, 300, 1000])
@pytest.mark.parametrize("shape", [(5120, 3072), (3072, 8192)])
@torch.inference_mode()
def test_no_product_sees_the_rows_of_those_before(scheme, rows, shape):
    """One after another over the same memory, each started while the one before it still runs, as a step has them."""
    plain = adapted_linear(scheme, *shape)
    packed = PackedQuantisedLinear(plain)
    first = torch.arange(rows, device=DEVICE) % 2 == 0
    used = AdapterTokens({"vision": first, "speech": ~first})
    x = torch.randn(8, rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
    y, operand = x.new_empty(8, rows, shape[0]), packed.operand(rows)
    expected = [plain(each, used) for each in x]
    packed.weight.kernels = packed.kernels = True

    def run():
        for each, out in zip(x, y, strict=True):
            packed.x_of(operand).copy_(each)
            packed.apply_to(operand, used, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        y.fill_(torch.nan)
        graph.replay()
        assert max(relative(*pair) for pair in zip(y, expected, strict=True)) < 3e-2


@SCHEMES
def test_together_equals_alone(scheme):
    model = lively_model()
    model.quantise(scheme)
    model.to(DEVICE)
    tokenizer = tiny_tokenizer()
    stage = Stage(model, tokenizer, 128, rows=8)
    assert stage.ids(mixed_requests()) == [result.ids for result in alone(model, tokenizer, mixed_requests())]


@SCHEMES
def test_official_sizes_take_what_they_are_priced_at(scheme):
    """In one piece, with the allocator's rounding; what quantising needs beside them is gone."""
    config = read_config(official.folder())
    before = torch.cuda.memory_allocated(DEVICE)
    model = random_model(config, DEVICE, torch.bfloat16, packed=True, scheme=scheme)
    taken = torch.cuda.memory_allocated(DEVICE) - before
    total = sum(cost.bytes for cost in costs.weights(model.config, 2, "packed"))
    assert total <= taken <= 1.01 * total
    rounding = costs.weights_rounding(model.config, 2, "packed").bytes
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) - before <= total + rounding + 64 * 2**20
