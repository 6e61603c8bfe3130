"""Which rows share a step changes no logit: company, adapters, regimes, positions scored."""

from dataclasses import replace

import pytest
import torch

from memphi.model.adapters import AdapterTokens
from memphi.model.attention import select_attention
from memphi.model.rows import Row, pack
from tests.checkpoints import tiny_model, variants
from tests.oracle import (
    TOLERANCE,
    all_logits,
    largest_difference,
    make_prompt,
    make_row,
    mode_prompts,
    parity_config,
)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    chosen = tiny_model(parity_config())
    for module in chosen.modules():
        if hasattr(module, "attention") and not isinstance(module.attention, torch.nn.Module):
            module.attention = select_attention(request.param)
    return chosen


@pytest.fixture(scope="module")
def prompts(model):
    return mode_prompts(model.config)


def pack_prompts(model, prompts):
    """ids, rows, media and last positions of prompts laid end to end."""
    ids, rows, media = [], [], []
    for prompt in prompts:
        media += [(len(ids) + start, embedded) for start, embedded in model.encode_media(prompt)]
        rows.append(make_row(model, prompt))
        ids += prompt.ids
    return torch.tensor(ids), rows, media


@torch.inference_mode()
def test_rows_of_all_modes_in_one_step_equal_each_alone(model, prompts):
    order = [prompts[i] for i in (2, 0, 3, 1, 0)]
    ids, rows, media = pack_prompts(model, order)
    together = model(ids, rows, media, logits_at=range(len(ids))).split([row.tokens for row in rows])
    for prompt, logits in zip(order, together, strict=True):
        alone = all_logits(model, prompt)
        assert largest_difference(logits, alone) <= TOLERANCE
        assert torch.equal(logits.argmax(-1), alone.argmax(-1))


@torch.inference_mode()
def test_rows_of_both_regimes_share_a_step():
    model = tiny_model(parity_config(short_tokens=64))
    prompts = [make_prompt(model.config, text_tokens=tokens, seed=tokens) for tokens in (64, 65, 10)]
    ids, rows, media = pack_prompts(model, prompts)
    assert [row.long for row in rows] == [False, True, False]
    together = model(ids, rows, media, logits_at=range(len(ids))).split([row.tokens for row in rows])
    for prompt, logits in zip(prompts, together, strict=True):
        assert largest_difference(logits, all_logits(model, prompt)) <= TOLERANCE


@torch.inference_mode()
def test_the_regime_counts():
    model = tiny_model(parity_config())
    ids = torch.arange(40)
    short, long = (model(ids, [Row(40, long=long)], logits_at=range(40)) for long in (False, True))
    assert largest_difference(short, long) > 1e-2


@torch.inference_mode()
def test_only_the_positions_asked_for_are_scored(model, prompts):
    prompt = prompts[3]
    ids, rows, media = pack_prompts(model, [prompt, prompts[0]])
    every = model(ids, rows, media, logits_at=range(len(ids)))
    for wanted in ([0], [5, 2, 5], [len(ids) - 1, 17]):
        some = model(ids, rows, media, logits_at=wanted)
        assert some.shape == (len(wanted), model.config.language.vocab_size)
        assert largest_difference(some, every[wanted]) <= TOLERANCE
    last = model(ids, rows, media)
    assert largest_difference(last, every[[len(prompt.ids) - 1, len(ids) - 1]]) <= TOLERANCE


def test_packing_names_the_tokens_of_each_adapter():
    rows = [Row(2, adapter="vision"), Row(3, past=4), Row(1, adapter="speech", long=True), Row(1, adapter="vision")]
    packing = pack(rows, torch.device("cpu"))
    assert packing.positions.tolist() == [0, 1, 4, 5, 6, 0, 0]
    assert packing.long.tolist() == [False] * 5 + [True, False]
    assert packing.adapter_tokens["speech"] == slice(5, 6)
    assert packing.adapter_tokens["vision"].tolist() == [0, 1, 6]
    assert packing.lengths == [2, 3, 1, 1]
    assert pack(rows[:1], torch.device("cpu")).adapter_tokens == {"vision": None}


@pytest.mark.parametrize("adapter", ["vision", "speech"])
@torch.inference_mode()
def test_an_adapter_for_some_tokens_equals_the_same_for_all(adapter):
    linear = tiny_model().language.layers[0].mlp.gate_up
    x = torch.randn(13, linear.weight.shape[1], generator=torch.Generator().manual_seed(0))
    everywhere, nowhere = linear(x, AdapterTokens({adapter: None})), linear(x, AdapterTokens())
    some = torch.tensor([1, 4, 12])
    expected = nowhere.clone()
    expected[some] = everywhere[some]
    assert largest_difference(linear(x, AdapterTokens({adapter: some})), expected) <= 1e-5
    assert largest_difference(everywhere, nowhere) > 1e-2


def merge(model, adapter):
    """The same model with one adapter added into its weights."""
    merged = tiny_model(model.config)
    merged.load_state_dict(model.state_dict())
    for module in merged.modules():
        if hasattr(module, "adapters"):
            low_rank = module.adapters[adapter]
            module.weight += low_rank.scale * (low_rank.b @ low_rank.a)
    return merged


@pytest.mark.parametrize("name", sorted(variants()))
@torch.inference_mode()
def test_a_live_adapter_equals_merged_weights(name):
    model = tiny_model(parity_config(variants()[name]))
    ids = torch.randint(0, 200, (21,), generator=torch.Generator().manual_seed(1))
    for adapter in ("vision", "speech"):
        live = model(ids, [Row(21, adapter=adapter)], logits_at=range(21))
        assert largest_difference(live, merge(model, adapter)(ids, [Row(21)], logits_at=range(21))) <= TOLERANCE
        assert largest_difference(live, model(ids, [Row(21)], logits_at=range(21))) > 1e-2


@torch.inference_mode()
def test_the_scale_is_alpha_over_rank():
    config = parity_config()
    doubled = replace(config, speech_adapter=replace(config.speech_adapter, alpha=2 * config.speech_adapter.alpha))
    ids, rows = torch.arange(9), [Row(9, adapter="speech")]
    model, other = tiny_model(config), tiny_model(doubled)
    for module in other.modules():
        if hasattr(module, "adapters"):
            module.adapters["speech"].b /= 2
    assert largest_difference(model(ids, rows), other(ids, rows)) <= TOLERANCE
