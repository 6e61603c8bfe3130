"""Sound as the demo's data needs it: trimming, resampling and a 4-bit form that only needs numpy to read.

Knows arrays of int16 samples at 16 kHz; knows no words, voices or files. The bank writes with `encode` and reads with
`decode`; the voices use the rest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sound = NDArray[np.int16]

RATE = 16_000
_START_INDEX = 16
_GROUP = 2_048
_STEPS = np.array(
    [7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 19, 21, 23, 25, 28, 31, 34, 37, 41, 45, 50, 55, 60, 66, 73, 80, 88, 97, 107]
    + [118, 130, 143, 157, 173, 190, 209, 230, 253, 279, 307, 337, 371, 408, 449, 494, 544, 598, 658, 724, 796, 876]
    + [963, 1060, 1166, 1282, 1411, 1552, 1707, 1878, 2066, 2272, 2499, 2749, 3024, 3327, 3660, 4026, 4428, 4871, 5358]
    + [5894, 6484, 7132, 7845, 8630, 9493, 10442, 11487, 12635, 13899, 15289, 16818, 18500, 20350, 22385, 24623, 27086]
    + [29794, 32767],
    dtype=np.int32,
)
_INDEX_MOVES = np.array([-1, -1, -1, -1, 2, 4, 6, 8] * 2, dtype=np.int32)


def trimmed(sound: Sound, floor_db: float = -42.0, margin: float = 0.02) -> Sound:
    """Return the sound without the silence around it; margin in seconds is kept at both ends."""
    frame = RATE // 100
    count = len(sound) // frame
    if count == 0 or not sound.any():
        return sound
    loudness = np.sqrt(np.mean(sound[: count * frame].reshape(count, frame).astype(np.float64) ** 2, axis=1))
    loud = np.flatnonzero(loudness > loudness.max() * 10 ** (floor_db / 20))
    keep = int(margin * RATE)
    return sound[max(0, loud[0] * frame - keep) : (loud[-1] + 1) * frame + keep]


def resampled(sound: Sound, ratio: float) -> Sound:
    """Return the sound at ratio times its number of samples, through its spectrum (slow and clean)."""
    padded = np.pad(sound.astype(np.float64), 256)
    length = round(len(padded) * ratio)
    spectrum = np.fft.rfft(padded)
    bins = length // 2 + 1
    kept = np.zeros(bins, dtype=np.complex128)
    kept[: min(bins, len(spectrum))] = spectrum[:bins]
    wave = np.fft.irfft(kept, length) * ratio
    edge = round(256 * ratio)
    return levelled(wave[edge : length - edge])


def levelled(wave: NDArray[Any], peak: float = 0.6) -> Sound:
    """Return the wave as int16 with its loudest sample at `peak` of full scale."""
    loudest = float(np.abs(wave.astype(np.float64)).max(initial=0.0))
    scale = peak * 32_767 / loudest if loudest else 0.0
    return np.round(wave.astype(np.float64) * scale).astype(np.int16)


def encode(sounds: Sequence[Sound]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return all sounds in IMA ADPCM, two samples a byte, and their lengths in samples."""
    lengths = np.array([len(sound) for sound in sounds], dtype=np.int32)
    packed: list[NDArray[np.uint8]] = [np.zeros(0, dtype=np.uint8)] * len(sounds)
    for group in _groups_of_similar_length(lengths):
        wave = np.zeros((_even(lengths[group].max()), len(group)), dtype=np.int32)
        for column, clip in enumerate(group):
            wave[: lengths[clip], column] = sounds[clip]
        codes = _encode_columns(wave)
        for column, clip in enumerate(group):
            nibbles = codes[: _even(lengths[clip]), column]
            packed[clip] = nibbles[0::2] | (nibbles[1::2] << 4)
    return np.concatenate(packed) if packed else np.zeros(0, dtype=np.uint8), lengths


def decode(codes: NDArray[np.uint8], lengths: NDArray[np.int32]) -> list[Sound]:
    """Return the sounds that `encode` packed, all of them views of one array."""
    sizes = (lengths.astype(np.int64) + 1) // 2
    starts = np.concatenate(([0], np.cumsum(sizes)))
    ends = np.cumsum(lengths.astype(np.int64))
    samples = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.int16)
    for group in _groups_of_similar_length(lengths):
        nibbles = np.zeros((_even(lengths[group].max()), len(group)), dtype=np.uint8)
        for column, clip in enumerate(group):
            packed = codes[starts[clip] : starts[clip + 1]]
            nibbles[0 : 2 * len(packed) : 2, column] = packed & 15
            nibbles[1 : 2 * len(packed) : 2, column] = packed >> 4
        wave = _decode_columns(nibbles)
        for column, clip in enumerate(group):
            samples[ends[clip] - lengths[clip] : ends[clip]] = wave[: lengths[clip], column]
    return [samples[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _even(count: int) -> int:
    return int(count) + int(count) % 2


def _groups_of_similar_length(lengths: NDArray[np.int32]) -> list[NDArray[np.intp]]:
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]


def _tables() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return what each (step index, code) adds to the sample and the step index that follows; both of shape (89 * 16)."""
    code = np.arange(16)
    size = _STEPS[:, None] * (2 * (code & 7) + 1) // 8
    change = np.where(code & 8, -size, size).astype(np.int32)
    following = np.clip(np.arange(len(_STEPS))[:, None] + _INDEX_MOVES[code], 0, len(_STEPS) - 1).astype(np.int32)
    return change.ravel(), following.ravel()


def _encode_columns(wave: NDArray[np.int32]) -> NDArray[np.uint8]:
    change, following = _tables()
    codes = np.zeros(wave.shape, dtype=np.uint8)
    predicted = np.zeros(wave.shape[1], dtype=np.int32)
    index = np.full(wave.shape[1], _START_INDEX, dtype=np.int32)
    for time, target in enumerate(wave):
        error = target - predicted
        magnitude = np.minimum(np.abs(error) * 4 // _STEPS[index], 7)
        code = magnitude + 8 * (error < 0)
        cell = index * 16 + code
        predicted = np.clip(predicted + change[cell], -32_768, 32_767)
        index = following[cell]
        codes[time] = code
    return codes


def _decode_columns(codes: NDArray[np.uint8]) -> NDArray[np.int16]:
    change, following = _tables()
    wave = np.zeros(codes.shape, dtype=np.int16)
    predicted = np.zeros(codes.shape[1], dtype=np.int32)
    index = np.full(codes.shape[1], _START_INDEX, dtype=np.int32)
    for time, code in enumerate(codes):
        cell = index * 16 + code
        predicted = np.clip(predicted + change[cell], -32_768, 32_767)
        index = following[cell]
        wave[time] = predicted
    return wave
