"""Sizes of the decoder that several prices are made of."""

from collections.abc import Iterable

from memphi.config import LanguageConfig, ModelConfig


def decoder_linears(language: LanguageConfig) -> tuple[tuple[int, int], ...]:
    """The four linears of a decoder layer: (in, out)."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return ((hidden, qkv_size(language)), (query_size(language), hidden), (hidden, 2 * inner), (inner, hidden))


def all_ranks(config: ModelConfig) -> int:
    return config.vision_adapter.rank + config.speech_adapter.rank


def rotary_bytes(language: LanguageConfig, dtype_bytes: int) -> int:
    return 2 * language.rotary_dim * dtype_bytes


def query_size(language: LanguageConfig) -> int:
    return language.heads * language.head_dim


def key_size(language: LanguageConfig) -> int:
    return language.kv_heads * language.head_dim


def qkv_size(language: LanguageConfig) -> int:
    return query_size(language) + 2 * key_size(language)


def largest_of(sizes: Iterable[int]) -> int:
    return max(sizes, default=0)
