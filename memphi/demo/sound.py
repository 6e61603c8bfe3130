"""Sound as the demo's data needs it: trimming, resampling and a compact form that only needs numpy to read.

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
_STEPS = np.round(7 * 1.1 ** np.arange(89)).astype(np.int32)
_SIZES = 16
_INDEX_MOVES = np.array([-1] * 8 + [1, 2, 4, 6, 8, 10, 13, 16], dtype=np.int32)


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
    """Return all sounds as 5-bit ADPCM codes (one a byte, end to end), and their lengths in samples."""
    lengths = np.array([len(sound) for sound in sounds], dtype=np.int32)
    codes = [np.zeros(length, dtype=np.uint8) for length in lengths]
    for group in _groups_of_similar_length(lengths):
        wave = np.zeros((lengths[group].max(), len(group)), dtype=np.int32)
        for column, clip in enumerate(group):
            wave[: lengths[clip], column] = sounds[clip]
        coded = _encode_columns(wave)
        for column, clip in enumerate(group):
            codes[clip] = coded[: lengths[clip], column]
    return np.concatenate([np.zeros(0, dtype=np.uint8), *codes]), lengths


def decode(codes: NDArray[np.uint8], lengths: NDArray[np.int32]) -> list[Sound]:
    """Return the sounds that `encode` coded, all of them views of one array."""
    spans = [slice(end - length, end) for end, length in zip(np.cumsum(lengths, dtype=np.int64), lengths, strict=True)]
    samples = np.zeros(len(codes), dtype=np.int16)
    for group in _groups_of_similar_length(lengths):
        coded = np.zeros((lengths[group].max(), len(group)), dtype=np.uint8)
        for column, clip in enumerate(group):
            coded[: lengths[clip], column] = codes[spans[clip]]
        wave = _decode_columns(coded)
        for column, clip in enumerate(group):
            samples[spans[clip]] = wave[: lengths[clip], column]
    return [samples[span] for span in spans]


def _groups_of_similar_length(lengths: NDArray[np.int32]) -> list[NDArray[np.intp]]:
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]


def _tables() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return what each (step index, code) adds to the sample and the index that follows; both of shape (89 * 32)."""
    code = np.arange(2 * _SIZES)
    size = _STEPS[:, None] * (2 * (code % _SIZES) + 1) // _SIZES
    change = np.where(code >= _SIZES, -size, size).astype(np.int32)
    following = np.arange(len(_STEPS))[:, None] + _INDEX_MOVES[code % _SIZES]
    return change.ravel(), np.clip(following, 0, len(_STEPS) - 1).astype(np.int32).ravel()


def _encode_columns(wave: NDArray[np.int32]) -> NDArray[np.uint8]:
    change, following = _tables()
    codes = np.zeros(wave.shape, dtype=np.uint8)
    predicted = np.zeros(wave.shape[1], dtype=np.int32)
    index = np.full(wave.shape[1], _START_INDEX, dtype=np.int32)
    for time, target in enumerate(wave):
        error = target - predicted
        size = np.minimum(np.abs(error) * _SIZES // (2 * _STEPS[index]), _SIZES - 1)
        code = size + _SIZES * (error < 0)
        cell = index * 2 * _SIZES + code
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
        cell = index * 2 * _SIZES + code
        predicted = np.clip(predicted + change[cell], -32_768, 32_767)
        index = following[cell]
        wave[time] = predicted
    return wave
