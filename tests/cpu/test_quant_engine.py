"""A quantised model through the whole engine: what may not change an answer does not, and few answers change at all."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from memphi import load
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.random import random_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import EngineConfig
from memphi.engine.engine import make_graphs
from memphi.errors import CheckpointError, RequestError
from memphi.model.packing import PackedLinear
from memphi.model.quant.linears import QuantisedAdaptedLinear
from memphi.model.quant.swap import quantised_weights
from memphi.model.quant.weights import WEIGHTS, Int8Weight
from memphi.model.rows import Row
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.scenes import Stage, alone, lively_model, mixed_requests, tiny_tokenizer

SCHEMES = pytest.mark.parametrize("scheme", list(WEIGHTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("quant") / "model", dtype=torch.float32)


@pytest.fixture(scope="module", params=list(WEIGHTS))
def lively(request):
    model = lively_model()
    model.quantise(request.param)
    return model


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.float(), second[name].float()), name


# --- loading -------------------------------------------------------------------------------------------------------


@SCHEMES
def test_quantised_while_loading_is_quantised_after_it(folder, scheme):
    after = load_model(folder, "cpu", torch.float32)
    after.quantise(scheme)
    while_loading = load_model(folder, "cpu", torch.float32, scheme=scheme)
    assert while_loading.config.scheme == scheme
    assert_same_state(while_loading, after)


@SCHEMES
def test_every_matrix_is_quantised(folder, scheme):
    model = load_model(folder, "cpu", torch.float32, scheme=scheme)
    kinds = {name: type(weight) for name, weight in quantised_weights(model).items()}
    config = model.config
    adapters = {name for name in kinds if ".adapters." in name}
    assert len(adapters) == 4 * 2 * 2 * config.language.layers
    in_decoder = {name: kinds[name] for name in kinds.keys() - adapters if name.startswith("language.layers.")}
    assert len(in_decoder) == 4 * config.language.layers
    assert set(in_decoder.values()) == {WEIGHTS[scheme]}
    others = kinds.keys() - in_decoder.keys() - adapters
    assert len(others) == 1 + 6 * config.vision.layers + (8 + 3) * config.audio.layers + 1 + 6
    assert {kinds[name] for name in others | adapters} == {Int8Weight}
    assert not any(tensor.dim() == 2 and ".layers." in name for name, tensor in model.named_parameters())


@SCHEMES
def test_what_is_written_is_read_back_bit_for_bit(folder, scheme, tmp_path):
    model = load_model(folder, "cpu", torch.float32, scheme=scheme)
    write_checkpoint(model, tmp_path / "small")
    loaded = load_model(tmp_path / "small", "cpu", torch.float32)
    assert loaded.config == model.config
    assert_same_state(loaded, model)
    assert_same_state(load_model(tmp_path / "small", "cpu", torch.float32, scheme=scheme), model)


@SCHEMES
def test_random_weights_are_the_same_numbers_quantised(scheme):
    whole = random_model(tiny_config(), "cpu", torch.bfloat16, 3)
    whole.quantise(scheme)
    assert_same_state(random_model(tiny_config(), "cpu", torch.bfloat16, 3, scheme=scheme), whole)


@SCHEMES
def test_a_folder_that_has_some_matrices_in_16_bits_still_loads(folder, scheme, tmp_path):
    """As they were written before; what is stored in 16 bits is quantised while it is read."""
    model = load_model(folder, "cpu", torch.float32, scheme=scheme)
    old = load_model(folder, "cpu", torch.float32, scheme=scheme)
    whole = load_model(folder, "cpu", torch.float32)
    for late, layer in zip(old.audio.layers, whole.audio.layers, strict=True):
        late.convolution.glu = layer.convolution.glu
    for layer in range(model.config.language.layers):
        for path in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):
            linear = f"language.layers.{layer}.{path}"
            old.get_submodule(linear).adapters = whole.get_submodule(linear).adapters
    write_checkpoint(old, tmp_path / "old")
    assert not any(name.endswith((".a.codes", ".glu.weight.codes")) for name in old.state_dict())
    for packed in (False, True):
        assert_same_state(load_model(tmp_path / "old", "cpu", torch.float32, packed=packed), model)


def test_a_quantised_folder_cannot_be_changed(folder, tmp_path):
    write_checkpoint(load_model(folder, "cpu", torch.float32, scheme="int4"), tmp_path / "small")
    with pytest.raises(CheckpointError, match="holds weights in int4, which cannot be made int8; give the folder that"):
        load_model(tmp_path / "small", "cpu", torch.float32, scheme="int8")
    with pytest.raises(CheckpointError, match="in int4, into which no adapter can be merged; give the folder that"):
        load_model(tmp_path / "small", "cpu", torch.float32, merge="vision")


def test_a_scheme_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match="scheme is 'int3'; it must be one of auto, bf16, int8, int4, fp8"):
        EngineConfig(scheme="int3")


@SCHEMES
@torch.inference_mode()
def test_merged_and_then_quantised(folder, scheme):
    merged = load_model(folder, "cpu", torch.float32, merge="vision")
    merged.quantise(scheme)
    loaded = load_model(folder, "cpu", torch.float32, merge="vision", scheme=scheme)
    assert_same_state(loaded, merged)
    drawn = random_model(tiny_config(), "cpu", torch.float32, 0, merge="vision", scheme=scheme)
    assert_same_state(drawn, merged)


# --- adapters ------------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize(
    "adapters", [(None, None, None), ("vision",) * 3, ("vision", "speech", None), (None, "speech", None)]
)
@torch.inference_mode()
def test_packed_adapters_equal_separate_ones(folder, scheme, adapters):
    plain, packed = (load_model(folder, "cpu", torch.float32, packed=p, scheme=scheme) for p in (False, True))
    assert type(plain.language.layers[0].mlp.down) is QuantisedAdaptedLinear
    assert isinstance(packed.language.layers[0].mlp.down, PackedLinear)
    assert_same_state(plain, packed)
    ids = torch.arange(40)
    rows = [Row(tokens, adapter=name) for tokens, name in zip((15, 20, 5), adapters, strict=True)]
    logits = [model(ids, rows, logits_at=range(40)) for model in (plain, packed)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"step_tokens": 7}, {"step_tokens": 40, "rows": 2}, {"rows": 1}])
def test_chunks_and_company_change_no_answer(lively, settings):
    tokenizer = tiny_tokenizer()
    expected = [result.ids for result in alone(lively, tokenizer, mixed_requests())]
    assert len(set(expected)) == len(expected)
    stage = Stage(lively, tokenizer, 128, **{"rows": 8, **settings})
    assert stage.ids(mixed_requests()) == expected
    stage.check_empty()
    whole = Stage(lively, tokenizer, None, kv_cache=False, rows=8)
    assert whole.ids(mixed_requests()) == expected


QUESTIONS = (
    "Reverse the word: lion",
    "Reverse the word: house",
    "Who are you?",
    "What is 2 plus 3?",
    "Repeat: green circle",
    "Spell the word: tree",
)


@pytest.fixture(scope="module")
def questions():
    from memphi.inputs.media import open_media

    media = "memphi/demo/media/"
    sampling = SamplingParams(max_tokens=24)
    about = [
        ("What is in the picture?", "red-circle.png"),
        ("What colour is the shape?", "green-triangle.png"),
        ("Transcribe the audio.", "words.wav"),
    ]
    return [Request.ask(text, sampling=sampling) for text in QUESTIONS] + [
        Request.ask(text, [open_media(media + name)], sampling=sampling) for text, name in about
    ]


@pytest.fixture(scope="module")
def in_16_bits(questions):
    with closing(load("demo", device="cpu", dtype="fp32", config=EngineConfig(scheme="bf16"))) as engine:
        return engine.generate(questions)


@pytest.mark.parametrize(("scheme", "least"), [("int8", 8), ("fp8", 7), ("int4", 5)])
def test_the_demo_model_answers_mostly_the_same(questions, in_16_bits, scheme, least):
    with closing(load("demo", device="cpu", dtype="fp32", config=EngineConfig(scheme=scheme))) as engine:
        assert engine.plan.scheme == engine.model.config.scheme == scheme
        answers = engine.generate(questions)
    same = sum(ours.text == theirs.text for ours, theirs in zip(answers, in_16_bits, strict=True))
    assert same >= least, [(a.text, b.text) for a, b in zip(answers, in_16_bits, strict=True)]


@pytest.mark.parametrize("packed", [False, True])
@SCHEMES
def test_kernels_are_for_every_scheme(monkeypatch, scheme, packed):
    """Steps in graphs, prefill, and products by the codes as they are."""
    monkeypatch.setattr("memphi.engine.engine.why_not_available", lambda _: None)
    monkeypatch.setattr("memphi.model.phi4mm.is_available", lambda _: True)
    for kept in ("bf16", scheme):
        model = lively_model()
        model.quantise(kept)
        model.keep_adapters(packed, None)
        stage = Stage(model, tiny_tokenizer(), 128, rows=8, kernels="plain")
        forbidden = torch.zeros(model.config.language.vocab_size, dtype=torch.bool)
        graphs = make_graphs(model, stage.pool, stage.plan, EngineConfig(kernels="auto"), forbidden)
        assert graphs is not None
        assert model.uses_kernels
        assert all(weight.kernels for weight in quantised_weights(model).values())
        linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert bool(linears) == packed
        assert all(linear.kernels == model.uses_kernels for linear in linears)


def test_a_small_dial_chooses_fewer_bits():
    """On its own, as the plan says."""
    least = next(
        n_bytes
        for n_bytes in range(420 * 2**20, 1 << 40, 2**20)
        if (plan := _plan_or_none(n_bytes)) is not None and plan.scheme != "bf16"
    )
    with closing(load("demo", device="cpu", dtype="fp32", config=EngineConfig(memory_bytes=least))) as engine:
        assert engine.model.config.scheme == engine.plan.scheme != "bf16"
        assert engine.generate(
            replace(Request.ask("Reverse the word: lion"), sampling=SamplingParams(max_tokens=4))
        ).text


def _plan_or_none(n_bytes):
    from memphi.demo.shape import demo_config
    from memphi.errors import DoesNotFitError
    from memphi.memory.devices import DeviceFacts
    from memphi.memory.planner import make_plan

    try:
        host = DeviceFacts("cpu", "x", 1 << 40, 1 << 40)
        return make_plan(demo_config(), host, EngineConfig(memory_bytes=n_bytes), 4)
    except DoesNotFitError:
        return None
