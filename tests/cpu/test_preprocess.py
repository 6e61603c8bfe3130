"""Crops made on the device are the host's to the last bit, log-mel frames but for rounding; here on the CPU.

For any size, in any bands and slices.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memphi.errors import MediaError
from memphi.inputs.audio import decode_clip, prepare_clip
from memphi.inputs.image import decode_image, prepare_image
from memphi.inputs.media import audio_media, image_media, open_media
from memphi.model import preprocess
from memphi.model.preprocess import linear_taps, make_crops, make_frames, resize_and_pad
from tests.pure.inputs_samples import DATA, config, small_config
from tests.pure.test_inputs_image import DETAILS

VISION, SMALL = config().vision, small_config().vision
AUDIO = config().audio
CPU = torch.device("cpu")
FRAME_TOLERANCE = 6e-6
"""Two steps of fp32 at the largest features; speech stays below 30, where they are 4e-6."""


def noise(width, height, seed=0):
    """Pixels of all values, white and black lines among them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels[:, ::5], pixels[::7] = 255, 0
    return pixels


def on_device(image, vision, first=0, units=None, dtype=torch.float32):
    units = image.footprint.crops - first if units is None else units
    out = torch.full((units, 3, vision.crop_size, vision.crop_size), torch.nan, dtype=dtype)
    make_crops(image, first, out)
    return out


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    detail=st.sampled_from(DETAILS),
    seed=st.integers(0, 99),
    band=st.sampled_from([1, 1000, 30_000, 4 << 20]),
)
@settings(max_examples=100)
def test_crops_equal_the_hosts(width, height, detail, seed, band):
    media = image_media(noise(width, height, seed))
    media = type(media)(media.kind, media.name, media.content, media.digest, detail)
    try:
        expected = prepare_image(media, SMALL)
    except MediaError:
        with pytest.raises(MediaError):
            decode_image(media, SMALL)
        return
    decoded = decode_image(media, SMALL)
    assert decoded.footprint == expected.footprint
    assert np.array_equal(decoded.patch_mask, expected.patch_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "BAND_VALUES", band)
        assert np.array_equal(on_device(decoded, SMALL).numpy(), expected.crops)


@pytest.mark.parametrize("size", [(1024, 768), (1, 1), (449, 448), (2480, 3508), (4000, 3000), (300, 5000)])
def test_crops_of_the_official_size_equal_the_hosts(size):
    media = image_media(noise(*size))
    assert np.array_equal(on_device(decode_image(media, VISION), VISION).numpy(), prepare_image(media, VISION).crops)


@pytest.mark.parametrize("units", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_of_crops_are_the_wholes(units, dtype):
    media = image_media(noise(150, 112))
    decoded, expected = decode_image(media, SMALL), torch.from_numpy(prepare_image(media, SMALL).crops).to(dtype)
    total = decoded.footprint.crops
    assert total == 7
    for first in range(0, total, units):
        count = min(units, total - first)
        assert torch.equal(on_device(decoded, SMALL, first, count, dtype), expected[first : first + count])


@given(length=st.integers(1, 3000), size=st.integers(1, 600))
def test_taps_are_pillows(length, size):
    """Of one line, which Pillow resizes in one pass."""
    line = noise(length, 1, seed=length)
    expected = np.asarray(Image.fromarray(line).resize((size, 1), Image.Resampling.BILINEAR))
    taps = linear_taps(length, size)
    sums = (line[0].astype(np.int64)[taps.places] * taps.weights[:, :, None]).sum(axis=0)
    assert np.array_equal((sums + (1 << 21)) >> 22, expected[0])


def test_taps_that_sum_to_more_than_white_are_white():
    decoded = decode_image(image_media(np.full((9000, 300, 3), 255, np.uint8)), SMALL)
    assert (resize_and_pad(decoded, SMALL.crop_size, CPU) == 255).all()


def test_pixels_that_are_not_to_be_written_to_are_copied():
    pixels = noise(80, 60)[::-1]
    pixels.flags.writeable = False
    decoded = decode_image(image_media(pixels), SMALL)
    assert decoded.pixels.flags.writeable
    assert decoded.pixels.flags.c_contiguous
    assert np.array_equal(decoded.pixels, pixels)


def frames_of(clip, first=0, end=None, bins=80):
    return make_frames(clip, first, clip.footprint.frames if end is None else end, bins, CPU).numpy()


@pytest.mark.parametrize("name", ["1272-141231-0002.wav", "1272-128104-0004-8k.wav"])
def test_frames_of_recordings_equal_the_hosts(name):
    media = open_media(DATA / name)
    decoded, expected = decode_clip(media, AUDIO), prepare_clip(media, AUDIO)
    assert decoded.footprint == expected.footprint
    np.testing.assert_allclose(frames_of(decoded), expected.features, rtol=0, atol=FRAME_TOLERANCE)


@given(
    samples=st.integers(400, 40_000),
    rate=st.sampled_from([8000, 16_000, 22_050, 44_100]),
    loudness=st.sampled_from([0.0, 1e-5, 0.1, 1000.0]),
    band=st.sampled_from([1, 7, 1000]),
)
@settings(max_examples=60)
def test_frames_equal_the_hosts(samples, rate, loudness, band):
    values = (np.random.default_rng(samples).standard_normal(samples) * loudness).astype(np.float32)
    media = audio_media(values, rate)
    try:
        expected = prepare_clip(media, AUDIO)
    except MediaError:
        with pytest.raises(MediaError):
            decode_clip(media, AUDIO)
        return
    decoded = decode_clip(media, AUDIO)
    assert decoded.footprint == expected.footprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "BAND_FRAMES", band)
        np.testing.assert_allclose(frames_of(decoded), expected.features, rtol=0, atol=FRAME_TOLERANCE)


@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 98), (17, 50), (97, 98)])
def test_stretches_of_frames_are_the_wholes(first, end):
    clip = decode_clip(audio_media(np.random.default_rng(0).standard_normal(16_000) * 0.1, 16_000), AUDIO)
    assert clip.footprint.frames == 98
    np.testing.assert_allclose(frames_of(clip, first, end), frames_of(clip)[first:end], rtol=0, atol=FRAME_TOLERANCE)
