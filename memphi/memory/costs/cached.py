"""What is kept of tokens and attachments: pages of keys and values, and media embeddings."""

from memphi.config import CacheFormat, LanguageConfig, ModelConfig
from memphi.memory.costs.cost import Cost
from memphi.memory.costs.sizes import key_size

PAGE_TOKENS = 16
"""In a page of 16 bits or more; of 8 bits it has twice as many, and so the same bytes: 2 MiB at full size, the unit in
which CUDA maps memory."""
SCALE_BYTES = 2
"""A code's scale, of which each token has one for every head of keys and of values."""


def page_tokens(cache_format: CacheFormat) -> int:
    """How many tokens a page has."""
    return PAGE_TOKENS if cache_format == "plain" else 2 * PAGE_TOKENS


def page(config: ModelConfig, dtype_bytes: int, tokens: int = PAGE_TOKENS, cache_format: CacheFormat = "plain") -> Cost:
    """Keys and values of all layers for one page of tokens."""
    language = config.language
    each = f"{language.head_dim} x {dtype_bytes} bytes"
    if cache_format != "plain":
        each = f"({language.head_dim} bytes and a scale of {SCALE_BYTES})"
    return Cost(
        "page",
        kept_bytes(language, tokens, dtype_bytes, cache_format),
        f"{tokens} tokens x {language.layers} layers x (key, value) x {language.kv_heads} heads x {each}",
    )


def kept_bytes(language: LanguageConfig, tokens: int, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """Keys and values of all layers, with the scales of those in 8 bits."""
    number_bytes = dtype_bytes if cache_format == "plain" else 1
    numbers = tokens * language.layers * 2 * key_size(language)
    return numbers * number_bytes + scale_bytes(language, tokens, cache_format)


def scale_bytes(language: LanguageConfig, tokens: int, cache_format: CacheFormat) -> int:
    """The scales of all layers' keys and values."""
    return 0 if cache_format == "plain" else tokens * language.layers * 2 * language.kv_heads * SCALE_BYTES


def media_embeddings(config: ModelConfig, tokens: int, dtype_bytes: int) -> Cost:
    """What the encoders made of pictures and sound, kept until its sequence ends and as long as there is room."""
    hidden = config.language.hidden_size
    return Cost("media embeddings", tokens * hidden * dtype_bytes, f"{tokens} tokens x {hidden} x {dtype_bytes} bytes")
