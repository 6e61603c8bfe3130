"""Sound: what a clip costs, and its log-mel features, the definition of audio preprocessing.

Knows FFmpeg's decoders (through PyAV), resampling and spec 5.1; nothing of tokens' ids or tensors. Called by `prompt`.
Everything streams: however long a clip is, only its features exist as a whole.

Differs from the official processor in one thing: rates other than 8 and 16 kHz are really resampled to 16 kHz, where
the official code is wrong for rates that are no multiple of it (spec 5.1).
"""

import io
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memphi.config import AudioConfig
from memphi.errors import MediaError
from memphi.inputs.media import DEFAULT_LIMITS, TAG, MediaLimits, attached, check_samples, sniff
from memphi.request import ClipFootprint, ClipInput, DecodedClip, Float32, Media, Samples

if TYPE_CHECKING:
    from av.container import InputContainer

RATE, NARROW_RATE = 16_000, 8_000
"""The two rates that features are made from; the second is telephone sound, which has a path of its own."""
LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000
BLOCK_SECONDS = 10
"""How much sound is worked on at once."""

PRE_EMPHASIS = 0.97
FULL_SCALE = 32_768.0
HIGHEST_HZ = 7_690.0
FFT_SIZE = 512

TAGS = TAG, b"TAG", b"APETAGEX"
"""How titles begin, which also stand between MP3 files that were joined, and are no sound."""
WIDE_SAMPLES = "s64", "s64p"
"""FFmpeg's names of integers that NumPy is not given."""
LOST_SECONDS = 0.02
"""What cannot be read of a FLAC FFmpeg leaves out without a word; the next frame begins so much later, or more."""

FILTER_REACH = 10
"""Zero crossings on each side of the resampling filter, as scipy.signal.resample_poly has them."""
KAISER_BETA = 5.0


@dataclass(frozen=True)
class Length:
    """How long a clip is, in samples of its own rate."""

    samples: int
    rate: int


def measure_clip(media: Media, audio: AudioConfig, limits: MediaLimits = DEFAULT_LIMITS) -> ClipFootprint:
    """What a clip costs; raises MediaError, naming the attachment, for one too short, too long or damaged."""
    with attached(media.name):
        return clip_footprint(count_frames(measure_length(media, limits)), audio)


def prepare_clip(media: Media, audio: AudioConfig, limits: MediaLimits = DEFAULT_LIMITS) -> ClipInput:
    """Decode a clip into log-mel features; raises MediaError, naming the attachment."""
    with attached(media.name), open_sound(media, limits) as (rate, blocks):
        features = log_mel(resample(blocks, rate), _target(rate), audio.mel_bins)
        return ClipInput(features, clip_footprint(len(features), audio))


def decode_clip(media: Media, audio: AudioConfig, limits: MediaLimits = DEFAULT_LIMITS) -> DecodedClip:
    """Decode a clip whose log-mel frames the device makes; raises MediaError, naming the attachment."""
    with attached(media.name), open_sound(media, limits) as (rate, blocks):
        samples = np.concatenate([np.empty(0, np.float32), *resample(blocks, rate)])
        target = _target(rate)
        return DecodedClip(samples, target, clip_footprint(_count_frames(len(samples), target), audio))


def clip_footprint(frames: int, audio: AudioConfig) -> ClipFootprint:
    """What this many frames cost; raises MediaError where there is none."""
    if frames < 1:
        raise MediaError("is shorter than 25 ms; send a longer clip")
    return ClipFootprint((frames * 10 + 15) / 1000, frames, math.ceil(frames / audio.compression))


def count_frames(length: Length) -> int:
    """Frames of a clip once it is resampled (spec 5.1); 0 for one shorter than a frame."""
    target = _target(length.rate)
    return _count_frames(-(-length.samples * target // length.rate), target)


def _count_frames(samples: int, rate: int) -> int:
    window, hop = window_and_hop(rate)
    return max(0, (samples - window) // hop + 1)


def _check_length(length: Length, limits: MediaLimits) -> Length:
    if not LOWEST_RATE <= length.rate <= HIGHEST_RATE:
        raise MediaError(f"has {length.rate} samples a second; memphi hears {LOWEST_RATE} to {HIGHEST_RATE}")
    if length.samples > limits.seconds * length.rate:
        raise MediaError(f"is longer than {limits.seconds:g} seconds, the most that a clip may last; cut it")
    return length


def _target(rate: int) -> int:
    return NARROW_RATE if rate == NARROW_RATE else RATE


def window_and_hop(rate: int) -> tuple[int, int]:
    """25 ms and 10 ms, in samples."""
    return rate // 40, rate // 100


# --- counting and decoding ---------------------------------------------------------------------------------------


def measure_length(media: Media, limits: MediaLimits) -> Length:
    """Count samples, in a file by decoding and dropping them.

    Headers and packets do not tell what a decoder will give: files are cut short, and encoder delay, padding and
    doubled rates are resolved only while decoding. For half an hour that takes two seconds, of PCM a fifth of one.
    """
    if isinstance(media.content, Samples):
        return _check_length(Length(len(media.content.values), media.content.rate), limits)
    samples = rate = 0
    with _opened(media) as container:
        for frame in _frames(container, limits):
            samples, rate = samples + frame.samples, frame.sample_rate
    return Length(samples, rate)


@contextmanager
def open_sound(media: Media, limits: MediaLimits) -> Iterator[tuple[int, Iterator[Float32]]]:
    """The rate of a clip, and its one channel of float32 in blocks of some seconds."""
    if isinstance(media.content, Samples):
        length = measure_length(media, limits)
        yield length.rate, _split(media.content.values, BLOCK_SECONDS * length.rate)
        return
    with _opened(media) as container:
        frames = _frames(container, limits)
        first = next(frames)
        blocks = map(_mono, itertools.chain([first], frames))
        yield first.sample_rate, _regroup(blocks, BLOCK_SECONDS * first.sample_rate)


@contextmanager
def _opened(media: Media) -> "Iterator[InputContainer]":
    """Open a container in memory; whatever FFmpeg raises inside becomes one MediaError."""
    import av

    assert isinstance(media.content, bytes)
    kind, format = sniff(media.content)
    if kind != "audio":
        raise MediaError("is a picture, not a sound")
    if format == "wav":
        _check_wav(media.content)
    try:
        # The format is given so that FFmpeg never takes a file for a playlist, which names other files; titles and the
        # like may be in any encoding.
        with av.open(io.BytesIO(media.content), mode="r", format=format, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise MediaError("has no sound in it")
            yield container
    except MediaError:
        raise
    except av.error.FFmpegError as wrong:
        raise MediaError(f"cannot be read as sound, it is damaged or cut short ({wrong.strerror})") from None


def _check_wav(content: bytes) -> None:
    """Refuse a WAV with a comment that claims more bytes than there are: FFmpeg would allocate them, up to 2 GiB."""
    for name, start, end in _chunks(content, len(b"RIFFsizeWAVE"), len(content)):
        comments = _chunks(content, start + len(b"INFO"), end) if name == b"LIST" else ()
        if any(stop > min(end, len(content)) for _, _, stop in comments):
            raise MediaError("has damaged comments; save it without them")


def _chunks(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each RIFF chunk in a part of a file; the end is what the chunk claims."""
    while start + 8 <= min(end, len(content)):
        stop = start + 8 + int.from_bytes(content[start + 4 : start + 8], "little")
        yield content[start : start + 4], start + 8, stop
        start = stop + stop % 2


def _frames(container: "InputContainer", limits: MediaLimits) -> Iterator[Any]:
    """Decode the first sound stream, at least one frame of it, and stop with MediaError at the limit.

    Damage at the very end is a file cut short, which still can be heard; damage before more sound is refused.
    """
    import av

    samples, rate, damaged, end = 0, None, False, math.nan
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames: list[Any] = packet.decode()
        except av.error.InvalidDataError:
            damaged = damaged or not bytes(packet).startswith(TAGS)
            continue
        for frame in frames:
            begins = end if frame.pts is None else float(frame.pts * frame.time_base)
            if damaged or (container.format.name == "flac" and begins > end + LOST_SECONDS):
                raise MediaError("is damaged in the middle; convert or record it anew")
            if rate not in (None, frame.sample_rate):
                raise MediaError("changes its sample rate on the way; convert it to one rate")
            if frame.format.name in WIDE_SAMPLES:
                raise MediaError("has samples of 64 bits; save it with 16, 24 or 32")
            rate = frame.sample_rate
            samples, end = samples + frame.samples, begins + frame.samples / rate
            _check_length(Length(samples, rate), limits)
            yield frame
    if rate is None:
        raise MediaError("has no sound that can be decoded")


def _mono(frame: Any) -> Float32:  # noqa: ANN401 (an av.AudioFrame; PyAV is imported only where it is used)
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, len(frame.layout.channels)).T
    values = _to_float(values)
    check_samples(values)
    mono: Float32 = values.mean(axis=0, dtype=np.float32)
    return mono


def _to_float(values: NDArray[Any]) -> Float32:
    """Scale integers to [-1, 1); float stays as it is."""
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - np.float32(128)) / np.float32(128)
    if np.issubdtype(values.dtype, np.integer):
        return (values * (1.0 / -float(np.iinfo(values.dtype).min))).astype(np.float32)
    return values.astype(np.float32)


def _regroup(blocks: Iterable[Float32], samples: int) -> Iterator[Float32]:
    """Join small blocks into ones of at least this many samples, the last one excepted."""
    held: list[Float32] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= samples:
            yield np.concatenate(held)
            held, count = [], 0
    if held:
        yield np.concatenate(held)


def _split(values: Float32, samples: int) -> Iterator[Float32]:
    """Cut sound that is there as a whole into blocks of at most this many samples."""
    for start in range(0, len(values), samples):
        check_samples(values[start : start + samples])
        yield values[start : start + samples]


# --- resampling --------------------------------------------------------------------------------------------------


def resample(blocks: Iterable[Float32], rate: int) -> Iterator[Float32]:
    """Bring sound to 16 kHz as scipy.signal.resample_poly would the whole of it; 8 and 16 kHz pass through.

    A group of outputs is `up` of them, one for each phase of the filter; it moves on by `down` inputs.
    """
    if _target(rate) == rate:
        yield from blocks
        return
    divisor = math.gcd(RATE, rate)
    up, down = RATE // divisor, rate // divisor
    bank, starts = _filter_bank(up, down)
    taps = bank.shape[1]
    reach = int(starts[-1]) + taps  # inputs that one group needs
    held = np.zeros(taps - 1, np.float32)
    taken = given = 0
    for block in blocks:
        taken += len(block)
        held = np.concatenate([held, block])
        groups = max(0, (len(held) - reach) // down + 1)
        if groups:
            yield _filter(held, groups, bank, starts, down)
            held, given = held[groups * down :], given + groups * up
    left = -(-taken * up // down) - given
    groups = -(-left // up)
    silence = np.zeros(max(0, (groups - 1) * down + reach - len(held)), np.float32)
    yield _filter(np.concatenate([held, silence]), groups, bank, starts, down)[:left]


def _filter_bank(up: int, down: int) -> tuple[Float32, NDArray[np.int64]]:
    """The low-pass filter of one group: [up, taps] and where each output's window of inputs starts.

    Windows count from taps - 1 zeros before the first input. Output m is the sum over inputs k of
    x[k] * h[half + m * down - k * up].
    """
    half = FILTER_REACH * max(up, down)
    taps = 2 * half // up + 1
    kernel = np.zeros(taps * up)
    kernel[: 2 * half + 1] = _low_pass(half, max(up, down)) * up
    last, phases = np.divmod(half + np.arange(up) * down, up)
    return np.ascontiguousarray(kernel.reshape(taps, up).T[phases, ::-1], dtype=np.float32), last


def _low_pass(half: int, factor: int) -> NDArray[np.float64]:
    """scipy.signal.firwin(2 * half + 1, 1 / factor, window=("kaiser", 5.0))."""
    kernel: NDArray[np.float64] = np.sinc(np.arange(-half, half + 1) / factor) * np.kaiser(2 * half + 1, KAISER_BETA)
    kernel /= kernel.sum()
    return kernel


def _filter(held: Float32, groups: int, bank: Float32, starts: NDArray[np.int64], down: int) -> Float32:
    windows = np.lib.stride_tricks.sliding_window_view(held, bank.shape[1])
    result = np.empty((groups, len(bank)), np.float32)
    for phase, start in enumerate(starts):
        result[:, phase] = windows[start::down][:groups] @ bank[phase]
    return result.reshape(-1)


# --- log-mel -----------------------------------------------------------------------------------------------------


def log_mel(blocks: Iterable[Float32], rate: int, bins: int) -> Float32:
    """Log-mel features float32 [frames, bins] of sound at 16 or 8 kHz (spec 5.1)."""
    hop = window_and_hop(rate)[1]
    mel = mel_matrix(bins)
    features = [np.empty((0, bins), np.float32)]
    held = np.empty(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        if count := _count_frames(len(held), rate):
            features.append(_log_mel_block(held, count, rate, mel))
            held = held[count * hop :]
    return np.concatenate(features)


def _log_mel_block(samples: Float32, count: int, rate: int, mel: Float32) -> Float32:
    """Features of the first `count` frames: [count, bins]."""
    window, hop = window_and_hop(rate)
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop][:count]
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    emphasised = (frames - np.float32(PRE_EMPHASIS) * before) * np.float32(FULL_SCALE)
    size, kept = fft_size(rate)
    spectrum = np.fft.rfft(hamming(window) * emphasised, n=size, axis=1).astype(np.complex64)
    power = np.abs(spectrum[:, :kept]) ** 2
    return np.log(np.maximum(power @ mel[:, :kept].T, np.float32(1)))


def fft_size(rate: int) -> tuple[int, int]:
    """Samples of the FFT, and how many of its bins count.

    At 8 kHz the Nyquist bin goes and nothing stands above it, so that the upper half of the mel matrix has no part.
    """
    size = FFT_SIZE * rate // RATE
    return size, size // 2 + (rate == RATE)


def hamming(window: int) -> NDArray[np.float64]:
    """The symmetric Hamming window."""
    return 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(window) / (window - 1))


def mel_matrix(bins: int) -> Float32:
    """Weights of the FFT's bins in each mel band, [bins, 257]: triangles in mel, up to 7690 Hz (spec 5.1)."""
    spacing = _mel(HIGHEST_HZ) / (bins + 1)
    centres = spacing * np.arange(1, bins + 1)
    highest = int(HIGHEST_HZ * FFT_SIZE / RATE + 0.5)
    matrix = np.zeros((bins, FFT_SIZE // 2 + 1), np.float32)
    positions = _mel(np.arange(1, highest) * (RATE / FFT_SIZE))
    matrix[:, 1:highest] = np.maximum(0.0, 1 - np.abs(centres[:, None] - positions) / spacing)
    return matrix


def _mel(frequency: Any) -> Any:  # noqa: ANN401 (a number or an array of them)
    return 1127.0 * np.log1p(frequency / 700.0)
