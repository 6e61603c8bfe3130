"""Adapters packed beside the weights they adapt equal the definition: sets, rows, dtypes, files, the engine."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from memphi import load
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.random import random_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import AdapterConfig
from memphi.demo.shape import demo_config
from memphi.model import packing
from memphi.model.adapters import AdaptedLinear, AdapterTokens
from memphi.model.packing import PackedLinear, pack_adapters
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config, tiny_model
from tests.cpu.test_memory_costs import Peak
from tests.scenes import GREEDY, Stage, conversation, lively_model, mixed_requests, picture

COUNT = 9
TOKENS = {
    "all": None,
    "side by side": slice(2, 6),
    "index": torch.tensor([0, 4, 8]),
    "mask": torch.tensor([True, False, False, True, False, True, True, False, False]),
}
SETS = [{}, *({name: tokens} for name in ("vision", "speech") for tokens in TOKENS)]
SETS += [{"vision": one, "speech": other} for one, other in product(TOKENS, TOKENS)]
TOLERANCE = 1e-5
"""fp32 sums in another order."""


def make_linear(n_in=48, n_out=40, ranks=(4, 6), scales=(2.0, 1.5), dtype=torch.float32, count=2):
    """Numbers as large as a trained model's, so that outputs are about one."""
    names = ("vision", "speech")[:count]
    configs = [AdapterConfig(rank, rank * scale) for rank, scale in zip(ranks, scales, strict=True)]
    linear = AdaptedLinear(n_in, n_out, dict(zip(names, configs, strict=False))).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in linear.parameters():
        weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return linear.to(dtype)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def largest_difference(one, other):
    return (one - other).abs().max().item()


def packed_model(config=None, dtype=torch.float32):
    model = tiny_model(config, dtype)
    model.keep_adapters(packed=True, merge=None)
    return model


def packed_linears(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


# --- one linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", SETS, ids=str)
def test_every_set_of_adapters_for_any_tokens(used):
    linear, x = make_linear(), numbers(COUNT, 48)
    adapter_tokens = AdapterTokens({name: TOKENS[tokens] for name, tokens in used.items()})
    expected = linear(x, adapter_tokens)
    assert largest_difference(PackedLinear(linear)(x, adapter_tokens), expected) <= TOLERANCE
    if used:
        assert largest_difference(expected, linear(x, AdapterTokens())) > 0.1


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_adapters_than_two(count):
    linear, x = make_linear(count=count), numbers(COUNT, 48)
    used = AdapterTokens(dict.fromkeys(linear.adapters))
    packed = PackedLinear(linear)
    assert packed.wide.shape == (40, 48 + 4 * count)
    assert largest_difference(packed(x, used), linear(x, used)) <= TOLERANCE


@pytest.mark.parametrize("used", SETS, ids=str)
def test_in_bf16_it_is_no_further_from_the_truth_than_the_definition(used):
    """It rounds less: the sum of base and adapters once, and what A makes of x once, after its scale."""
    linear, x = make_linear(256, 320, (16, 24), dtype=torch.bfloat16), numbers(COUNT, 256, dtype=torch.bfloat16)
    adapter_tokens = AdapterTokens({name: TOKENS[tokens] for name, tokens in used.items()})
    exact = make_linear(256, 320, (16, 24), dtype=torch.bfloat16).float()(x.float(), adapter_tokens)
    error, allowed = (
        (layer(x, adapter_tokens).float() - exact).pow(2).mean().sqrt().item()
        for layer in (PackedLinear(linear), linear)
    )
    assert error <= allowed * 1.02


SPANS = {
    "speech before vision": ({"speech": slice(0, 300), "vision": slice(300, 1000)}, 2),
    "none first": ({"speech": slice(300, 650), "vision": slice(650, 1000)}, 3),
    "none last": ({"vision": slice(0, 400)}, 2),
    "none between": ({"vision": slice(0, 300), "speech": slice(700, 1000)}, 3),
    "too few to read the weights again": ({"vision": slice(0, 990)}, 1),
    "few in all": ({"vision": slice(0, 20), "speech": slice(20, 40)}, 1),
    "one for all": ({"vision": None}, 1),
    "two for all": ({"vision": None, "speech": None}, 1),
    "two for some": ({"vision": slice(0, 600), "speech": slice(500, 1000)}, 1),
}


@pytest.mark.parametrize("case", SPANS)
def test_many_tokens_are_divided_by_adapter_where_that_takes_less(case, monkeypatch):
    used, wanted = SPANS[case]
    adapter_tokens = AdapterTokens(used)
    count = 40 if case == "few in all" else 1000
    linear, x = make_linear(), numbers(count, 48)
    products, multiply = [], packing.multiply

    def note(x, weight, out, kernels):
        products.append(x.shape)
        return multiply(x, weight, out, kernels)

    monkeypatch.setattr(packing, "multiply", note)
    y = PackedLinear(linear)(x, adapter_tokens)
    assert len(products) == wanted
    assert sum(tokens for tokens, _ in products) == count
    assert largest_difference(y, linear(x, adapter_tokens)) <= TOLERANCE


def test_each_set_of_adapters_is_a_range_of_one_matrix():
    packed = PackedLinear(make_linear())
    widths = {(): 48, ("vision",): 52, ("speech",): 54, ("vision", "speech"): 58}
    for names, width in widths.items():
        columns = packed.columns(names)
        view = packed.wide[:, columns]
        assert view.shape == (40, width)
        assert view.untyped_storage().data_ptr() == packed.wide.data_ptr()


@pytest.mark.parametrize("name", ["vision", "speech"])
def test_an_adapter_that_is_not_in_use_is_not_read(name):
    linear = make_linear()
    packed = PackedLinear(linear)
    for weight in packed.adapters[name].parameters():
        weight.fill_(torch.nan)
    other = "speech" if name == "vision" else "vision"
    for used in map(AdapterTokens, ({}, {other: None}, {other: slice(0, 3)})):
        assert largest_difference(packed(numbers(5, 48), used), linear(numbers(5, 48), used)) <= TOLERANCE


@pytest.mark.parametrize("used", SETS, ids=str)
def test_x_may_be_computed_in_its_place(used):
    packed, x = PackedLinear(make_linear()), numbers(COUNT, 48)
    adapter_tokens = AdapterTokens({name: TOKENS[tokens] for name, tokens in used.items()})
    expected = packed(x, adapter_tokens)
    assert torch.equal(packed.follow(lambda out: torch.mul(x, 1, out=out), COUNT, adapter_tokens), expected)
    operand, out = packed.operand(COUNT).fill_(torch.nan), torch.full((COUNT, 40), torch.nan)
    packed.x_of(operand).copy_(x)
    assert packed.apply_to(operand, adapter_tokens, out) is out
    assert torch.equal(out, expected)


# --- as a module ---------------------------------------------------------------------------------------------------


def assert_views(packed):
    for weight in packed.parameters():
        assert weight.untyped_storage().data_ptr() in (
            packed.wide.untyped_storage().data_ptr(),
            packed.narrow.untyped_storage().data_ptr(),
        )


def test_parameters_keep_their_names_and_numbers():
    plain, packed = tiny_model(), packed_model()
    assert plain.state_dict().keys() == packed.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name
    assert len(packed_linears(packed)) == 4 * plain.config.language.layers
    assert all(type(module) is not AdaptedLinear for module in packed.modules())
    for linear in packed_linears(packed):
        assert_views(linear)


def test_what_is_loaded_or_moved_stays_packed():
    packed = packed_model()
    packed.load_state_dict(tiny_model(seed=1).state_dict())
    linear = packed.language.layers[0].mlp.down
    assert torch.equal(linear.wide[:, 4 : 4 + 72], tiny_model(seed=1).language.layers[0].mlp.down.weight)
    packed.to(torch.float64)
    assert linear.wide.dtype is torch.float64
    assert_views(linear)
    assert not any(weight.requires_grad for weight in packed.parameters())


def test_gradients_are_refused():
    packed = packed_model().requires_grad_(True)
    with pytest.raises(RuntimeError, match="automatic differentiation"):
        packed(torch.arange(9), [Row(9, adapter="vision")])


def test_packing_takes_one_linear_beside_the_model():
    with Peak([]) as peak, torch.device("meta"):
        model = Phi4MM(demo_config())
        before = sum(peak.alive.values())
        pack_adapters(model.language, {AdaptedLinear: PackedLinear})
        assert sum(peak.alive.values()) == before
    assert peak.bytes <= before + max(linear.wide.nbytes + linear.narrow.nbytes for linear in packed_linears(model))


# --- loading and writing -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("packed") / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_read_into_its_place(folder, dtype):
    plain, packed = (load_model(folder, "cpu", dtype, packed=packed) for packed in (False, True))
    assert packed.adapter_form == "packed"
    assert not packed.training
    assert not any(weight.requires_grad for weight in packed.parameters())
    for name, weight in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name
    for linear in packed_linears(packed):
        assert_views(linear)


@pytest.mark.parametrize("piece_bytes", [60, 200, 1000])
def test_pieces_of_any_size_are_read_into_their_place(folder, piece_bytes, monkeypatch):
    from memphi.checkpoint import reader

    monkeypatch.setattr(reader, "_PIECE_BYTES", piece_bytes)
    packed = load_model(folder, "cpu", torch.float32, packed=True)
    monkeypatch.undo()
    for name, weight in load_model(folder, "cpu", torch.float32).state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_has_the_same_numbers(dtype):
    plain, packed = (random_model(tiny_config(), "cpu", dtype, 3, packed=packed) for packed in (False, True))
    assert packed.adapter_form == "packed"
    for name, weight in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[name], weight), name


def test_the_same_files_are_written(folder, tmp_path):
    write_checkpoint(load_model(folder, "cpu", torch.bfloat16, packed=True), tmp_path / "model", shard_bytes=200_000)
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (folder / name).read_bytes(), name


# --- the whole model -----------------------------------------------------------------------------------------------

STEPS = {
    "text": [Row(40)],
    "vision": [Row(40, adapter="vision")],
    "speech": [Row(40, adapter="speech")],
    "sorted": [Row(10), Row(20, adapter="speech"), Row(10, adapter="vision")],
    "in turn": [Row(10, adapter="speech"), Row(10, adapter="vision"), Row(10, adapter="speech"), Row(10)],
}


@pytest.mark.parametrize("name", STEPS)
@torch.inference_mode()
def test_a_step_of_any_rows(name):
    ids, rows = torch.arange(40), STEPS[name]
    plain, packed = tiny_model(), packed_model()
    expected = plain(ids, rows, logits_at=range(40))
    assert largest_difference(packed(ids, rows, logits_at=range(40)), expected) <= 1e-4


@pytest.mark.parametrize("name", STEPS)
@torch.inference_mode()
def test_a_step_in_bf16_is_no_further_from_the_truth(name):
    """The same weights in fp32 are the truth; the rest is chance, in 40 positions of a model of two layers."""
    ids, rows = torch.arange(40), STEPS[name]
    exact = tiny_model(dtype=torch.bfloat16).float()(ids, rows, logits_at=range(40))
    error, allowed = (
        (model(ids, rows, logits_at=range(40)).float() - exact).pow(2).mean().sqrt().item()
        for model in (packed_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16))
    )
    assert error <= allowed * 1.25


# --- the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_stage(tokenizer):
    model = lively_model()
    model.keep_adapters(packed=True, merge=None)

    def make(pages=128, rows=8, **settings):
        return Stage(model, tokenizer, pages, rows=rows, **settings)

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 7},
        {"step_tokens": 40, "rows": 2},
        {"pages": 20},
        {"pages": None, "kv_cache": False},
    ],
)
def test_the_engine_answers_token_by_token_the_same(packed_stage, expected, settings):
    packed = packed_stage(**settings)
    assert packed.ids(mixed_requests()) == expected
    packed.check_empty()


def test_known_beginnings_and_sampling_go_on_the_same(packed_stage, stage):
    sampling = replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)
    requests = [conversation(1, sampling), conversation(2, sampling), *mixed_requests(sampling)]
    assert packed_stage().ids(requests) == stage().ids(requests)


@torch.inference_mode()
def test_the_demo_model_answers_the_same():
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    requests = [
        Request.ask("What is this?", [picture(5, 224, 112)], sampling=sampling),
        Request.ask("Say something.", sampling=sampling),
        Request.ask("What is this?", [picture(6, 112, 112)], sampling=sampling),
    ]
    engine = load("demo", device="cpu", dtype="fp32")
    assert engine.plan.adapters == "plain"
    wanted = [result.ids for result in engine.generate(requests)]
    engine.model.keep_adapters(packed=True, merge=None)
    assert [result.ids for result in engine.generate(requests)] == wanted
    assert len(packed_linears(engine.model)) == 4 * engine.model.config.language.layers
    engine.close()
