"""What a checkpoint's config files say, as plain frozen dataclasses.

Reads the official layout (model_type phi4mm) and the converted transformers layout (phi4_multimodal), and writes the
official one. Imports no torch; every floor uses it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from memphi.errors import CheckpointError, RequestError

DEFAULT_MODEL = "microsoft/Phi-4-multimodal-instruct"

AdapterName = Literal["vision", "speech"]
AdapterForm = Literal["plain", "packed", "merged"]
"""How adapters are kept: as W, A and B; A and B beside W, for products over all of them; or one added into W."""

KernelChoice = Literal["auto", "plain"]
Place = Literal["host", "device"]
PlaceChoice = Literal["auto", "host", "device"]

CacheFormat = Literal["plain", "int8", "fp8"]
"""How keys and values are kept: in the model's own number format, or in 8 bits with a scale for each token and head."""
CacheChoice = Literal["auto", "plain", "int8", "fp8"]

Placement = Literal["resident", "towers", "adapters", "shared", "streamed"]
"""What of the weights lies on the host until a step needs it: nothing; the towers; these and the adapters; the same,
with less room for them on the device; or the decoder's layers as well, which every step brings one after another."""
PlacementChoice = Literal["auto", "resident", "towers", "adapters", "shared", "streamed"]
TOWERS, ADAPTERS = ("vision tower", "audio encoder"), ("vision adapter", "speech adapter")
ROOMS: dict[Placement, tuple[tuple[str, ...], ...]] = {
    "resident": (),
    "towers": (TOWERS,),
    "adapters": (TOWERS, ADAPTERS),
    "shared": ((*TOWERS, *ADAPTERS),),
    "streamed": ((*TOWERS, *ADAPTERS),),
}
"""The rooms that a device has for groups of weights on the host; of the groups of one, one is there at a time."""

Scheme = Literal["bf16", "int8", "int4", "fp8"]
"""How the decoder's linears are kept: bf16 is the number format that was asked for, the others are quantised."""
SchemeChoice = Literal["auto", "bf16", "int8", "int4", "fp8"]


def group_size(in_features: int) -> int:
    """Inputs of a linear that share a scale and a shift in int4."""
    return 128 if in_features % 128 == 0 else 64


LARGEST_SIZE, LARGEST_NUMBER = 2**24, 1e12
MOST_LAYERS, MOST_CROPS = 1000, 1000
LARGEST_CROP, MOST_MEL_BINS = 4096, 256
"""What a config may ask for: far beyond any real model, and small enough that shapes can be computed and compared."""


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
    scheme: Scheme = "bf16"
    """How the weights are kept: in files, and where these hold 16 bits as the plan chooses."""

    @property
    def other_scheme(self) -> Scheme:
        """The scheme of the linears outside the decoder, of adapters, and of the embedding, which is the head too."""
        return "bf16" if self.scheme == "bf16" else "int8"

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
        """Build from parsed JSON of either layout; raises CheckpointError naming the field."""
        readers = {"phi4mm": _from_official, "phi4_multimodal": _from_converted}
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in readers:
            raise CheckpointError(
                f"config.json: model_type is {kind!r}; memphi runs Phi-4-multimodal only ({' or '.join(readers)})"
            )
        result = readers[kind](
            _Fields("config.json:", config),
            _Fields("generation_config.json:", generation or {}),
            _Fields("preprocessor_config.json:", preprocessor or {}),
        )
        _check(result)
        return result

    def to_json(self) -> dict[str, Any]:
        """The official layout's config.json without the weights' dtype, which whoever writes the weights adds.

        Sizes that the official code fixes go under the key `memphi`.
        """
        return _to_official(self)


@dataclass(frozen=True)
class EngineConfig:
    """The one dial, and pins for what the plan derives from it; None leaves a number to the plan.

    Raises RequestError for a number below one, and for an adapter, a scheme, a cache format, a placement or a choice of
    kernels that there is not.
    """

    memory_bytes: int | None = None
    """Device memory for everything: context, weights, keys and values, work space; None: what is free, less some."""
    rows: int | None = None
    """Sequences that run at once; further requests wait."""
    step_tokens: int | None = None
    """Tokens computed in one forward pass at most; longer prompts are computed in chunks."""
    crops_per_pass: int | None = None
    windows_per_pass: int | None = None
    """Windows of 40 s of sound."""
    kv_cache: bool = True
    """False: every step computes its rows anew; the last resort."""
    cache_format: CacheChoice = "auto"
    """How keys and values are kept: auto: as the model has them, and in int8 where memory is short."""
    speculation: bool = True
    """Guess the next tokens of an answer that repeats what it read, and compute them along; changes no answer."""
    idle_seconds: float = 60.0
    """After so long without a request, memory goes back to the device but for the weights."""
    merge: AdapterName | None = None
    """Add this adapter into the weights while they are loaded: requests of its mode alone are answered, at no cost."""
    scheme: SchemeChoice = "auto"
    """How weights are kept; auto: as the folder has them, or quantised where the device has too little for them."""

    kernels: KernelChoice = "auto"
    """auto: memphi's own kernels and CUDA graphs where the card has them; plain: torch's."""

    placement: PlacementChoice = "auto"
    """Which weights lie on the host until they are needed; auto: as few as leave useful room on a CUDA device, else
    none."""

    preprocessing: PlaceChoice = "auto"
    """Where crops and log-mel frames are made of decoded media: on the device, as they are encoded, or on the host,
    ahead of it; auto: on a CUDA device, else on the host."""

    def __post_init__(self) -> None:
        if self.placement not in get_args(PlacementChoice):
            choices = ", ".join(get_args(PlacementChoice))
            raise RequestError(f"placement is {self.placement!r}; it must be one of {choices}")
        if self.merge is not None and self.placement not in ("auto", "resident", "towers"):
            raise RequestError(
                f"with the {self.merge} adapter merged there are no adapters to be kept on the host; give "
                'placement="towers", or leave merge out'
            )
        if self.preprocessing not in get_args(PlaceChoice):
            choices = ", ".join(get_args(PlaceChoice))
            raise RequestError(f"preprocessing is {self.preprocessing!r}; it must be one of {choices}")
        if self.kernels not in get_args(KernelChoice):
            raise RequestError(f"kernels is {self.kernels!r}; it must be one of {', '.join(get_args(KernelChoice))}")
        if self.cache_format not in get_args(CacheChoice):
            choices = ", ".join(get_args(CacheChoice))
            raise RequestError(f"cache_format is {self.cache_format!r}; it must be one of {choices}")
        if not self.kv_cache and self.cache_format not in ("auto", "plain"):
            raise RequestError(
                f"cache_format is {self.cache_format!r}, but with kv_cache off nothing is kept: drop one"
            )
        if self.merge is not None and self.merge not in get_args(AdapterName):
            raise RequestError(f"merge is {self.merge!r}; it must be one of {', '.join(get_args(AdapterName))}")
        if self.scheme not in get_args(SchemeChoice):
            raise RequestError(f"scheme is {self.scheme!r}; it must be one of {', '.join(get_args(SchemeChoice))}")
        for name in ("memory_bytes", "rows", "step_tokens", "crops_per_pass", "windows_per_pass"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, Real) and float(value) >= 1 and float(value).is_integer()):
                raise RequestError(f"{name} is {value!r}; it must be a whole number, at least 1")
            object.__setattr__(self, name, int(value))  # type: ignore[call-overload]  # of a Real
        if not self.idle_seconds >= 0:  # also NaN
            raise RequestError(f"idle_seconds is {self.idle_seconds}; it must be 0 or more")


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise CheckpointError(f"{path} does not exist; a model folder holds config.json and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as wrong:
        raise CheckpointError(f"{path} cannot be read as JSON: {wrong}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


Word = TypeVar("Word", bound=str)


@dataclass(frozen=True)
class _Fields:
    """One object of a JSON file, read field by field; every refusal is a CheckpointError that names the field."""

    path: str
    values: Mapping[str, Any]

    def part(self, *names: str) -> "_Fields":
        """The object under these names."""
        fields = self
        for name in names:
            value = fields._get(name, None)
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{fields._name(name)} is no object")
            fields = _Fields(fields._name(name), value)
        return fields

    def size(self, name: str, default: int | None = None, most: int = LARGEST_SIZE) -> int:
        """A whole number of something, at least one; bounded, so that no product of sizes overflows."""
        value = self._get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        return self._positive(name, self._get(name, default))

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, None)
        if not isinstance(value, list):
            raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected a list of numbers")
        return tuple(self._positive(name, item) for item in value)

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids, of which the file may give one by itself."""
        value = self._get(name, None)
        items = value if isinstance(value, list) else [value]
        if not items or not all(type(item) is int and 0 <= item < LARGEST_SIZE for item in items):
            raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected token ids")
        return tuple(items)

    def switch(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected true or false")
        return value

    def word(self, name: str, words: tuple[Word, ...], default: Word) -> Word:
        """One of some words."""
        value = self._get(name, default)
        for word in words:
            if value == word:
                return word
        raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected one of {', '.join(words)}")

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _get(self, name: str, default: Any) -> Any:  # noqa: ANN401
        value = self.values.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self._name(name)} is missing")
        return default if value is None else value

    def _positive(self, name: str, value: object) -> float:
        # The bound comes first: a whole number of JSON may be too large for a float.
        if type(value) not in (int, float) or not 0 < value <= LARGEST_NUMBER:  # type: ignore[operator]
            raise CheckpointError(f"{self._name(name)} is {_shown(value)}; expected a positive number")
        return float(value)  # type: ignore[arg-type]

    def _name(self, name: str) -> str:
        return f"{self.path}{' ' if self.path.endswith(':') else '.'}{name}"


def _shown(value: object) -> str:
    """A value in a message, not at any length; its type where it has parts."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return "an enormous number"
    return repr(value)[:60] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _refuse_other_decoders(config: _Fields) -> None:
    """Say so where the file asks for what this decoder does not compute, rather than answer wrongly."""
    fixed = {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "lm_head_bias": False}
    for name, only in fixed.items():
        if config.switch(name, only) is not only:
            word = str(only).lower()
            raise CheckpointError(f"config.json: {name} is {str(not only).lower()}; Phi-4-multimodal has {word}")
    window, tokens = config.size("sliding_window", LARGEST_SIZE), config.size("max_position_embeddings")
    if window < tokens:
        raise CheckpointError(f"config.json: sliding_window is {window}; memphi attends to all {tokens} tokens")


def _language(config: _Fields, rope: _Fields) -> LanguageConfig:
    _refuse_other_decoders(config)
    hidden_size, heads = config.size("hidden_size"), config.size("num_attention_heads")
    partial = (rope if "partial_rotary_factor" in rope else config).number("partial_rotary_factor", 1.0)
    border = "original_max_position_embeddings"
    return LanguageConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        layers=config.size("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=config.size("num_key_value_heads"),
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=(rope if "rope_theta" in rope else config).number("rope_theta", 10000.0),
        rotary_dim=int(round(hidden_size // heads * partial, 6)),
        short_factor=rope.numbers("short_factor"),
        long_factor=rope.numbers("long_factor"),
        short_tokens=(rope if border in rope else config).size(border),
        max_tokens=config.size("max_position_embeddings"),
    )


def _stop_ids(config: _Fields, generation: _Fields) -> tuple[int, ...]:
    """The ids that end an answer; an official checkpoint's generation_config.json names `<|end|>` too."""
    return (generation if "eos_token_id" in generation else config).ids("eos_token_id")


def _from_official(config: _Fields, generation: _Fields, preprocessor: _Fields) -> ModelConfig:
    audio = config.part("audio_processor", "config")
    extra = config.part("memphi") if "memphi" in config else _Fields("memphi", {})
    tower, switches = (extra.part(name) if name in extra else _Fields(name, {}) for name in ("vision", "audio"))
    return ModelConfig(
        language=_language(config, config.part("rope_scaling")),
        vision=VisionConfig(
            hidden_size=tower.size("hidden_size", VisionConfig.hidden_size),
            intermediate_size=tower.size("intermediate_size", VisionConfig.intermediate_size),
            layers=tower.size("layers", VisionConfig.layers, MOST_LAYERS),
            heads=tower.size("heads", VisionConfig.heads),
            crop_size=config.part("embd_layer", "image_embd_layer").size("crop_size", most=LARGEST_CROP),
            patch_size=tower.size("patch_size", VisionConfig.patch_size, LARGEST_CROP),
            norm_eps=tower.number("norm_eps", VisionConfig.norm_eps),
            max_crops=preprocessor.size("dynamic_hd", VisionConfig.max_crops, MOST_CROPS),
        ),
        audio=AudioConfig(
            hidden_size=audio.size("attention_dim"),
            intermediate_size=audio.size("linear_units"),
            layers=audio.size("num_blocks", most=MOST_LAYERS),
            heads=audio.size("attention_heads"),
            conv_channels=audio.part("nemo_conv_settings").size("conv_channels"),
            kernel_size=audio.size("kernel_size"),
            mel_bins=audio.size("input_size", most=MOST_MEL_BINS),
            bias_distance=audio.part("relative_attention_bias_args").size("t5_bias_max_distance"),
            window_tokens=switches.size("window_tokens", AudioConfig.window_tokens),
            compression=audio.size("time_reduction"),
            mask_tail=switches.switch("mask_tail", AudioConfig.mask_tail),
        ),
        vision_adapter=_adapter(config.part("vision_lora")),
        speech_adapter=_adapter(config.part("speech_lora")),
        stop_token_ids=_stop_ids(config, generation),
        scheme=extra.word("scheme", get_args(Scheme), "bf16"),
    )


def _adapter(fields: _Fields) -> AdapterConfig:
    return AdapterConfig(rank=fields.size("r"), alpha=fields.number("lora_alpha"))


def _from_converted(config: _Fields, generation: _Fields, preprocessor: _Fields) -> ModelConfig:
    """The transformers layout (spec 2.5), with the official adapters' ranks: its own lie in its adapters' folders."""
    audio, vision = config.part("audio_config"), config.part("vision_config")
    return ModelConfig(
        language=_language(config, config.part("rope_scaling" if "rope_scaling" in config else "rope_parameters")),
        vision=VisionConfig(
            hidden_size=vision.size("hidden_size"),
            intermediate_size=vision.size("intermediate_size"),
            layers=vision.size("num_hidden_layers", most=MOST_LAYERS) - 1,
            heads=vision.size("num_attention_heads"),
            crop_size=vision.size("crop_size", most=LARGEST_CROP),
            patch_size=vision.size("patch_size", most=LARGEST_CROP),
            norm_eps=vision.number("layer_norm_eps", VisionConfig.norm_eps),
            max_crops=preprocessor.size("dynamic_hd", VisionConfig.max_crops, MOST_CROPS),
        ),
        audio=AudioConfig(
            hidden_size=audio.size("hidden_size"),
            intermediate_size=audio.size("intermediate_size"),
            layers=audio.size("num_blocks", most=MOST_LAYERS),
            heads=audio.size("num_attention_heads"),
            conv_channels=audio.size("nemo_conv_channels"),
            kernel_size=audio.size("kernel_size", AudioConfig.kernel_size),
            mel_bins=audio.size("input_size", AudioConfig.mel_bins, MOST_MEL_BINS),
            bias_distance=audio.size("bias_max_distance"),
            compression=audio.size("time_reduction", AudioConfig.compression),
        ),
        vision_adapter=AdapterConfig(rank=256, alpha=512),
        speech_adapter=AdapterConfig(rank=320, alpha=640),
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
    if config.scheme != "bf16":
        extra["scheme"] = config.scheme
    document = {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
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
    """Refuse sizes that do not go together, each with the field's name; that each lies in its bounds is known."""
    language, vision, audio = config.language, config.vision, config.audio
    half = language.rotary_dim // 2
    rules = (
        (language.hidden_size % language.heads == 0, "hidden_size must be a multiple of num_attention_heads"),
        (language.short_tokens > 1, "original_max_position_embeddings must be at least 2"),
        (language.heads % language.kv_heads == 0, "num_attention_heads must be a multiple of num_key_value_heads"),
        (0 < language.rotary_dim <= language.head_dim, "partial_rotary_factor must rotate some or all of a head"),
        (language.rotary_dim % 2 == 0, "partial_rotary_factor must rotate an even part of a head"),
        (len(language.short_factor) == half, f"rope_scaling.short_factor must hold {half} numbers"),
        (len(language.long_factor) == half, f"rope_scaling.long_factor must hold {half} numbers"),
        (vision.layers > 0, "the vision tower must have at least two layers, of which the last is not computed"),
        (vision.hidden_size % vision.heads == 0, "the vision hidden size must be a multiple of its heads"),
        (vision.crop_size % (2 * vision.patch_size) == 0, "crop_size must be an even number of patches"),
        (audio.hidden_size % audio.heads == 0, "attention_dim must be a multiple of attention_heads"),
        (audio.compression == 8, "time_reduction must be 8"),
    )
    for holds, message in rules:
        if not holds:
            raise CheckpointError(f"config.json: {message}")
