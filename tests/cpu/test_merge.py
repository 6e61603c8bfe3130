"""An adapter merged into the weights answers as the live one does, takes nothing, and answers no other mode."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from memphi import load, official
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.random import random_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.cli import app
from memphi.config import EngineConfig
from memphi.demo.shape import demo_config
from memphi.errors import CheckpointError, RequestError
from memphi.memory.devices import find_card
from memphi.memory.planner import make_plan
from memphi.model import adapters
from memphi.model.rows import Row
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.scenes import clip, picture

ADAPTERS = pytest.mark.parametrize("name", ["vision", "speech"])
SAMPLING = SamplingParams(max_tokens=16, ignore_eos=True)
REQUESTS = {
    "vision": [
        Request.ask("What is this?", [picture(1, 112, 112)], sampling=SAMPLING),
        Request.ask("What is this?", [picture(2, 224, 112), clip(2)], sampling=SAMPLING),
    ],
    "speech": [Request.ask("Write it down.", [clip(1)], sampling=SAMPLING)],
    None: [Request.ask("Say something.", sampling=SAMPLING)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("merge") / "model", dtype=torch.float32)


def expected_weights(model, name):
    """W + scale * B A in fp64, of every linear that the adapter adapts."""
    return {
        f"{path}.weight": (
            module.weight.double()
            + module.adapters[name].scale * module.adapters[name].b.double() @ module.adapters[name].a.double()
        )
        for path, module in model.named_modules()
        if isinstance(module, adapters.AdaptedLinear)
    }


# --- weights -------------------------------------------------------------------------------------------------------


@ADAPTERS
@pytest.mark.parametrize("numbers", [adapters.MERGED_NUMBERS, 100, 1])
def test_weights_are_the_sum_rounded_once(folder, name, numbers, monkeypatch):
    """To the last bit, in bf16 from a file in fp32 as in fp32, whatever the size of a piece."""
    monkeypatch.setattr(adapters, "MERGED_NUMBERS", numbers)
    live = load_model(folder, "cpu", torch.float32)
    for dtype, slack in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        merged = load_model(folder, "cpu", dtype, merge=name)
        sums = expected_weights(live, name)
        assert merged.merged == name
        assert len(sums) == 4 * live.config.language.layers
        for path, weight in merged.state_dict().items():
            if path in sums:
                assert ((weight.double() - sums[path]).abs() <= slack * sums[path].abs() + 1e-7).all(), path
            else:
                assert torch.equal(weight, live.state_dict()[path].to(dtype)), path


@ADAPTERS
def test_no_adapter_is_kept(folder, name):
    merged = load_model(folder, "cpu", torch.float32, merge=name)
    assert not any("adapters" in path for path in merged.state_dict())
    assert not merged.training
    assert not any(weight.requires_grad for weight in merged.parameters())


@ADAPTERS
def test_a_random_model_is_merged_with_its_own_adapter(name):
    live, merged = (random_model(tiny_config(), "cpu", torch.float32, 5, merge=merge) for merge in (None, name))
    for path, total in expected_weights(live, name).items():
        assert torch.allclose(merged.state_dict()[path].double(), total, atol=1e-6), path
    assert torch.equal(merged.language.embedding.weight, live.language.embedding.weight)


def test_progress_goes_to_the_end(folder):
    seen = []
    load_model(folder, "cpu", torch.float32, progress=lambda done, total: seen.append((done, total)), merge="vision")
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]


def test_a_merged_model_is_not_written(folder, tmp_path):
    with pytest.raises(CheckpointError, match="the vision adapter is merged into this model; load it anew to write it"):
        write_checkpoint(load_model(folder, "cpu", torch.float32, merge="vision"), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("placement", ["towers", "adapters", "streamed"])
def test_a_model_whose_weights_come_and_go_is_not_written(folder, tmp_path, placement):
    model = load_model(folder, "cpu", torch.float32)
    model.place(placement)
    with pytest.raises(CheckpointError, match="lie on the host until they are needed; load it anew to write it"):
        write_checkpoint(model, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# --- answers -------------------------------------------------------------------------------------------------------


@ADAPTERS
@torch.inference_mode()
def test_logits_equal_those_of_the_live_adapter(folder, name):
    live, merged = (load_model(folder, "cpu", torch.float32, merge=merge) for merge in (None, name))
    ids, rows = torch.arange(40), [Row(15, adapter=name), Row(25, adapter=name)]
    expected = live(ids, rows, logits_at=range(40))
    assert (merged(ids, rows, logits_at=range(40)) - expected).abs().max() <= 1e-4
    with pytest.raises(AssertionError, match="is merged"):
        merged(ids, [Row(40)])


@ADAPTERS
def test_the_demo_model_answers_token_by_token_the_same(name):
    live = load("demo", device="cpu", dtype="fp32")
    merged = load("demo", device="cpu", dtype="fp32", config=EngineConfig(merge=name))
    assert merged.plan.adapters == "merged"
    requests = REQUESTS[name]
    assert [result.ids for result in merged.generate(requests)] == [result.ids for result in live.generate(requests)]
    live.close()
    merged.close()


@ADAPTERS
def test_other_modes_are_refused_in_one_sentence(name):
    engine = load("demo", device="cpu", dtype="fp32", config=EngineConfig(merge=name))
    for adapter in {"vision", "speech", None} - {name}:
        for request in REQUESTS[adapter]:
            for on_pressure in ("wait", "shrink-images", "one-by-one", "refuse"):
                with pytest.raises(
                    RequestError, match=f"the {name} adapter is merged into the weights, so only requests"
                ):
                    engine.generate(replace(request, on_pressure=on_pressure))
    assert len(engine.generate(REQUESTS[name][0]).ids) == SAMPLING.max_tokens
    engine.close()


def test_an_adapter_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match="merge is 'sound'; it must be one of vision, speech"):
        EngineConfig(merge="sound")


# --- the plan ------------------------------------------------------------------------------------------------------


@ADAPTERS
def test_the_plan_prices_no_adapter_and_says_so(name):
    config = read_config(official.folder())
    live, merged = (make_plan(config, find_card("RTX 4090"), EngineConfig(merge=merge)) for merge in (None, name))
    adapter_bytes = sum(cost.bytes for cost in live.costs if cost.name.endswith("adapter"))
    assert live.weights_bytes - merged.weights_bytes >= adapter_bytes > 1.5 * 2**30
    assert merged.pages > live.pages
    assert (live.adapters, merged.adapters) == ("packed", "merged")
    assert name in merged.reasons["adapters"]
    assert f"the {name} adapter merged" in merged.reasons["weights_bytes"]
    merging = next(cost for cost in merged.costs if cost.name == "merging")
    assert merging.bytes <= merged.workspace_bytes


def test_a_plan_on_a_cpu_keeps_adapters_plain():
    plans = [
        make_plan(demo_config(), replace(find_card("RTX 4090"), kind=kind), EngineConfig()) for kind in ("cpu", "cuda")
    ]
    assert [plan.adapters for plan in plans] == ["plain", "packed"]


def test_the_plan_command_takes_merge():
    command = ["plan", "--model", "demo", "--device", "cpu", "--merge", "speech"]
    document = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert document["plan"]["adapters"] == "merged"
    assert "speech is part of the weights" in CliRunner().invoke(app, command).stdout
    refused = CliRunner().invoke(app, [*command, "A question in words"])
    assert isinstance(refused.exception, RequestError)
