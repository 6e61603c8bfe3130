"""Four bits made while loading, by how large inputs are in the texts that a decoder is shown as it is read."""

import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch

from memphi.checkpoint.calibration import example_rows
from memphi.checkpoint.filling import loading_examples
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
from memphi.checkpoint.quantisation import quantise_folder
from memphi.config import EngineConfig
from memphi.engine.engine import load_parts
from memphi.engine.messages import Loading
from memphi.errors import CheckpointError
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory import costs
from memphi.model.quant.examples import Examples, adapted_linears
from memphi.model.quant.swap import quantised_weights
from memphi.model.quant.weights import Int4Weight, Int8Weight
from tests.checkpoints import tiny_checkpoint
from tests.cpu.test_quantize import spoil

EXAMPLES = [[5, 9, 200, 31, 7, 7, 54], [77, 3, 150, 9, 61, 12]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


def load(folder, **settings):
    return load_model(folder, "cpu", torch.bfloat16, **{"scheme": "int4", "examples": EXAMPLES, **settings})


def decoder_weights(model):
    return {
        name: weight
        for name, weight in quantised_weights(model).items()
        if name.startswith("language.layers") and ".adapters." not in name
    }


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@torch.no_grad()
def seen_squares(model):
    """What each of the decoder's linears sees of the examples, squared and summed, in fp32, by its weight's name."""
    table = model.language.embedding.weight
    weight = Int8Weight(*table.shape)
    weight.store(0, table)
    hidden = weight.look_up(torch.tensor(list(chain(*EXAMPLES))), torch.float32)
    examples, squares = Examples(model.config.language, [len(row) for row in EXAMPLES], hidden), {}
    for name, linear in adapted_linears(model.language).items():

        def keep(_, inputs, name=name):
            squares[f"language.{name}.weight"] = inputs[0].square().sum(0)

        linear.register_forward_pre_hook(keep)
    for layer in model.language.layers:
        examples.advance(layer)
    return squares


@pytest.mark.parametrize("merge", [None, "vision"])
@torch.no_grad()
def test_codes_suit_what_reaches_each_linear(source, merge):
    made = decoder_weights(load(source, merge=merge))
    original = load_model(source, "cpu", torch.bfloat16, merge=merge).float()
    squares = seen_squares(original)
    assert made.keys() == squares.keys()
    for name, weight in made.items():
        expected = Int4Weight(weight.out_features, weight.in_features)
        expected.store(0, original.get_parameter(name), squares[name])
        meant = [each.dequantise(0, each.out_features, torch.float32) for each in (weight, expected)]
        # In another order sums differ in their last digits, and a number halfway between two goes to the other.
        assert torch.isclose(*meant, rtol=1e-2, atol=1e-4).float().mean() > 0.99, name
    by_themselves = decoder_weights(load(source, merge=merge, examples=()))
    assert not any(same(weight, by_themselves[name]) for name, weight in made.items())


def test_all_else_is_as_without_examples(source):
    made, by_themselves = load(source), load(source, examples=())
    shown = {f"{name}.{part}" for name in decoder_weights(made) for part in ("codes", "affine")}
    for name, tensor in by_themselves.state_dict().items():
        assert name in shown or torch.equal(tensor, made.state_dict()[name]), name


def test_pieces_of_any_size_make_the_same_codes(source, monkeypatch):
    made = decoder_weights(load(source))
    monkeypatch.setattr("memphi.model.quant.swap.QUANTISED_NUMBERS", 500)
    for name, weight in decoder_weights(load(source)).items():
        meant = [each.dequantise(0, each.out_features, torch.float32) for each in (weight, made[name])]
        assert torch.isclose(*meant, rtol=1e-2, atol=1e-4).float().mean() > 0.99, name


def test_progress_comes_to_its_end(source):
    told = []
    load(source, progress=lambda done, total: told.append((done, total)))
    dones, totals = zip(*told, strict=True)
    assert list(dones) == sorted(dones)
    assert set(totals) == {dones[-1]}


def test_what_is_quantised_already_stays_as_it_is(source, tmp_path):
    quantise_folder(source, tmp_path / "small", "int4")
    stored, loaded = (load(tmp_path / "small", examples=examples) for examples in ((), EXAMPLES))
    assert all(same(weight, decoder_weights(loaded)[name]) for name, weight in decoder_weights(stored).items())


@pytest.mark.parametrize("name", ["mlp.down_proj.base_layer", "mlp.gate_up_proj.base_layer"])
def test_a_bad_tensor_is_named_though_examples_reach_it(source, tmp_path, name):
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    spoil(damaged, f"model.layers.1.{name}.weight", float("nan"))
    with pytest.raises(CheckpointError, match=f"tensor 'model.layers.1.{name}.weight' holds a number that is infinite"):
        load(damaged)


def test_texts_of_long_rows_alone_are_cut(source):
    """As a tokenizer makes them that has a token for each byte."""
    tokenizer, config = Tokenizer.from_folder(source), read_config(source)
    (row,) = example_rows(tokenizer, config, tokens=3)
    assert len(row) == 3


def test_a_model_that_computes_no_numbers_is_told(source, monkeypatch):
    monkeypatch.setattr("memphi.checkpoint.filling.embed", lambda rows, *_: torch.full((13, 48), torch.inf))
    with pytest.raises(CheckpointError, match="infinite or none at all of the example texts, so no codes"):
        load(source)


def test_the_engine_shows_a_few_of_the_texts():
    folder = locate("demo").folder
    tokenizer, config = Tokenizer.from_folder(folder), read_config(folder)
    rows = loading_examples("int4", tokenizer, config)
    assert rows == example_rows(tokenizer, config, costs.LOADING_TOKENS)
    assert 0.8 * costs.LOADING_TOKENS < sum(map(len, rows)) <= costs.LOADING_TOKENS <= costs.EXAMPLE_BATCH_TOKENS
    assert [loading_examples(scheme, tokenizer, config) for scheme in ("bf16", "int8", "fp8")] == [[], [], []]
    parts = load_parts(Loading("demo", "cpu", "fp32", "auto", EngineConfig(scheme="int4"), "default"))
    expected = decoder_weights(load_model(folder, "cpu", torch.float32, scheme="int4", examples=rows))
    found = decoder_weights(parts.model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        meant = [each.dequantise(0, each.out_features, torch.float32) for each in (weight, expected[name])]
        assert torch.equal(*meant), name
