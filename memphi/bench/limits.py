"""The least time that work takes on a card: bytes over its bandwidth or operations over its rate, phase by phase.

Arithmetic on a model's sizes and requests' footprints; what the card reaches is measured (`card`). A phase takes the
longer of the two, and the phases come one after another. What has to be read is read once a phase, in decoding once a
step; activations count nothing. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from memphi.bench.workloads import Timing
from memphi.config import AudioConfig, CacheFormat, ModelConfig, VisionConfig
from memphi.memory import costs
from memphi.request import Footprint


@dataclass(frozen=True)
class Card:
    """What a device reaches in a number format."""

    name: str
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Task:
    """One request's size."""

    footprint: Footprint
    answer_tokens: int
    adapter: str | None
    """What is computed beside the weights; None too where the weights hold it already."""


@dataclass(frozen=True)
class Phase:
    """What a stretch of work must read, and compute."""

    name: str
    bytes: int
    operations: int

    def seconds(self, card: Card) -> float:
        return max(self.bytes / card.bytes_per_second, self.operations / card.operations_per_second)


def phases(
    config: ModelConfig, tasks: Sequence[Task], dtype_bytes: int, cache_format: CacheFormat = "plain"
) -> tuple[Phase, Phase, Phase]:
    """Encoding, prefill with the first tokens, and decoding, of requests that run at once."""
    return (
        _encode(config, tasks, dtype_bytes),
        _prefill(config, tasks, dtype_bytes, cache_format),
        _decode(config, tasks, dtype_bytes, cache_format),
    )


def least(parts: tuple[Phase, Phase, Phase], card: Card) -> Timing:
    """The time that phases take at least."""
    first = parts[0].seconds(card) + parts[1].seconds(card)
    return Timing(first, first + parts[2].seconds(card))


def _encode(config: ModelConfig, tasks: Sequence[Task], dtype_bytes: int) -> Phase:
    groups, operations = set[str](), 0
    for footprint in (task.footprint for task in tasks):
        if footprint.images:
            groups |= {"vision tower", "projectors"}
            operations += footprint.crops * crop_operations(config.vision)
            operations += footprint.image_tokens * _projector_operations(config, config.vision.hidden_size)
        if footprint.clips:
            groups |= {"audio encoder", "projectors"}
            operations += sum(clip_operations(config.audio, clip.tokens) for clip in footprint.clips)
            operations += footprint.audio_tokens * _projector_operations(config, config.audio.hidden_size)
    return Phase("encode", sum(_bytes(config, group, dtype_bytes) for group in groups), operations)


def _prefill(config: ModelConfig, tasks: Sequence[Task], dtype_bytes: int, cache_format: CacheFormat) -> Phase:
    """All prompts at once; only their last tokens are scored. Their keys and values are written."""
    operations = 2 * _numbers(config, "embedding") * len(tasks)
    for task in tasks:
        tokens = task.footprint.prompt_tokens
        operations += tokens * _token_operations(config, task.adapter)
        operations += _attention_operations(config, tokens * (tokens + 1) // 2)
    adapters = {task.adapter for task in tasks}
    written = sum(task.footprint.prompt_tokens for task in tasks) * _token_bytes(config, dtype_bytes, cache_format)
    return Phase("prefill", _step_bytes(config, adapters, dtype_bytes) + written, operations)


def _decode(config: ModelConfig, tasks: Sequence[Task], dtype_bytes: int, cache_format: CacheFormat) -> Phase:
    """One step a token after the first: every weight in use is read, and the keys and values of every row."""
    n_bytes = operations = 0
    for adapter in {task.adapter for task in tasks} - {None}:
        steps = max(task.answer_tokens - 1 for task in tasks if task.adapter == adapter)
        n_bytes += steps * _bytes(config, f"{adapter} adapter", dtype_bytes)
    n_bytes += max(task.answer_tokens - 1 for task in tasks) * _step_bytes(config, set(), dtype_bytes)
    for task in tasks:
        steps, prompt = task.answer_tokens - 1, task.footprint.prompt_tokens
        keys = steps * prompt + steps * (steps + 1) // 2
        n_bytes += keys * _token_bytes(config, dtype_bytes, cache_format)
        each = _token_operations(config, task.adapter) + 2 * _numbers(config, "embedding")
        operations += steps * each + _attention_operations(config, keys)
    return Phase("decode", n_bytes, operations)


def _numbers(config: ModelConfig, group: str) -> int:
    """How many numbers a group of weights has."""
    return sum(size * count for size, count in costs.weight_tensors(config)[group])


def _bytes(config: ModelConfig, group: str, dtype_bytes: int) -> int:
    """What a group of weights takes, as the config's scheme stores it."""
    return sum(size * count for size, count in costs.weight_bytes(config, dtype_bytes)[group])


def _step_bytes(config: ModelConfig, adapters: set[str | None], dtype_bytes: int) -> int:
    """The decoder, the output head, which is the embedding, and adapters."""
    groups = ["language", "embedding", *(f"{adapter} adapter" for adapter in adapters if adapter)]
    return sum(_bytes(config, group, dtype_bytes) for group in groups)


def _token_bytes(config: ModelConfig, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """One token's keys and values in all layers."""
    return costs.page(config, dtype_bytes, 1, cache_format).bytes


def _token_operations(config: ModelConfig, adapter: str | None) -> int:
    """A multiplication and an addition for every number of the decoder's layers, and of the adapter's."""
    numbers = _numbers(config, "language") + (_numbers(config, f"{adapter} adapter") if adapter else 0)
    return 2 * numbers


def _attention_operations(config: ModelConfig, pairs: int) -> int:
    """Scores and sums over so many pairs of a query and a key, in all layers."""
    language = config.language
    return 4 * language.layers * language.heads * language.head_dim * pairs


def crop_operations(vision: VisionConfig) -> int:
    """The vision tower over one crop, padding included."""
    size, patches = vision.hidden_size, vision.patches**2
    layer = 2 * (4 * size**2 + 2 * size * vision.intermediate_size) + 4 * size * patches
    return patches * (2 * 3 * vision.patch_size**2 * size + vision.layers * layer)


def clip_operations(audio: AudioConfig, tokens: int) -> int:
    """The audio encoder over a clip of so many tokens, each of which sees its own window."""
    size, channels, half = audio.hidden_size, audio.conv_channels, -(-audio.mel_bins // 2)
    # Of the first convolution's 4 x half outputs a token, the two strides keep a quarter each.
    first = 2 * 9 * channels * 4 * half
    second = 2 * (9 * channels + channels**2) * half
    third = second // 4
    out = 2 * channels * -(-audio.mel_bins // 8) * size
    feed_forwards = 2 * 3 * size * audio.intermediate_size
    numbers = feed_forwards + (4 + 4) * size**2 + audio.kernel_size * size
    layer = 2 * numbers + 4 * size * min(tokens, audio.window_tokens)
    return tokens * (first + second + third + out + audio.layers * layer)


def _projector_operations(config: ModelConfig, size: int) -> int:
    """One token of a tower's features to the decoder's embedding."""
    return 2 * (size + config.language.hidden_size) * config.language.hidden_size
