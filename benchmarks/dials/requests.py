"""A seeded mix of requests: the extremes, then all modes in turn, of any size."""

import math
from dataclasses import dataclass

import numpy as np

from memphi.inputs.media import audio_media, image_media
from memphi.request import InputMode, Media, Request, SamplingParams

NEW_TOKENS = (16, 64)
CROSSING_WORDS = 4070
"""A text about so long goes over to the long rope factors while it is answered."""
WORDS = ("time", "water", "house", "light", "three", "people", "under", "green", "letter", "music", "river", "number")


@dataclass(frozen=True)
class Sizes:
    """The largest of everything that a request may hold."""

    words: int = 20_000
    images: int = 12
    side: int = 3508
    """The longer side of a picture: A4 at 300 dpi."""
    seconds: float = 600.0


SMALL = Sizes(40, 2, 300, 2.0)
"""For trying the benchmark itself."""


def make_request(index: int, seed: int, sizes: Sizes) -> Request:
    """Request number `index` of a mix: the first five are the extremes, the others of all modes in turn, any size."""
    random = np.random.default_rng((seed, index))
    words, images, seconds = _extreme(index, sizes) or _random_sizes(index, random, sizes)
    sides = [sizes.side if index < 5 else _log_uniform(random, sizes.side // 20, sizes.side) for _ in range(images)]
    media = [_picture(random, side, f"picture {i}") for i, side in enumerate(sides)]
    media += [make_sound(random, seconds)] if seconds else []
    most = NEW_TOKENS[1] if index < 5 else int(random.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1))
    return Request.ask(_text(random, words), media, sampling=SamplingParams(max_tokens=most, ignore_eos=True))


def _extreme(index: int, sizes: Sizes) -> tuple[int, int, float] | None:
    """(words, images, seconds of sound) of the longest text, the most pictures, the longest sound, all, and a text
    that crosses over to the long factors."""
    extremes = (
        (sizes.words, 0, 0.0),
        (8, sizes.images, 0.0),
        (8, 0, sizes.seconds),
        (sizes.words // 10, max(sizes.images // 4, 1), sizes.seconds / 5),
        (min(CROSSING_WORDS, sizes.words), 0, 0.0),
    )
    return extremes[index] if index < len(extremes) else None


def _random_sizes(index: int, random: np.random.Generator, sizes: Sizes) -> tuple[int, int, float]:
    mode = InputMode(index % 4)
    words = _log_uniform(random, 8, sizes.words if mode is InputMode.TEXT else max(sizes.words // 10, 8))
    images = _log_uniform(random, 1, sizes.images) if mode in (InputMode.VISION, InputMode.VISION_SPEECH) else 0
    tenths = _log_uniform(random, 5, int(10 * sizes.seconds))
    return words, images, tenths / 10 if mode.value >= InputMode.SPEECH.value else 0.0


def _log_uniform(random: np.random.Generator, low: int, high: int) -> int:
    return round(math.exp(random.uniform(math.log(low), math.log(high))))


def _text(random: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), words))


def _picture(random: np.random.Generator, side: int, name: str) -> Media:
    """Rectangles on a page of A4's shape, upright or lying."""
    short = max(round(side / math.sqrt(2)), 1)
    height, width = (side, short) if random.integers(2) else (short, side)
    pixels = np.full((height, width, 3), random.integers(0, 256, 3), np.uint8)
    for _ in range(20):
        top, left = random.integers(0, height), random.integers(0, width)
        bottom, right = top + random.integers(1, height), left + random.integers(1, width)
        pixels[top:bottom, left:right] = random.integers(0, 256, 3)
    return image_media(pixels, name)


def make_sound(random: np.random.Generator, seconds: float) -> Media:
    return audio_media(0.1 * random.standard_normal(int(16000 * seconds), np.float32), 16000, "sound")
