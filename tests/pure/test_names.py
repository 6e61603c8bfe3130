"""The table of names against the official list of tensors (spec 2)."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memphi.checkpoint.names import from_converted, from_official, from_peft, official_name

TENSORS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "tensors.json.gz").read_bytes()))
VISION_LAYERS = 26


def test_every_official_tensor_is_known_and_29_are_unused():
    ours = {name: from_official(name, VISION_LAYERS) for name in TENSORS}
    used = [name for name in ours.values() if name is not None]
    assert len(ours) == 2047
    assert len(used) == len(set(used)) == 2018


def test_names_go_there_and_back():
    for name in TENSORS:
        ours = from_official(name, VISION_LAYERS)
        if ours is not None:
            assert official_name(ours) == name


def test_unused_tensors_are_those_after_the_last_computed_layer():
    unused = [name for name in TENSORS if from_official(name, VISION_LAYERS) is None]
    assert len(unused) == 29
    assert all(re.search(r"img_processor\.(encoder\.layers\.26|post_layernorm|head)\.", name) for name in unused)


# Spec 2.5, in its own words.
CONVERTED = (
    (r"\.base_layer\.", "."),
    (r"(encoders\.\d+\.feed_forward_(?:in|out))\.net\.0\.linear\.", r"\1.gate_up_proj."),
    (r"(encoders\.\d+\.feed_forward_(?:in|out))\.net\.2\.", r"\1.down_proj."),
    (r"self_attn\.linear_([qkv])\.", r"self_attn.\1_proj."),
    (r"self_attn\.linear_out\.", "self_attn.o_proj."),
    (r"img_projection\.0\.", "img_projection_up."),
    (r"img_projection\.2\.", "img_projection_down."),
    (r"glb_GN", "global_img_feature_extensor"),
    (r"sub_GN", "sub_img_feature_extensor"),
    (r"audio_projection\.speech\.0\.", "up_proj_for_speech."),
    (r"audio_projection\.speech\.2\.", "down_proj_for_speech."),
    (r"audio_projection\.vision\.0\.", "up_proj_for_vision_speech."),
    (r"audio_projection\.vision\.2\.", "down_proj_for_vision_speech."),
)


def convert(name):
    for pattern, replacement in CONVERTED:
        name = re.sub(pattern, replacement, name)
    return name


def test_converted_names_mean_the_same_as_the_official_ones():
    base = [name for name in TENSORS if ".lora_" not in name]
    for name in base:
        assert from_converted(convert(name), VISION_LAYERS) == from_official(name, VISION_LAYERS)
    assert from_converted("lm_head.weight", VISION_LAYERS) is None


@pytest.mark.parametrize("suffix", [".weight", ".default.weight", ".{adapter}.weight"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_adapter_files_names_mean_the_same_as_the_official_ones(prefix, suffix):
    for name in (name for name in TENSORS if ".lora_" in name):
        adapter = name.split(".")[-2]
        bare = prefix + name.removesuffix(f".{adapter}.weight")
        assert from_peft(bare + suffix.format(adapter=adapter), adapter) == from_official(name, VISION_LAYERS)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "model.norm.weight ",
        "model.norm.weights",
        "model.layers.01.input_layernorm.weight",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.0.self_attn.qkv_proj.lora_A.audio.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "xmodel.norm.weight",
        "model.norm.weight\n",
    ],
)
def test_unknown_names_are_key_errors(name):
    with pytest.raises(KeyError):
        from_official(name, VISION_LAYERS)
    with pytest.raises(KeyError):
        official_name(name)


def test_names_import_no_torch():
    code = "import sys, memphi.checkpoint.layout, memphi.checkpoint.locate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
