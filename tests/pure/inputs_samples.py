"""Pictures, sounds and tokenizers that the tests of `memphi.inputs` share; made here, not stored."""

import functools
import gzip
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image

from memphi import official
from memphi.config import ModelConfig
from memphi.inputs.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
# container to write, codec, whether it keeps samples exactly
SOUND_FORMATS = (
    ("wav", "pcm_s16le", True),
    ("wav", "pcm_f32le", True),
    ("wav", "pcm_s24le", True),
    ("wav", "pcm_u8", True),
    ("wav", "pcm_mulaw", True),
    ("wav", "adpcm_ms", False),
    ("flac", "flac", True),
    ("mp3", "libmp3lame", False),
    ("mp4", "aac", False),
    ("ipod", "aac", False),
    ("mp4", "alac", True),
    ("adts", "aac", False),
    ("ogg", "libopus", False),
    ("ogg", "flac", True),
    ("webm", "libopus", False),
    ("matroska", "aac", False),
)


@functools.cache
def config():
    return ModelConfig.from_folder(official.folder())


@functools.cache
def small_config():
    """Crops of 56 pixels, at most six: pictures are prepared in no time."""
    return replace(config(), vision=replace(config().vision, crop_size=56, max_crops=6))


@functools.cache
def tokenizer():
    return Tokenizer.from_folder(official.folder())


@functools.cache
def official_tokenizer():
    """The official tokenizer as the tokenizers library has it: special strings in text become special ids."""
    return tokenizers.Tokenizer.from_buffer(gzip.decompress((official.folder() / "tokenizer.json.gz").read_bytes()))


def gradient(width, height, channels=3):
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    return ((x * 7 + y * 13 + c * 60) % 256).astype(np.uint8)


def picture(width, height, format="PNG", orientation=None, mode="RGB"):
    image = Image.fromarray(gradient(width, height)).convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format, **({"exif": exif} if orientation is not None else {}))
    return file.getvalue()


def png_header(width, height):
    """A PNG that says how big it is and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def _chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tone(samples, rate, channels=1):
    """A quiet sweep, different in each channel: float32 [channels, samples]."""
    time = np.arange(samples) / rate
    return np.stack([0.1 * np.sin(2 * np.pi * (300 + 200 * n + 100 * time) * time) for n in range(channels)]).astype(
        np.float32
    )


def sound(container, codec, rate=16000, samples=8000, channels=1, values=None):
    import av  # Here alone: machines with a GPU may lack it.

    file = io.BytesIO()
    layout = "mono" if channels == 1 else "stereo"
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(
            tone(samples, rate, channels) if values is None else values, format="fltp", layout=layout
        )
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()
