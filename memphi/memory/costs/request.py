"""One request: what it takes of the device while it runs, and of the host."""

from dataclasses import dataclass

from memphi.config import CacheFormat, ModelConfig, Place
from memphi.memory.costs.cached import media_embeddings, page, page_tokens
from memphi.memory.costs.cost import Cost
from memphi.memory.costs.encoders import SAMPLES_A_FRAME, WINDOW_SAMPLES
from memphi.memory.costs.sizes import largest_of
from memphi.request import Footprint

FIRST_ANSWER_TOKENS = 256
"""The first stretch of an answer, reserved together with its prompt; further ones, as long, when they are needed."""


@dataclass(frozen=True)
class RequestPrice:
    """What one request takes while it runs, besides its share of a step."""

    tokens: int
    """The prompt and as much of an answer as was asked to be priced."""
    pages: int
    media_tokens: int
    crops: int
    windows: int
    vision_passes: int
    """If it is alone."""
    audio_passes: int
    costs: tuple[Cost, ...]
    """Its pages, its media embeddings, and the host's memory for its attachments."""

    @property
    def device_bytes(self) -> int:
        """Pages and media embeddings."""
        return sum(cost.bytes for cost in self.costs[:2])

    @property
    def host_bytes(self) -> int:
        return self.costs[2].bytes


def price_request(
    footprint: Footprint,
    config: ModelConfig,
    answer_tokens: int = FIRST_ANSWER_TOKENS,
    crops_per_pass: int = 1,
    windows_per_pass: int = 1,
    dtype_bytes: int = 2,
    preprocessing: Place = "host",
    cache_format: CacheFormat = "plain",
) -> RequestPrice:
    """Price one request with so much of an answer; together they hold no more than the model's context."""
    tokens = min(footprint.prompt_tokens + answer_tokens, config.language.max_tokens)
    size = page_tokens(cache_format)
    pages = -(-tokens // size)
    media_tokens = footprint.image_tokens + footprint.audio_tokens
    windows = sum(-(-clip.tokens // config.audio.window_tokens) for clip in footprint.clips)
    page_bytes = page(config, dtype_bytes, size, cache_format).bytes
    return RequestPrice(
        tokens=tokens,
        pages=pages,
        media_tokens=media_tokens,
        crops=footprint.crops,
        windows=windows,
        vision_passes=-(-footprint.crops // crops_per_pass),
        audio_passes=-(-windows // windows_per_pass),
        costs=(
            Cost("keys and values", pages * page_bytes, f"{tokens} tokens on {pages} pages of {page_bytes} bytes"),
            media_embeddings(config, media_tokens, dtype_bytes),
            host_media(footprint, config, preprocessing),
        ),
    )


def host_media(footprint: Footprint, config: ModelConfig, preprocessing: Place) -> Cost:
    """The host's memory for decoded attachments: what is kept of all, and what one takes while it is decoded."""
    return _decoded_media(footprint) if preprocessing == "device" else _prepared_media(footprint, config)


def _decoded_media(footprint: Footprint) -> Cost:
    """Pixels and samples, of which the device makes the rest."""
    pixels = [3 * image.width * image.height for image in footprint.images]
    samples = [(clip.frames * SAMPLES_A_FRAME + WINDOW_SAMPLES) * 4 for clip in footprint.clips]
    return Cost(
        "host memory",
        sum(pixels) + sum(samples) + largest_of((*(2 * n for n in pixels), *samples)),
        "pixels x 3 bytes, samples at 16 kHz x 4 bytes, and while one attachment is decoded twice its pixels, or its "
        "samples again",
    )


def _prepared_media(footprint: Footprint, config: ModelConfig) -> Cost:
    """Crops and mel frames."""
    crop_numbers = 3 * config.vision.crop_size**2
    kept = footprint.crops * crop_numbers * 4 + sum(clip.frames for clip in footprint.clips) * config.audio.mel_bins * 4
    pictures = (2 * 3 * image.width * image.height + 2 * image.crops * crop_numbers for image in footprint.images)
    clips = (clip.frames * config.audio.mel_bins * 4 for clip in footprint.clips)
    return Cost(
        "host memory",
        kept + largest_of((*pictures, *clips)),
        f"{footprint.crops} crops x {crop_numbers} x 4 bytes, mel frames x {config.audio.mel_bins} x 4 bytes, and "
        "while one attachment is decoded twice its pixels and its crops in bytes, or its frames again",
    )
