"""Configs: both layouts are read, the official one is written, and what cannot be a model is refused by name."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi import official
from memphi.config import AdapterConfig, EngineConfig, ModelConfig
from memphi.errors import CheckpointError, RequestError

OFFICIAL = json.loads((official.folder() / "config.json").read_text())
CONVERTED = {
    "model_type": "phi4_multimodal",
    **{
        name: OFFICIAL[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "max_position_embeddings",
            "original_max_position_embeddings",
        )
    },
    "rope_parameters": {**OFFICIAL["rope_scaling"], "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    "eos_token_id": [200020, 199999],
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "crop_size": 448,
        "patch_size": 14,
    },
    "audio_config": {
        "hidden_size": 1024,
        "intermediate_size": 1536,
        "num_blocks": 24,
        "num_attention_heads": 16,
        "nemo_conv_channels": 1024,
        "bias_max_distance": 500,
    },
}
SIZES = {
    "official": [
        ("vocab_size",),
        ("hidden_size",),
        ("intermediate_size",),
        ("num_hidden_layers",),
        ("num_attention_heads",),
        ("num_key_value_heads",),
        ("original_max_position_embeddings",),
        ("max_position_embeddings",),
        ("embd_layer", "image_embd_layer", "crop_size"),
        ("audio_processor", "config", "attention_dim"),
        ("audio_processor", "config", "linear_units"),
        ("audio_processor", "config", "num_blocks"),
        ("audio_processor", "config", "attention_heads"),
        ("audio_processor", "config", "nemo_conv_settings", "conv_channels"),
        ("audio_processor", "config", "kernel_size"),
        ("audio_processor", "config", "input_size"),
        ("audio_processor", "config", "relative_attention_bias_args", "t5_bias_max_distance"),
        ("vision_lora", "r"),
        ("speech_lora", "r"),
        ("memphi", "vision", "heads"),
        ("memphi", "vision", "layers"),
        ("memphi", "vision", "patch_size"),
        ("memphi", "audio", "window_tokens"),
    ],
    "converted": [
        ("hidden_size",),
        *(("vision_config", name) for name in CONVERTED["vision_config"]),
        *(("audio_config", name) for name in CONVERTED["audio_config"]),
    ],
}
DOCUMENTS = {"official": OFFICIAL, "converted": CONVERTED}
HOSTILE_SIZES = (0, -5, 10**30, 10**400, 2**24 + 1, 1.5, float("nan"), True, "24", [24], {"a": 1})


def changed(document, path, value):
    """A copy of a document with one field set, its objects made where they are missing."""
    result = copy.deepcopy(document)
    place = result
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = value
    return result


def refused(document, path):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_json(document)
    message = str(caught.value)
    assert message.startswith("config.json: ")
    assert path[-1] in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rows": 1.5}, {"rows": 0}, {"memory_bytes": "8"}, {"memory_bytes": math.nan}, {"step_tokens": math.inf}),
        *({"idle_seconds": math.nan}, {"idle_seconds": -1}),
    ],
)
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} is .*; it must be "):
        EngineConfig(**wrong)


def test_a_size_that_was_computed_is_a_whole_number():
    config = EngineConfig(memory_bytes=16e9, rows=np.int64(3))
    assert (config.memory_bytes, type(config.memory_bytes), type(config.rows)) == (16 * 10**9, int, int)


def test_the_official_sizes_are_read():
    config = ModelConfig.from_folder(official.folder())
    assert (config.language.layers, config.language.head_dim, config.language.rotary_dim) == (32, 128, 96)
    assert (config.vision.layers, config.vision.patches, config.vision.max_crops) == (26, 32, 36)
    assert (config.audio.hidden_size, config.audio.head_dim, config.audio.mask_tail) == (1024, 64, False)
    assert (config.vision_adapter.scale, config.speech_adapter.scale) == (2.0, 2.0)
    assert config.stop_token_ids == (200020, 199999)
    assert math.isclose(config.language.rope_scale**2, 17 / 12)


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(44, 30), (44, 44), (88, 30), (88, 60), (92, 58), (96, 30), (116, 58), (128, 96)]
)
def test_a_share_of_a_head_that_was_written_is_read(head_dim, rotary_dim):
    """Though 30 / 44 of 44 is a little less than 30."""
    sizes = {"hidden_size": 24 * head_dim, "num_attention_heads": 24, "num_key_value_heads": 8}
    rope = OFFICIAL["rope_scaling"] | {name: [1.0] * (rotary_dim // 2) for name in ("short_factor", "long_factor")}
    document = OFFICIAL | sizes | {"rope_scaling": rope, "partial_rotary_factor": rotary_dim / head_dim}
    assert ModelConfig.from_json(document).language.rotary_dim == rotary_dim


def test_the_converted_layout_says_the_same():
    config = ModelConfig.from_json(CONVERTED)
    assert replace(config, layout="official") == ModelConfig.from_folder(official.folder())


def test_without_generation_config_the_config_names_the_stop_tokens():
    assert ModelConfig.from_json(OFFICIAL).stop_token_ids == (199999,)


@pytest.mark.parametrize("switches", [{}, {"mask_tail": True}, {"window_tokens": 30}])
@pytest.mark.parametrize("tower", [{}, {"layers": 2, "heads": 8}, {"patch_size": 28, "norm_eps": 1e-5}])
def test_what_is_written_is_read_again(switches, tower):
    config = ModelConfig.from_json(OFFICIAL)
    config = replace(
        config,
        audio=replace(config.audio, **switches),
        vision=replace(config.vision, **tower),
        speech_adapter=AdapterConfig(4, 6.5),
    )
    written = json.loads(json.dumps(config.to_json()))
    assert ModelConfig.from_json(written) == config
    assert ("memphi" in written) == bool(switches or tower)
    assert "torch_dtype" not in written


@pytest.mark.parametrize("layout", SIZES)
@pytest.mark.parametrize("value", HOSTILE_SIZES, ids=lambda value: repr(value)[:9])
def test_a_size_that_cannot_be_is_refused_by_its_name(layout, value):
    for path in SIZES[layout]:
        refused(changed(DOCUMENTS[layout], path, value), path)


@pytest.mark.parametrize("path", [("num_hidden_layers",), ("audio_processor", "config", "num_blocks")])
def test_there_are_a_thousand_layers_at_most(path):
    refused(changed(OFFICIAL, path, 1001), path)
    assert ModelConfig.from_json(changed(OFFICIAL, path, 1000))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_attention_heads",), 23),
        (("num_key_value_heads",), 7),
        (("partial_rotary_factor",), 1.5),
        (("partial_rotary_factor",), 0.001),
        (("partial_rotary_factor",), 0.712),
        (("original_max_position_embeddings",), 1),
        (("rope_scaling", "short_factor"), [1.0] * 47),
        (("rope_scaling", "long_factor"), []),
        (("rope_scaling", "long_factor"), [*[1.0] * 47, -1.0]),
        (("rope_scaling", "long_factor"), "many"),
        (("rms_norm_eps",), 0),
        (("rms_norm_eps",), "small"),
        (("rope_theta",), float("inf")),
        (("embd_layer", "image_embd_layer", "crop_size"), 434),
        (("audio_processor", "config", "attention_heads"), 15),
        (("audio_processor", "config", "time_reduction"), 4),
        (("eos_token_id",), []),
        (("eos_token_id",), [-1]),
        (("eos_token_id",), "end"),
        (("vision_lora", "lora_alpha"), None),
        (("speech_lora",), None),
        (("audio_processor",), 3),
        (("memphi", "audio", "mask_tail"), 1),
        (("memphi", "vision"), 1),
        (("model_type",), "llama"),
        (("model_type",), []),
    ],
)
def test_values_that_do_not_go_together_are_refused_by_their_name(path, value):
    refused(changed(OFFICIAL, path, value), path)


@pytest.mark.parametrize("layout", SIZES)
def test_a_field_that_is_missing_is_named(layout):
    for path in [
        *SIZES[layout],
        ("rope_scaling",) if layout == "official" else ("rope_parameters",),
        ("rms_norm_eps",),
    ]:
        if path[0] != "memphi" and path[-1] not in ("kernel_size", "input_size"):
            refused(changed(DOCUMENTS[layout], path, None), path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tie_word_embeddings", False), ("attention_bias", True), ("lm_head_bias", True), ("sliding_window", 4096)],
)
@pytest.mark.parametrize("layout", DOCUMENTS)
def test_another_decoder_is_refused(layout, field, value):
    refused(changed(DOCUMENTS[layout], (field,), value), (field,))


def test_the_other_files_are_named_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    (tmp_path / "preprocessor_config.json").write_text('{"dynamic_hd": 0}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: dynamic_hd is 0"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(HOSTILE_SIZES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None)
@given(path=st.sampled_from([*SIZES["official"], *((name,) for name in OFFICIAL)]), value=JSON)
def test_no_value_of_a_field_gets_beyond_a_checkpoint_error(path, value):
    try:
        config = ModelConfig.from_json(changed(OFFICIAL, path, value))
    except CheckpointError:
        return
    assert config.language.rope_scale > 0
    assert ModelConfig.from_json(config.to_json()) == config
