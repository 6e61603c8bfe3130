"""transformers' own Phi-4-multimodal, made from an official checkpoint's tensors: what memphi is held against.

Renames tensors by a list of its own and reads them with the safetensors library, so that a mistake in memphi's reader
or table of names shows too. Imports transformers only when used. Called by `verify`, the benchmarks and the tests.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.names import official_name
from memphi.config import ModelConfig
from memphi.errors import CheckpointError, MemphiError
from memphi.model.phi4mm import Phi4MM
from memphi.request import MediaKind, Prompt

ATTENTION = {"": "sdpa", "vision_config": "eager", "audio_config": "sdpa"}
"""Not sdpa for the vision tower: its module calls itself causal, so that transformers (seen in 5.24) hides the later
patches from the earlier ones wherever no crop has padding."""

_INSTALL = (
    'comparing needs transformers with Phi-4-multimodal; install it from your copy of memphi: pip install ".[verify]"'
)
_RENAMES = (
    (r"\.base_layer\.", "."),
    (r"\.(feed_forward_\w+)\.net\.0\.linear\.", r".\1.gate_up_proj."),
    (r"\.(feed_forward_\w+)\.net\.2\.", r".\1.down_proj."),
    (r"\.self_attn\.linear_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.img_projection\.0\.", ".img_projection_up."),
    (r"\.img_projection\.2\.", ".img_projection_down."),
    (r"\.glb_GN$", ".global_img_feature_extensor"),
    (r"\.sub_GN$", ".sub_img_feature_extensor"),
    (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
    (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
    (r"\.audio_projection\.vision\.0\.", ".up_proj_for_vision_speech."),
    (r"\.audio_projection\.vision\.2\.", ".down_proj_for_vision_speech."),
)


class StoredWeights(Mapping[str, Tensor]):
    """A folder's tensors by official name, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        found = find_tensors(folder, config)
        # The official layout's names are taken as they stand; the converted one's come through memphi's table.
        official = config.layout == "official"
        self._stored = {t.name if official else official_name(ours): t for ours, t in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with safe_open(stored.file, framework="pt") as file:
            return cast(Tensor, file.get_tensor(stored.name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def model_weights(model: Phi4MM) -> dict[str, Tensor]:
    """A model's tensors by official name."""
    return {official_name(ours): tensor for ours, tensor in model.state_dict().items()}


def transformers_name(official: str) -> str:
    """transformers' name of an official tensor (spec 2.5); adapters have none there."""
    for pattern, replacement in _RENAMES:
        official = re.sub(pattern, replacement, official)
    return official


def import_transformers() -> Any:  # noqa: ANN401
    """The transformers module; raises MemphiError with what to install where it or its Phi-4-multimodal is missing."""
    try:
        transformers = import_module("transformers")
        transformers.Phi4MultimodalForCausalLM  # noqa: B018
    except (ImportError, AttributeError):
        raise MemphiError(_INSTALL) from None
    return transformers


def build_oracle(
    config: ModelConfig,
    placeholders: Mapping[MediaKind, int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Any:  # noqa: ANN401
    """transformers' model in these sizes, its weights not yet set; placeholders are the ids that media stand on."""
    transformers = import_transformers()
    settings = transformers.Phi4MultimodalConfig(**_settings(config, placeholders))
    settings._attn_implementation = dict(ATTENTION)
    with torch.device("meta"):
        oracle = transformers.Phi4MultimodalForCausalLM(settings)
    oracle = oracle.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    oracle.lm_head.weight = oracle.model.embed_tokens.weight
    # Frequencies are computed and not loaded: on the meta device they were lost.
    oracle.model.rotary_emb = type(oracle.model.rotary_emb)(settings).to(device)
    oracle.generation_config = transformers.GenerationConfig(do_sample=False)
    return oracle


def _settings(config: ModelConfig, placeholders: Mapping[MediaKind, int]) -> dict[str, Any]:
    """transformers' words for our sizes (spec 2.5)."""
    language = config.language
    return {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_tokens,
        "original_max_position_embeddings": language.short_tokens,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": language.rope_theta,
            "partial_rotary_factor": language.rotary_dim / language.head_dim,
            "short_factor": list(language.short_factor),
            "long_factor": list(language.long_factor),
            "original_max_position_embeddings": language.short_tokens,
            "factor": language.max_tokens / language.short_tokens,
        },
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "pad_token_id": None,
        "vision_config": _vision_settings(config) | {"image_token_id": placeholders["image"]},
        "audio_config": _audio_settings(config) | {"audio_token_id": placeholders["audio"]},
    }


def _vision_settings(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.layers + 1,
        "num_attention_heads": vision.heads,
        "image_size": vision.crop_size,
        "crop_size": vision.crop_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
    }


def _audio_settings(config: ModelConfig) -> dict[str, Any]:
    audio = config.audio
    return {
        "hidden_size": audio.hidden_size,
        "intermediate_size": audio.intermediate_size,
        "num_blocks": audio.layers,
        "num_attention_heads": audio.heads,
        "nemo_conv_channels": audio.conv_channels,
        "ext_pw_out_channel": audio.hidden_size,
        "depthwise_separable_out_channel": audio.hidden_size,
        "kernel_size": audio.kernel_size,
        "input_size": audio.mel_bins,
        "time_reduction": audio.compression,
        "bias_max_distance": audio.bias_distance,
    }


def fill_oracle(oracle: Any, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:  # noqa: ANN401
    """Set every weight but the adapters; raises CheckpointError for what is unknown, missing or of another shape."""
    targets: dict[str, Tensor] = oracle.state_dict()
    missing = {name for name in targets if not is_unused(name, config)}
    for official in weights:
        if ".lora_" in official:
            continue
        name = transformers_name(official)
        if name not in targets:
            raise CheckpointError(f"transformers' model has no place for the tensor {official!r}")
        weight = weights[official]
        if weight.shape != targets[name].shape:
            shapes = f"{tuple(weight.shape)} and not {tuple(targets[name].shape)}"
            raise CheckpointError(f"the tensor {official!r} is {shapes}, as transformers' model has it")
        targets[name].copy_(weight)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"transformers' model needs {len(missing)} more tensors, one is {min(missing)!r}")


def is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of transformers' model never matters (spec 2.2), or is the second name of the tied embedding."""
    last = rf"encoder\.layers\.{config.vision.layers}"
    return bool(re.search(rf"\.img_processor\.(head|post_layernorm|{last})\.|^lm_head\.weight$", name))


def merge_adapter(
    oracle: Any,  # noqa: ANN401
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    adapter: str | None,
) -> None:
    """Make every adapted weight W + scale * B A, or W where adapter is None; summed in fp32, then rounded."""
    targets: dict[str, Tensor] = oracle.state_dict()
    for official in weights:
        linear, base, _ = official.partition(".base_layer.weight")
        if base:
            target = targets[transformers_name(official)]
            weight = weights[official].to(target.device, torch.float32, copy=True)
            if adapter is not None:
                a, b = (weights[f"{linear}.lora_{part}.{adapter}.weight"].to(weight) for part in "AB")
                weight += config.adapter(adapter).scale * (b @ a)
            target.copy_(weight)


def oracle_inputs(prompt: Prompt, device: torch.device | str) -> dict[str, Tensor]:
    """A prompt as transformers' model takes it: media padded to the longest of their kind.

    No mask says where clips end, as in the official processor's output for one clip; give clips of one length only.
    """
    ids = torch.tensor([prompt.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | _images(prompt) | _clips(prompt)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _images(prompt: Prompt) -> dict[str, Tensor]:
    """Crops padded with zeros, masks with ones, as the official processor does (spec 4.3-10)."""
    if not prompt.images:
        return {}
    images = prompt.cropped_images
    most = max(image.footprint.crops for image in images)
    side = images[0].crops.shape[-1]
    patches = images[0].patch_mask.shape[-1]
    pixels = torch.zeros(len(images), most, 3, side, side)
    masks = torch.ones(len(images), most, patches, patches, dtype=torch.bool)
    for i, image in enumerate(images):
        pixels[i, : image.footprint.crops] = torch.from_numpy(image.crops)
        masks[i, : image.footprint.crops] = torch.from_numpy(image.patch_mask)
    layouts = [(image.footprint.crop_rows, image.footprint.crop_columns) for image in images]
    return {
        "image_pixel_values": pixels,
        "image_attention_mask": masks,
        "image_sizes": torch.tensor(layouts) * side,
    }


def _clips(prompt: Prompt) -> dict[str, Tensor]:
    if not prompt.clips:
        return {}
    features = [torch.from_numpy(clip.features) for clip in prompt.framed_clips]
    return {
        "audio_input_features": torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
        "audio_embed_sizes": torch.tensor([clip.footprint.tokens for clip in prompt.clips]),
    }
