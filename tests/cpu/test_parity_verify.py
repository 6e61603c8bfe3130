"""`verify` finds agreement on a good checkpoint and tells where a damaged one differs."""

import sys
from dataclasses import replace

import pytest
import torch

from memphi.checkpoint.loader import load_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.errors import CheckpointError, MemphiError
from memphi.request import InputMode
from memphi.verify import Trace, compare, verify
from tests.checkpoints import tiny_checkpoint, tiny_config, write_tokenizer
from tests.oracle import make_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("verify") / "model", dtype=torch.float32)


def perturbed(folder, target, name):
    """A copy of a checkpoint in which one weight is changed."""
    model = load_model(folder, "cpu", torch.float32)
    model.get_parameter(name)[0, 0] += 1
    write_checkpoint(model, target)
    write_tokenizer(target)
    return str(target)


def test_a_good_checkpoint_agrees_in_all_modes(folder):
    said = []
    reports = verify(str(folder), CPU, torch.float32, progress=said.append)
    assert [report.mode for report in reports] == list(InputMode)
    for report in reports:
        assert report.agrees
        assert report.relative <= 1e-5
        assert report.mean <= report.largest <= 1e-4
        assert report.top1 == 1
        assert report.ours == report.theirs
        assert len(report.ours) == 8
        assert report.compared_tokens >= min(report.prompt_tokens, 60)
    assert said[0] == "memphi: loading"
    assert said[-1] == "transformers: vision_speech"


def test_the_long_regime_is_reached_within_the_answer(tmp_path):
    """The text prompt's answer crosses the border, after which both start over."""
    config = tiny_config(short_tokens=4096)
    plain = verify(str(tiny_checkpoint(tmp_path / "long", config, torch.float32)), CPU, torch.float32, new_tokens=0)
    border = tiny_config(short_tokens=plain[0].prompt_tokens + 3)
    text = verify(str(tiny_checkpoint(tmp_path / "border", border, torch.float32)), CPU, torch.float32)[0]
    assert text.agrees
    assert text.ours == text.theirs
    assert len(text.ours) == 8


def test_half_precision_is_held_to_its_own_tolerance(folder):
    reports = verify(str(folder), CPU, torch.bfloat16, new_tokens=0)
    assert all(report.agrees and report.ours == report.theirs == () for report in reports)
    assert max(report.relative for report in reports) > 1e-5


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("language.layers.1.mlp.down.weight", (True, True, True, True)),
        ("language.layers.0.attention.qkv.adapters.speech.a", (False, False, True, False)),
        ("vision.layers.0.attention.query.weight", (False, True, False, True)),
        ("audio_projectors.vision.up.weight", (False, False, False, True)),
    ],
)
def test_a_changed_weight_shows_in_the_modes_that_use_it(folder, tmp_path, name, differs):
    other = perturbed(folder, tmp_path / "other", name)
    reports = verify(str(folder), CPU, torch.float32, oracle=other, new_tokens=0)
    assert tuple(not report.agrees for report in reports) == differs


def test_a_number_that_is_none_never_agrees():
    prompt = make_prompt(tiny_config())
    good = Trace(torch.ones(2, 5), ())
    assert compare(prompt, good, good, 0.1).agrees
    assert not compare(prompt, Trace(torch.full((2, 5), torch.nan), ()), good, 0.1).agrees


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MemphiError, match=r'pip install "\.\[verify\]"'):
        verify(str(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    ("part", "sizes", "reason"),
    [("vision", {"layers": 1}, "more tensors"), ("language", {"intermediate_size": 80}, "and not")],
)
def test_a_checkpoint_of_other_sizes_is_no_oracle(folder, tmp_path, part, sizes, reason):
    config = tiny_config()
    other_config = replace(config, **{part: replace(getattr(config, part), **sizes)})
    other = tiny_checkpoint(tmp_path / "other", other_config, torch.float32)
    with pytest.raises(CheckpointError, match=reason):
        verify(str(folder), CPU, torch.float32, oracle=str(other), new_tokens=0)
