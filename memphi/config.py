"""What a checkpoint's config files say, as plain frozen dataclasses.

Reads the official layout (model_type phi4mm) and the converted transformers layout (phi4_multimodal), and writes the
official one. Imports no torch; every floor uses it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memphi.errors import CheckpointError

DEFAULT_MODEL = "microsoft/Phi-4-multimodal-instruct"


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of the decoder (spec 1.1)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    norm_eps: float
    rope_theta: float
    rotary_dim: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    short_tokens: int
    """The longest sequence that uses the short factors; one token more and every position uses the long ones."""
    max_tokens: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def rope_scale(self) -> float:
        """The factor on cos and sin in both regimes (spec 3.1)."""
        stretch = self.max_tokens / self.short_tokens
        return math.sqrt(1 + math.log(stretch) / math.log(self.short_tokens)) if stretch > 1 else 1.0

    def is_long(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens is computed under the long factors."""
        return tokens > self.short_tokens


@dataclass(frozen=True)
class AdapterConfig:
    """One LoRA adapter on the four linears of every decoder layer."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower; `layers` counts those that are computed (the official tower stores one more)."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    layers: int = 26
    heads: int = 16
    crop_size: int = 448
    patch_size: int = 14
    norm_eps: float = 1e-6
    max_crops: int = 36

    @property
    def patches(self) -> int:
        """Patches along one side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class AudioConfig:
    """Sizes of the conformer and of what it eats."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    conv_channels: int
    kernel_size: int = 3
    mel_bins: int = 80
    bias_distance: int = 500
    window_tokens: int = 500
    compression: int = 8
    mask_tail: bool = False
    """Mask the zero rows that fill a long clip's last window, as the official code does only when several clips share
    a call; False follows its single-clip behaviour, so that a clip's result never depends on its company (spec 5.2)."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class ModelConfig:
    """Everything the model's shapes and stop rule depend on."""

    language: LanguageConfig
    vision: VisionConfig
    audio: AudioConfig
    vision_adapter: AdapterConfig
    speech_adapter: AdapterConfig
    stop_token_ids: tuple[int, ...]
    layout: str = "official"

    def adapter(self, name: str) -> AdapterConfig:
        return {"vision": self.vision_adapter, "speech": self.speech_adapter}[name]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and, where present, generation_config.json and preprocessor_config.json.

        Raises CheckpointError naming the file and the field.
        """
        config = _read_json(folder / "config.json")
        return cls.from_json(
            config,
            generation=_read_json(folder / "generation_config.json", missing_ok=True),
            preprocessor=_read_json(folder / "preprocessor_config.json", missing_ok=True),
        )

    @classmethod
    def from_json(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        preprocessor: Mapping[str, Any] | None = None,
    ) -> "ModelConfig":
        """Build from parsed JSON of either layout."""
        readers = {"phi4mm": _from_official, "phi4_multimodal": _from_converted}
        kind = config.get("model_type")
        if kind not in readers:
            raise CheckpointError(
                f"config.json: model_type is {kind!r}; memphi runs Phi-4-multimodal only ({' or '.join(readers)})"
            )
        try:
            result = readers[kind](config, generation or {}, preprocessor or {})
        except KeyError as missing:
            raise CheckpointError(f"config.json: the field {missing} is missing") from None
        except (TypeError, ValueError) as wrong:
            raise CheckpointError(f"config.json: a field has a value that cannot be used ({wrong})") from None
        _check(result)
        return result

    def to_json(self) -> dict[str, Any]:
        """The official layout's config.json; sizes that the official code fixes go under the key `memphi`."""
        return _to_official(self)


@dataclass(frozen=True)
class EngineConfig:
    """How much one step does."""

    step_tokens: int = 2048
    """Tokens computed in one forward pass at most; longer prompts are computed in chunks."""
    rows: int = 64
    """Sequences that run at once; further requests wait."""


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise CheckpointError(f"{path} does not exist; a model folder holds config.json and *.safetensors") from None
    except (OSError, ValueError) as wrong:
        raise CheckpointError(f"{path} cannot be read as JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _language(config: Mapping[str, Any], rope: Mapping[str, Any]) -> LanguageConfig:
    head_dim = int(config["hidden_size"]) // int(config["num_attention_heads"])
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return LanguageConfig(
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        kv_heads=int(config["num_key_value_heads"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rotary_dim=int(head_dim * float(partial)),
        short_factor=tuple(float(x) for x in rope["short_factor"]),
        long_factor=tuple(float(x) for x in rope["long_factor"]),
        short_tokens=int(rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]),
        max_tokens=int(config["max_position_embeddings"]),
    )


def _stop_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer; an official checkpoint's generation_config.json names `<|end|>` too."""
    found = generation.get("eos_token_id", config.get("eos_token_id", ()))
    return tuple(found) if isinstance(found, list) else (int(found),)


def _from_official(
    config: Mapping[str, Any], generation: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> ModelConfig:
    audio = config["audio_processor"]["config"]
    extra = config.get("memphi", {})
    vision = VisionConfig(
        crop_size=int(config["embd_layer"]["image_embd_layer"]["crop_size"]),
        max_crops=int(preprocessor.get("dynamic_hd", VisionConfig.max_crops)),
        **extra.get("vision", {}),
    )
    return ModelConfig(
        language=_language(config, config["rope_scaling"]),
        vision=vision,
        audio=AudioConfig(
            hidden_size=int(audio["attention_dim"]),
            intermediate_size=int(audio["linear_units"]),
            layers=int(audio["num_blocks"]),
            heads=int(audio["attention_heads"]),
            conv_channels=int(audio["nemo_conv_settings"]["conv_channels"]),
            kernel_size=int(audio["kernel_size"]),
            mel_bins=int(audio["input_size"]),
            bias_distance=int(audio["relative_attention_bias_args"]["t5_bias_max_distance"]),
            compression=int(audio["time_reduction"]),
            **extra.get("audio", {}),
        ),
        vision_adapter=_adapter(config["vision_lora"]),
        speech_adapter=_adapter(config["speech_lora"]),
        stop_token_ids=_stop_ids(config, generation),
    )


def _adapter(value: Mapping[str, Any]) -> AdapterConfig:
    return AdapterConfig(rank=int(value["r"]), alpha=float(value["lora_alpha"]))


def _from_converted(
    config: Mapping[str, Any], generation: Mapping[str, Any], preprocessor: Mapping[str, Any]
) -> ModelConfig:
    """The transformers layout (spec 2.5); its adapters lie in folders and bring their own ranks (see `adapters`)."""
    audio, vision = config["audio_config"], config["vision_config"]
    adapters = config.get(
        "adapters", {"vision": {"r": 256, "lora_alpha": 512}, "speech": {"r": 320, "lora_alpha": 640}}
    )
    return ModelConfig(
        language=_language(config, config.get("rope_parameters") or config["rope_scaling"]),
        vision=VisionConfig(
            hidden_size=int(vision["hidden_size"]),
            intermediate_size=int(vision["intermediate_size"]),
            layers=int(vision["num_hidden_layers"]) - 1,
            heads=int(vision["num_attention_heads"]),
            crop_size=int(vision["crop_size"]),
            patch_size=int(vision["patch_size"]),
            norm_eps=float(vision.get("layer_norm_eps", VisionConfig.norm_eps)),
            max_crops=int(preprocessor.get("dynamic_hd", VisionConfig.max_crops)),
        ),
        audio=AudioConfig(
            hidden_size=int(audio["hidden_size"]),
            intermediate_size=int(audio["intermediate_size"]),
            layers=int(audio["num_blocks"]),
            heads=int(audio["num_attention_heads"]),
            conv_channels=int(audio["nemo_conv_channels"]),
            kernel_size=int(audio.get("kernel_size", AudioConfig.kernel_size)),
            mel_bins=int(audio.get("input_size", AudioConfig.mel_bins)),
            bias_distance=int(audio["bias_max_distance"]),
            compression=int(audio.get("time_reduction", AudioConfig.compression)),
        ),
        vision_adapter=_adapter(adapters["vision"]),
        speech_adapter=_adapter(adapters["speech"]),
        stop_token_ids=_stop_ids(config, generation),
        layout="converted",
    )


def _to_official(config: ModelConfig) -> dict[str, Any]:
    language, vision, audio = config.language, config.vision, config.audio
    extra: dict[str, Any] = {}
    fixed = ("hidden_size", "intermediate_size", "layers", "heads", "patch_size", "norm_eps")
    sizes = {name: getattr(vision, name) for name in fixed}
    if any(sizes[name] != getattr(VisionConfig, name) for name in fixed):
        extra["vision"] = sizes
    switches = {"window_tokens": audio.window_tokens, "mask_tail": audio.mask_tail}
    if any(value != getattr(AudioConfig, name) for name, value in switches.items()):
        extra["audio"] = switches
    document = {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.intermediate_size,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "partial_rotary_factor": language.rotary_dim / language.head_dim,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": list(language.short_factor),
            "long_factor": list(language.long_factor),
        },
        "original_max_position_embeddings": language.short_tokens,
        "max_position_embeddings": language.max_tokens,
        "eos_token_id": list(config.stop_token_ids),
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": {
                "crop_size": vision.crop_size,
                "hd_transform_order": "sub_glb",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            "audio_embd_layer": {"compression_rate": audio.compression, "downsample_rate": 1},
        },
        "audio_processor": {
            "name": "cascades",
            "config": {
                "attention_dim": audio.hidden_size,
                "linear_units": audio.intermediate_size,
                "num_blocks": audio.layers,
                "attention_heads": audio.heads,
                "nemo_conv_settings": {"conv_channels": audio.conv_channels},
                "kernel_size": audio.kernel_size,
                "input_size": audio.mel_bins,
                "time_reduction": audio.compression,
                "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": audio.bias_distance},
            },
        },
        "vision_lora": {"r": config.vision_adapter.rank, "lora_alpha": config.vision_adapter.alpha},
        "speech_lora": {"r": config.speech_adapter.rank, "lora_alpha": config.speech_adapter.alpha},
    }
    return document | ({"memphi": extra} if extra else {})


def _check(config: ModelConfig) -> None:
    """Refuse sizes that cannot be computed, each with the field's name."""
    language, vision, audio = config.language, config.vision, config.audio
    half = language.rotary_dim // 2
    rules = (
        (language.hidden_size % language.heads == 0, "hidden_size must be a multiple of num_attention_heads"),
        (language.heads % language.kv_heads == 0, "num_attention_heads must be a multiple of num_key_value_heads"),
        (language.rotary_dim % 2 == 0, "the rotated part of a head must be even"),
        (len(language.short_factor) == half, f"rope_scaling.short_factor must hold {half} numbers"),
        (len(language.long_factor) == half, f"rope_scaling.long_factor must hold {half} numbers"),
        (vision.hidden_size % vision.heads == 0, "the vision hidden size must be a multiple of its heads"),
        (vision.crop_size % (2 * vision.patch_size) == 0, "crop_size must be an even number of patches"),
        (audio.hidden_size % audio.heads == 0, "attention_dim must be a multiple of attention_heads"),
        (audio.compression == 8, "time_reduction must be 8"),
        (len(config.stop_token_ids) > 0, "eos_token_id must name at least one token"),
    )
    for holds, message in rules:
        if not holds:
            raise CheckpointError(f"config.json: {message}")
