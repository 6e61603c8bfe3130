"""The table of tensor names: ours, the official checkpoint's, and the converted transformers layout's (spec 2).

Pure strings: knows no shapes and reads no files. The loader asks for our name of a stored tensor, the writer for the
official name of ours.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

LAYERS = "language.layers"
"""What names of the decoder's layers begin with."""
MARKERS = {"#": r"(0|[1-9][0-9]*)", "*": r"(weight|bias)", "@": r"(vision|speech)"}
"""What the table's markers stand for: a layer's number, a kind of parameter, an adapter."""


@dataclass(frozen=True)
class Section:
    """Rows below one prefix each: our name, the official one, and the converted one where it differs."""

    ours: str
    stored: str
    rows: tuple[tuple[str, ...], ...]


TABLE = (
    Section(
        "language.",
        "model.",
        (
            ("embedding.*", "embed_tokens.*"),
            ("layers.#.attention_norm.*", "layers.#.input_layernorm.*"),
            (
                "layers.#.attention.qkv.weight",
                "layers.#.self_attn.qkv_proj.base_layer.weight",
                "layers.#.self_attn.qkv_proj.weight",
            ),
            (
                "layers.#.attention.out.weight",
                "layers.#.self_attn.o_proj.base_layer.weight",
                "layers.#.self_attn.o_proj.weight",
            ),
            ("layers.#.mlp_norm.*", "layers.#.post_attention_layernorm.*"),
            (
                "layers.#.mlp.gate_up.weight",
                "layers.#.mlp.gate_up_proj.base_layer.weight",
                "layers.#.mlp.gate_up_proj.weight",
            ),
            ("layers.#.mlp.down.weight", "layers.#.mlp.down_proj.base_layer.weight", "layers.#.mlp.down_proj.weight"),
            ("norm.*", "norm.*"),
        ),
    ),
    Section(
        "vision.",
        "model.embed_tokens_extend.image_embed.img_processor.",
        (
            ("patch_embedding.*", "embeddings.patch_embedding.*"),
            ("position_embedding.*", "embeddings.position_embedding.*"),
            ("layers.#.attention_norm.*", "encoder.layers.#.layer_norm1.*"),
            ("layers.#.attention.query.*", "encoder.layers.#.self_attn.q_proj.*"),
            ("layers.#.attention.key.*", "encoder.layers.#.self_attn.k_proj.*"),
            ("layers.#.attention.value.*", "encoder.layers.#.self_attn.v_proj.*"),
            ("layers.#.attention.out.*", "encoder.layers.#.self_attn.out_proj.*"),
            ("layers.#.mlp_norm.*", "encoder.layers.#.layer_norm2.*"),
            ("layers.#.mlp.up.*", "encoder.layers.#.mlp.fc1.*"),
            ("layers.#.mlp.down.*", "encoder.layers.#.mlp.fc2.*"),
        ),
    ),
    Section(
        "image_projector.",
        "model.embed_tokens_extend.image_embed.",
        (
            ("view_separator", "glb_GN", "global_img_feature_extensor"),
            ("row_separator", "sub_GN", "sub_img_feature_extensor"),
            ("up.*", "img_projection.0.*", "img_projection_up.*"),
            ("down.*", "img_projection.2.*", "img_projection_down.*"),
        ),
    ),
    Section(
        "audio.",
        "model.embed_tokens_extend.audio_embed.encoder.",
        (
            ("mean", "encoder_embedding.global_mean"),
            ("inverse_deviation", "encoder_embedding.global_invstd"),
            ("subsampling.first.*", "embed.conv.0.*"),
            ("subsampling.depthwise.0.*", "embed.conv.2.*"),
            ("subsampling.pointwise.0.*", "embed.conv.3.*"),
            ("subsampling.depthwise.1.*", "embed.conv.5.*"),
            ("subsampling.pointwise.1.*", "embed.conv.6.*"),
            ("subsampling.out.*", "embed.out.*"),
            ("relative_bias.*", "relative_attention_bias_layer.bias_values.*"),
        ),
    ),
    Section(
        "audio.layers.#.",
        "model.embed_tokens_extend.audio_embed.encoder.encoders.#.",
        (
            ("feed_forward_in.norm.*", "feed_forward_in.layer_norm.*"),
            ("feed_forward_in.up.*", "feed_forward_in.net.0.linear.*", "feed_forward_in.gate_up_proj.*"),
            ("feed_forward_in.down.*", "feed_forward_in.net.2.*", "feed_forward_in.down_proj.*"),
            ("attention_norm.*", "layer_norm_att.*"),
            ("attention.query.*", "self_attn.linear_q.*", "self_attn.q_proj.*"),
            ("attention.key.*", "self_attn.linear_k.*", "self_attn.k_proj.*"),
            ("attention.value.*", "self_attn.linear_v.*", "self_attn.v_proj.*"),
            ("attention.out.*", "self_attn.linear_out.*", "self_attn.o_proj.*"),
            ("convolution.norm.*", "conv.layer_norm.*"),
            ("convolution.glu.*", "conv.glu.ext_pw_conv_1d.*"),
            ("convolution.value_bias", "conv.glu.b1"),
            ("convolution.gate_bias", "conv.glu.b2"),
            ("convolution.depthwise.*", "conv.dw_sep_conv_1d.dw_conv.*"),
            ("convolution.pointwise.*", "conv.dw_sep_conv_1d.pw_conv.*"),
            ("convolution.out.*", "conv.ext_pw_conv_1d.*"),
            ("feed_forward_out.norm.*", "feed_forward_out.layer_norm.*"),
            ("feed_forward_out.up.*", "feed_forward_out.net.0.linear.*", "feed_forward_out.gate_up_proj.*"),
            ("feed_forward_out.down.*", "feed_forward_out.net.2.*", "feed_forward_out.down_proj.*"),
            ("norm.*", "layer_norm.*"),
        ),
    ),
    Section(
        "audio_projectors.",
        "model.embed_tokens_extend.audio_embed.",
        (
            ("speech.up.*", "audio_projection.speech.0.*", "up_proj_for_speech.*"),
            ("speech.down.*", "audio_projection.speech.2.*", "down_proj_for_speech.*"),
            ("vision.up.*", "audio_projection.vision.0.*", "up_proj_for_vision_speech.*"),
            ("vision.down.*", "audio_projection.vision.2.*", "down_proj_for_vision_speech.*"),
        ),
    ),
)

ADAPTER_TABLE = Section(
    "language.layers.#.",
    "model.layers.#.",
    (
        ("attention.qkv.adapters.@.a", "self_attn.qkv_proj.lora_A.@.weight"),
        ("attention.qkv.adapters.@.b", "self_attn.qkv_proj.lora_B.@.weight"),
        ("attention.out.adapters.@.a", "self_attn.o_proj.lora_A.@.weight"),
        ("attention.out.adapters.@.b", "self_attn.o_proj.lora_B.@.weight"),
        ("mlp.gate_up.adapters.@.a", "mlp.gate_up_proj.lora_A.@.weight"),
        ("mlp.gate_up.adapters.@.b", "mlp.gate_up_proj.lora_B.@.weight"),
        ("mlp.down.adapters.@.a", "mlp.down_proj.lora_A.@.weight"),
        ("mlp.down.adapters.@.b", "mlp.down_proj.lora_B.@.weight"),
    ),
)
"""Beside the weights in the official layout; in folders of their own in the converted one (see `from_peft`)."""

_TOWER = "model.embed_tokens_extend.image_embed.img_processor."
PARTS = ("codes", "scale", "affine")
"""What a quantised weight is stored as: its name, and after a dot one of these."""
UNUSED = (
    f"{_TOWER}post_layernorm.*",
    f"{_TOWER}head.probe",
    f"{_TOWER}head.attention.in_proj_*",
    f"{_TOWER}head.attention.out_proj.*",
    f"{_TOWER}head.layernorm.*",
    f"{_TOWER}head.mlp.fc1.*",
    f"{_TOWER}head.mlp.fc2.*",
    "lm_head.weight",
)
"""Stored but never computed: the tower's norm and head, and (converted only) a second copy of the tied embedding.

The tower's last layer is the third such part; only the config says which number it has.
"""


def official_name(ours: str) -> str:
    """The official checkpoint's name of one of our tensors; KeyError if it is none of ours.

    A part of a quantised weight, which that has not, is called like the weight and the part.
    """
    weight, part = _split(ours)
    return _translate(weight, _columns()[0]) + part


def from_official(name: str, vision_layers: int) -> str | None:
    """Our name of an official tensor, None if it is never computed; KeyError if the table does not know it.

    vision_layers counts the tower's computed layers: those from that number on are stored only.
    """
    weight, part = _split(name)
    ours = _from_stored(weight, _columns()[1], vision_layers)
    return None if ours is None else ours + part


def from_converted(name: str, vision_layers: int) -> str | None:
    """As `from_official`, for the shards of the converted transformers layout (spec 2.5)."""
    return _from_stored(name, _columns()[2], vision_layers)


def from_peft(name: str, adapter: str) -> str:
    """Our name of a tensor of an adapter's own PEFT file; KeyError if the table does not know it.

    The adapter's name may stand before `.weight`, as `default` too. No published file's names were seen (spec 1.2).
    """
    bare = re.sub(rf"\.(default|{adapter})\.weight$", ".weight", name.removeprefix("base_model.model."))
    return _translate(bare.removesuffix(".weight") + f".{adapter}.weight", _columns()[1])


def adapted(names: Iterable[str], adapter: str) -> Iterator[tuple[str, str, str]]:
    """Our names of every weight that an adapter adapts, of its A and of its B."""
    end = f"adapters.{adapter}.a"
    for name in names:
        if name.endswith(end):
            base = name.removesuffix(end)
            yield f"{base}weight", name, f"{base}adapters.{adapter}.b"


def _split(name: str) -> tuple[str, str]:
    """A name without the part of a quantised weight at its end, and that part with its dot, if there is one."""
    weight, dot, part = name.rpartition(".")
    return (weight, dot + part) if part in PARTS else (name, "")


def _from_stored(name: str, column: tuple["_Rule", ...], vision_layers: int) -> str | None:
    if any(pattern.fullmatch(name) for pattern in _unused()):
        return None
    ours = _translate(name, column)
    layer = re.match(r"vision\.layers\.(\d+)\.", ours)
    return None if layer and int(layer[1]) >= vision_layers else ours


@dataclass(frozen=True)
class _Rule:
    """One row read in one direction."""

    pattern: re.Pattern[str]
    markers: str
    """The markers in the order in which the pattern captures them."""
    target: str


def _translate(name: str, column: tuple[_Rule, ...]) -> str:
    for rule in column:
        if match := rule.pattern.fullmatch(name):
            target = rule.target
            for marker, value in zip(rule.markers, match.groups(), strict=True):
                target = target.replace(marker, value)
            return target
    raise KeyError(name)


@cache
def _columns() -> tuple[tuple[_Rule, ...], ...]:
    """The table read from ours to official, from official to ours, and from converted to ours."""
    weights = [row for section in TABLE for row in _rows(section)]
    official = [(row[0], row[1]) for row in (*weights, *_rows(ADAPTER_TABLE))]
    return (
        tuple(_rule(ours, stored) for ours, stored in official),
        tuple(_rule(stored, ours) for ours, stored in official),
        tuple(_rule(row[-1], row[0]) for row in weights),
    )


def _rows(section: Section) -> Iterator[tuple[str, ...]]:
    for ours, *stored in section.rows:
        yield (section.ours + ours, *(section.stored + name for name in stored))


def _rule(source: str, target: str) -> _Rule:
    return _Rule(_pattern(source), "".join(c for c in source if c in MARKERS), target)


@cache
def _unused() -> tuple[re.Pattern[str], ...]:
    return tuple(_pattern(name) for name in UNUSED)


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile("".join(MARKERS.get(character, re.escape(character)) for character in source))
