"""Spoken clips of the demo's world: recordings of one voice joined, and made to sound as if taken in a real room.

Knows recordings and chance; knows no questions. `tasks` calls `spoken_list` and `spoken_sentence`; both return int16 at
16 kHz.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memphi.demo.bank import Voice
from memphi.demo.sound import RATE, Sound

Chance = np.random.Generator
Wave = NDArray[np.float32]

_SHORTEST = RATE
_LONGEST = 60 * RATE


def spoken_sentence(clip: Sound, chance: Chance) -> Sound:
    """Return one recorded sentence with a little silence around it, as recorded somewhere."""
    return _taken(_joined([_at_pace(clip, _pace(chance))], [_silence(chance), _silence(chance)]), chance)


def spoken_list(voice: Voice, seconds: float, chance: Chance) -> tuple[Sound, tuple[str, ...]]:
    """Return the voice saying words and phrases for about that long (60 s at most), and the words in order."""
    pace, gap = _pace(chance), float(chance.uniform(0.03, 0.35))
    long_pauses = 0.25 if seconds > 15 else 0.04
    words, clips, gaps, total = list[str](), list[Wave](), [_silence(chance)], 0
    while not words or total < seconds * RATE:
        text, clip = _chosen(voice, chance)
        clip_at_pace = _at_pace(clip, pace * float(chance.uniform(0.97, 1.03)))
        pause = chance.uniform(0.5, 3.0) if chance.random() < long_pauses else gap * chance.uniform(0.5, 1.5)
        if words and total + len(clip_at_pace) + RATE > _LONGEST:
            break
        words += text.split()
        clips.append(clip_at_pace)
        gaps.append(int(float(pause) * RATE))
        total = sum(map(len, clips)) + sum(gaps)
    gaps[-1] = _silence(chance)
    return _taken(_joined(clips, gaps)[:_LONGEST], chance), tuple(words)


def _chosen(voice: Voice, chance: Chance) -> tuple[str, Sound]:
    recordings = voice.phrases if voice.phrases and chance.random() < 0.2 else voice.words
    text = list(recordings)[int(chance.integers(len(recordings)))]
    return text, recordings[text]


def _pace(chance: Chance) -> float:
    return float(chance.uniform(0.88, 1.12))


def _silence(chance: Chance) -> int:
    return int(RATE * float(chance.uniform(0.05, 0.5)))


def _at_pace(clip: Sound, pace: float) -> Wave:
    """Return the clip resampled, so that pace and pitch both change; linear between samples, which is quick."""
    places = np.arange(int((len(clip) - 1) / pace), dtype=np.float32) * np.float32(pace)
    before = places.astype(np.int32)
    wave = clip.astype(np.float32)
    share = places - before
    return wave[before] * (1 - share) + wave[before + 1] * share


def _joined(clips: Sequence[Wave], gaps: Sequence[int]) -> Wave:
    """Return gap, clip, gap, ..., gap and, where that is too short, more silence; gaps in samples."""
    pieces = [np.zeros(gaps[0], dtype=np.float32)]
    for clip, gap in zip(clips, gaps[1:], strict=True):
        pieces += [clip, np.zeros(gap, dtype=np.float32)]
    pieces.append(np.zeros(max(0, _SHORTEST - sum(map(len, pieces))), dtype=np.float32))
    return np.concatenate(pieces)


def _taken(wave: Wave, chance: Chance) -> Sound:
    """Return the wave as some microphone in some room would: its tone, its noise and its level."""
    toned = _toned(wave, chance)
    loudest = float(np.abs(toned).max(initial=1.0))
    scale = 32_767 * 10 ** float(chance.uniform(-1.1, -0.03)) / loudest
    heard = toned * np.float32(scale)
    if chance.random() < 0.7:
        speech_level = scale * float(np.sqrt(np.mean(toned**2)))
        heard += _noise(len(heard), chance) * np.float32(speech_level * 10 ** float(-chance.uniform(0.8, 2.2)))
    return np.asarray(np.clip(heard, -32_768, 32_767), dtype=np.int16)


def _toned(wave: Wave, chance: Chance) -> Wave:
    """Return the wave brighter, duller, or as through a telephone; often unchanged."""
    kind = float(chance.random())
    if kind < 0.3:
        share = np.float32(chance.uniform(-0.5, 0.5))
        return wave - share * np.concatenate((np.zeros(1, np.float32), wave[:-1]))
    if kind < 0.4:
        return np.convolve(wave, _low_pass(float(chance.uniform(3_000, 7_000))), mode="same").astype(np.float32)
    return wave


def _low_pass(cutoff: float) -> Wave:
    """Return a short filter that stops what lies above the cutoff (hertz)."""
    places = np.arange(-12, 13)
    taps = np.sinc(2 * cutoff / RATE * places) * np.hamming(len(places))
    return np.asarray(taps / taps.sum(), dtype=np.float32)


def _noise(length: int, chance: Chance) -> Wave:
    """Return noise of unit level, hissing or rumbling, repeated from half a second of it."""
    grain = chance.standard_normal(RATE // 2, dtype=np.float32)
    if chance.random() < 0.5:
        width = int(chance.integers(2, 12))
        grain = np.convolve(grain, np.full(width, 1 / math.sqrt(width), np.float32), mode="same").astype(np.float32)
    return np.resize(np.roll(grain, int(chance.integers(len(grain)))), length)
