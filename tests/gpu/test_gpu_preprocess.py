"""On CUDA crops are the host's to the last bit, frames but for rounding; nobody waits for the device."""

import numpy as np
import pytest
import torch

from memphi.inputs.audio import decode_clip, prepare_clip
from memphi.inputs.image import decode_image, prepare_image
from memphi.inputs.media import audio_media, image_media, open_media
from memphi.memory import costs
from memphi.model.preprocess import make_crops, make_frames
from tests.cpu.test_preprocess import FRAME_TOLERANCE
from tests.pure.inputs_samples import DATA, config

VISION = config().vision
DEVICE = torch.device("cuda")
SIZES = [(1024, 768), (1, 1), (449, 448), (77, 1211), (2480, 3508), (4000, 3000), (8000, 6000), (20_000, 300)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def noise(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def made(image, dtype=torch.float32):
    out = torch.empty(image.footprint.crops, 3, VISION.crop_size, VISION.crop_size, dtype=dtype, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_crops(image, 0, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return out


@pytest.mark.parametrize("size", SIZES)
def test_crops_equal_the_hosts(size):
    media = image_media(noise(*size))
    expected = prepare_image(media, VISION).crops
    assert np.array_equal(made(decode_image(media, VISION)).cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_in_16_bits_are_the_hosts_rounded(dtype):
    media = image_media(noise(1024, 768))
    expected = torch.from_numpy(prepare_image(media, VISION).crops).to(dtype)
    assert torch.equal(made(decode_image(media, VISION), dtype).cpu(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_takes_no_more_than_its_price(size):
    image = decode_image(image_media(noise(*size)), VISION)
    made(image, torch.bfloat16)  # whatever is loaded with the first use is here now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    made(image, torch.bfloat16)
    taken_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert taken_bytes <= costs.cropping(config(), image.footprint.crops, 2).bytes


def noise_clip():
    return audio_media((np.random.default_rng(0).standard_normal(60 * 16_000) * 0.1).astype(np.float32), 16_000)


@pytest.mark.parametrize("name", ["1272-141231-0002.wav", "1272-128104-0004-8k.wav", None])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "tf32"])
def test_frames_equal_the_hosts(name, fast, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", fast)
    if name:
        pytest.importorskip("av")
    media = open_media(DATA / name) if name else noise_clip()
    clip, expected = decode_clip(media, config().audio), prepare_clip(media, config().audio)
    bins = config().audio.mel_bins
    make_frames(clip, 0, 1, bins, DEVICE)  # loads what products need
    torch.cuda.set_sync_debug_mode("error")
    try:
        frames = make_frames(clip, 0, clip.footprint.frames, bins, DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    np.testing.assert_allclose(frames.cpu().numpy(), expected.features, rtol=0, atol=FRAME_TOLERANCE)
