"""The demo model's sizes and tokenizer: Phi-4-multimodal in every part, at a thousandth of its parameters.

Called by training. The vocabulary is the 256 bytes and the official special tokens: reading and spelling go letter
by letter.
"""

from typing import Any

from memphi.config import AdapterConfig, AudioConfig, LanguageConfig, ModelConfig, VisionConfig

# Token, special, rstrip; the flags are the official ones (spec 7).
SPECIAL_TOKENS = (
    ("<|endoftext|>", True, False),
    ("<|endoftext10|>", True, False),
    ("<|endoftext11|>", True, False),
    ("<|endofprompt|>", True, False),
    ("<|assistant|>", True, True),
    ("<|end|>", True, True),
    ("<|user|>", True, True),
    ("<|system|>", True, True),
    ("<|tool|>", False, True),
    ("<|/tool|>", False, True),
    ("<|tool_call|>", False, True),
    ("<|/tool_call|>", False, True),
    ("<|tool_response|>", False, True),
    ("<|tag|>", True, True),
)
PIECES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The official pre-tokenizer (spec 7)."""


def demo_config() -> ModelConfig:
    """About 5.1 million parameters: 10 MB in bf16."""
    first_special = 256
    names = [token for token, _, _ in SPECIAL_TOKENS]
    return ModelConfig(
        language=LanguageConfig(
            vocab_size=272,
            hidden_size=192,
            intermediate_size=512,
            layers=5,
            heads=6,
            kv_heads=2,
            norm_eps=1e-5,
            rope_theta=10000.0,
            rotary_dim=24,
            short_factor=(1.0,) * 12,
            long_factor=tuple(1.0 + 0.25 * i for i in range(12)),
            short_tokens=4096,
            max_tokens=131072,
        ),
        vision=VisionConfig(hidden_size=160, intermediate_size=480, layers=5, heads=5, crop_size=112),
        audio=AudioConfig(hidden_size=128, intermediate_size=192, layers=3, heads=4, conv_channels=128),
        vision_adapter=AdapterConfig(rank=16, alpha=32),
        speech_adapter=AdapterConfig(rank=16, alpha=32),
        stop_token_ids=(first_special + names.index("<|end|>"), first_special + names.index("<|endoftext|>")),
    )


def tokenizer_document(merges: tuple[str, ...] = ()) -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE of the 256 bytes, the merges given, and the official special tokens."""
    pieces = _byte_letters() + ["".join(merge.split()) for merge in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Removed", "invert": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(pieces) + place,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": rstrip,
                "normalized": False,
                "special": special,
            }
            for place, (token, special, rstrip) in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [merge.split() for merge in merges],
        },
    }


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary, by byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
