"""Small checkpoints for tests: odd sizes, random weights from a seed, and a tokenizer made by code."""

import json
from pathlib import Path

import torch

from memphi.checkpoint.random import random_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import AdapterConfig, AudioConfig, LanguageConfig, ModelConfig, VisionConfig
from memphi.demo.shape import SPECIAL_TOKENS, tokenizer_document
from memphi.model.phi4mm import Phi4MM

MERGES = ("t h", "th e", "i n", "a n", "Ġ the", "Ġ a", "o r", "e r", "Ġ w", "Ġw or")
FIRST_SPECIAL = 256 + len(MERGES)
UNKNOWN_IDS = 4
"""Ids at the vocabulary's end that stand for no token, as in the official one (spec 7)."""
VOCAB_SIZE = FIRST_SPECIAL + len(SPECIAL_TOKENS) + UNKNOWN_IDS
STOP_TOKEN_IDS = tuple(FIRST_SPECIAL + place for place in (5, 0))  # <|end|>, <|endoftext|>


def tiny_config(
    hidden_size: int = 48,
    layers: int = 2,
    heads: int = 6,
    kv_heads: int = 2,
    intermediate_size: int = 72,
    short_tokens: int = 64,
    max_tokens: int = 256,
    vocab_size: int = VOCAB_SIZE,
) -> ModelConfig:
    """A model of some hundred thousand parameters, with all the official one's parts and none of its sizes.

    hidden_size / heads must be a multiple of 8. The towers, the adapters' ranks and scales and both rope regimes differ
    from each other, so that a mix-up shows.
    """
    rotary_dim = hidden_size // heads * 3 // 4
    half = rotary_dim // 2
    return ModelConfig(
        language=LanguageConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            norm_eps=1e-5,
            rope_theta=10000.0,
            rotary_dim=rotary_dim,
            short_factor=(1.0,) * half,
            long_factor=tuple(1.0 + i / 2 for i in range(half)),
            short_tokens=short_tokens,
            max_tokens=max_tokens,
        ),
        vision=VisionConfig(
            hidden_size=36, intermediate_size=52, layers=2, heads=3, crop_size=112, patch_size=14, max_crops=6
        ),
        audio=AudioConfig(
            hidden_size=40,
            intermediate_size=28,
            layers=2,
            heads=5,
            conv_channels=12,
            bias_distance=20,
            window_tokens=30,
        ),
        vision_adapter=AdapterConfig(rank=4, alpha=8.0),
        speech_adapter=AdapterConfig(rank=6, alpha=9.0),
        stop_token_ids=STOP_TOKEN_IDS,
    )


def variants() -> dict[str, ModelConfig]:
    """Shapes that differ in what code tends to take for granted."""
    return {
        "grouped": tiny_config(),
        "no groups": tiny_config(hidden_size=32, heads=4, kv_heads=4, intermediate_size=40),
        "one kv head": tiny_config(hidden_size=96, layers=3, heads=6, kv_heads=1, intermediate_size=56),
    }


def tiny_model(config: ModelConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Phi4MM:
    """A random model on the CPU."""
    return random_model(config or tiny_config(), "cpu", dtype, seed)


def tiny_checkpoint(
    folder: Path,
    config: ModelConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_bytes: int = 200_000,
) -> Path:
    """Write a random model in the official layout, in several shards, with a tokenizer; returns the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(tiny_model(config, dtype, seed), folder, shard_bytes=shard_bytes)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json: byte-level BPE with the 256 bytes, ten merges and the official special tokens."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document(MERGES)), encoding="utf-8")
