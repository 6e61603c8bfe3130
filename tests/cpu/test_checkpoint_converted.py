"""The converted transformers layout: weights that transformers itself wrote, adapters in PEFT folders (spec 2.5)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from memphi.checkpoint.loader import load_model
from memphi.checkpoint.names import official_name
from memphi.errors import CheckpointError
from memphi.model.attention import select_attention
from memphi.model.rows import Row

transformers = pytest.importorskip("transformers")

RANKS = {"vision": (4, 12), "speech": (6, 9)}  # r, lora_alpha


def small_transformers_model():
    config = transformers.Phi4MultimodalConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=[1, 2],
        pad_token_id=1,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 3,
            "long_factor": [1.0, 2.0, 3.0],
            "original_max_position_embeddings": 32,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "crop_size": 56,
            "patch_size": 14,
            "image_token_id": 10,
        },
        audio_config={
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_blocks": 2,
            "num_attention_heads": 5,
            "nemo_conv_channels": 16,
            "ext_pw_out_channel": 40,
            "depthwise_separable_out_channel": 40,
            "bias_max_distance": 20,
            "audio_token_id": 11,
        },
    )
    torch.manual_seed(0)
    return transformers.Phi4MultimodalForCausalLM(config).eval()


def write_adapters(folder):
    """A PEFT folder per adapter, random; returns the tensors by the names that the official layout gives them."""
    sizes = {
        "self_attn.qkv_proj": (48, 80),
        "self_attn.o_proj": (48, 48),
        "mlp.gate_up_proj": (48, 128),
        "mlp.down_proj": (64, 48),
    }
    official = {}
    for adapter, (rank, alpha) in RANKS.items():
        tensors = {}
        for layer in range(2):
            for linear, (inputs, outputs) in sizes.items():
                for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    value = torch.randn(shape) * 0.1
                    tensors[f"base_model.model.model.layers.{layer}.{linear}.lora_{side}.weight"] = value
                    official[f"model.layers.{layer}.{linear}.lora_{side}.{adapter}.weight"] = value
        (folder / f"{adapter}-lora").mkdir()
        save_file(tensors, folder / f"{adapter}-lora" / "adapter_model.safetensors")
        (folder / f"{adapter}-lora" / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    return official


@pytest.fixture(scope="module")
def original():
    return small_transformers_model()


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path)
    return tmp_path


def test_the_converted_layout_is_the_same_model(original, folder):
    official = write_adapters(folder)
    model = load_model(folder, "cpu", torch.float32, select_attention("eager"))
    assert model.config.vision_adapter.scale == 3.0
    assert model.config.speech_adapter.scale == 1.5
    adapters = {name: tensor for name, tensor in model.state_dict().items() if ".adapters." in name}
    assert len(adapters) == len(official)
    for name, tensor in adapters.items():
        assert torch.equal(tensor, official[official_name(name)])
    ids = torch.arange(20, 45)
    with torch.no_grad():
        ours = model(ids, [Row(25)], logits_at=range(25))
        theirs = original(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_second_copy_of_the_tied_embedding_is_skipped(folder):
    write_adapters(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    load_model(folder, "cpu", torch.float32)


def refuse(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, "cpu", torch.float32)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_missing_adapters_are_named(folder):
    refuse(folder, "vision-lora/adapter_config.json", "does not exist")
    write_adapters(folder)
    (folder / "speech-lora" / "adapter_model.safetensors").unlink()
    refuse(folder, "speech-lora/adapter_model.safetensors")


@pytest.mark.parametrize("name", ["x.weight", "base_model.model.model.layers.0.mlp.down_proj.lora_A.speech.weight"])
def test_unknown_adapter_tensors_are_named(folder, name):
    write_adapters(folder)
    file = folder / "vision-lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(1)}, file)
    refuse(folder, "vision-lora/adapter_model.safetensors", name)


def test_an_adapter_tensor_under_two_names_is_refused(folder):
    write_adapters(folder)
    file = folder / "vision-lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    twice = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    save_file(tensors | {twice.replace(".weight", ".default.weight"): tensors[twice].clone()}, file)
    refuse(folder, "under another name")


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4},
        {"r": 0, "lora_alpha": 8},
        {"r": "four", "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "use_dora": True},
        {"r": 4, "lora_alpha": 8, "bias": "all"},
        [],
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(folder, config):
    write_adapters(folder)
    (folder / "vision-lora" / "adapter_config.json").write_text(json.dumps(config))
    refuse(folder, "vision-lora/adapter_config.json")


def test_a_rank_that_the_weights_do_not_have_is_refused(folder):
    write_adapters(folder)
    (folder / "vision-lora" / "adapter_config.json").write_text(json.dumps({"r": 5, "lora_alpha": 8}))
    refuse(folder, "vision-lora/adapter_model.safetensors", "has shape [4, ", "expected [5, ")
