"""How long pictures and sound take from decoded pixels and samples to embeddings, part by part, beside their limits.

Crops and log-mel frames on the device and by one thread of the host; the vision tower over crops with and without
padding; the audio encoder's subsampling, conformer and whole. The memory of each pass is held against its price. Random
weights at the official sizes. Usage: python -m benchmarks.encoders --out FILE. Without a GPU all of it is tried at the
demo's sizes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.document import write_document
from memphi import official
from memphi.bench.card import wait_for
from memphi.bench.limits import clip_operations, crop_operations
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.random import random_model
from memphi.demo.shape import demo_config
from memphi.inputs.audio import decode_clip, prepare_clip
from memphi.inputs.image import decode_image, prepare_image
from memphi.inputs.media import audio_media, image_media
from memphi.memory import costs
from memphi.model.audio import Window, count_windows, make_window
from memphi.model.phi4mm import Phi4MM
from memphi.model.preprocess import make_crops, make_frames

PICTURES = {"1024x768": (1024, 768), "A4 at 300 dpi": (2480, 3508), "4000x3000": (4000, 3000)}
RATE = 16_000
WINDOWS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--crops", type=int, default=28, help="crops that are encoded at once")
    parser.add_argument("--seconds", type=float, default=600.0, help="of sound")
    parser.add_argument("--commit", help="which commit this is, if git cannot say")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    config = read_config(official.folder()) if on_gpu else demo_config()
    # One layer of the decoder: only what stands before it is measured.
    small = replace(config, language=replace(config.language, layers=1))
    device = torch.device("cuda" if on_gpu else "cpu")
    model = random_model(small, device, torch.bfloat16)
    meter = Meter(options.repeats, device)
    with torch.inference_mode():
        _measure_pictures(meter, model)
        _measure_vision(meter, model, options.crops)
        _measure_sound(meter, model, options.seconds)
    write_document(options.out, device, options.commit, {"figures": meter.figures})
    return 0


class Meter:
    """Times one thing after the other; tells each and keeps it."""

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.figures: list[dict[str, Any]] = []
        self._repeats, self._device = repeats, device

    def measure(self, name: str, work: Callable[[], object], **facts: float) -> None:
        """The middle of some runs, after one that warms up, and the device's memory that one takes."""
        work()
        taken_bytes = _taken_bytes(work, self._device)
        seconds = statistics.median(_seconds(work, self._device) for _ in range(self._repeats))
        self.figures.append({"name": name, "seconds": seconds, "taken_bytes": taken_bytes, **facts})
        rest = ", ".join(f"{fact} {value:,.4g}" for fact, value in facts.items())
        print(f"{name:<52} {seconds * 1e3:9.2f} ms  {costs.size_text(taken_bytes):>9}  {rest}", file=sys.stderr)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def _taken_bytes(work: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before_bytes


def _measure_pictures(meter: Meter, model: Phi4MM) -> None:
    config, random = model.config, np.random.default_rng(0)
    for name, (width, height) in PICTURES.items():
        media = image_media(random.integers(0, 256, (height, width, 3), np.uint8))
        image = decode_image(media, config.vision)
        out = _empty_crops(model, image.footprint.crops)
        price = costs.cropping(config, len(out), 2).bytes - out.nbytes
        meter.measure(f"crops of {name}, device", partial(make_crops, image, 0, out), price_bytes=price, crops=len(out))
        meter.measure(f"crops of {name}, one thread of the host", partial(prepare_image, media, config.vision))


def _measure_vision(meter: Meter, model: Phi4MM, count: int) -> None:
    """Crops with no padding, with padding in two of seven, as pictures of 1024 x 768 have it, and with it in all."""
    config, side = model.config, model.config.vision.patches
    crops = _empty_crops(model, count).normal_()
    price, operations = costs.vision_pass(config, count, 2).bytes, count * crop_operations(config.vision)
    for name, share in (("no", 0.0), ("two sevenths", 2 / 7), ("all", 1.0)):
        mask = torch.ones(count, side, side, dtype=torch.bool)
        mask[: round(share * count), :, -side // 4 :] = False
        work = partial(model.encode_crops, crops, mask)
        meter.measure(f"{count} crops encoded, {name} with padding", work, price_bytes=price, operations=operations)


def _measure_sound(meter: Meter, model: Phi4MM, seconds: float) -> None:
    config, audio = model.config, model.config.audio
    values = (np.random.default_rng(0).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)
    meter.measure("sound checked and hashed, host", partial(audio_media, values, RATE))
    media = audio_media(values, RATE)
    meter.measure("sound decoded, host", partial(decode_clip, media, audio))
    meter.measure("log-mel frames, one thread of the host", partial(prepare_clip, media, audio))
    clip = decode_clip(media, audio)
    frames = clip.footprint.frames

    def read(first: int, end: int) -> Tensor:
        return make_frames(clip, first, end, audio.mel_bins, model.device)

    def cut() -> list[Window]:
        return [make_window(frames, i, audio, read) for i in range(count_windows(frames, audio))]

    def encode(windows: Sequence[Window]) -> None:
        for first in range(0, len(windows), WINDOWS):
            some = windows[first : first + WINDOWS]
            model.encode_windows(some, ["speech"] * len(some))

    meter.measure("log-mel frames, device", cut)
    windows, encoder = cut(), model.audio
    price = costs.audio_pass(config, min(len(windows), WINDOWS), 2, decoded=True).bytes
    operations = clip_operations(audio, clip.footprint.tokens)
    meter.measure(f"sound encoded, {WINDOWS} windows at once", partial(encode, windows), operations=operations)
    meter.measure("sound, from samples to embeddings", lambda: encode(cut()), price_bytes=price, operations=operations)
    meter.measure("its subsampling", lambda: encoder.subsample(windows))
    pieces = encoder.subsample(windows[:WINDOWS])
    meter.measure(f"the conformer over {min(len(windows), WINDOWS)} windows", partial(encoder._conform, pieces))


def _empty_crops(model: Phi4MM, count: int) -> Tensor:
    size = model.config.vision.crop_size
    return torch.empty(count, 3, size, size, dtype=model.dtype, device=model.device)


if __name__ == "__main__":
    sys.exit(main())
