"""Long recordings: cut at silence into segments that the model was trained to hear.

Knows how loud sound is over time; nothing of words. Every sample lands in one segment, and only the sound around the
next cut is held, however long a recording is. Called by whoever transcribes: server, jobs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memphi.errors import MediaError, RequestError
from memphi.inputs.audio import NARROW_RATE, RATE, count_frames, measure_length, open_sound, resample
from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits, attached
from memphi.request import Float32, Media, Samples

LONGEST_SECONDS = 30.0
"""The model hears best up to 40 s, the window of its encoder (spec 5.2); public sets of transcribed speech, and so most
of what it was trained on, stop at 30 s or a little above."""
FEWEST_SECONDS = 5.0
"""The least that a segment may be limited to."""

FRAMES_PER_SECOND = 100
WIDTHS = (10, 40, 80)
"""Frames around a cut that should be quiet: the narrowest keeps the cut itself out of speech, the others prefer long
pauses, and their middles."""
DEEPEST_DB = 60.0
"""Further below the loudest, all is equally quiet: a dropout of zeros is no better a pause than the noise of a room."""
PAUSE_SHARE = 0.3
"""A place is a pause where it lies in this lowest part of the range between the quietest place and the loudest."""
PAUSE_RANGE_DB = 5.0
"""Where quietest and loudest are closer than this, as in steady noise, nothing is taken for a pause."""

SILENCE_DB = -80.0
"""Of full scale: three steps of 16-bit sound, which no microphone is as quiet as."""
NOISE_RANGE_DB = 6.0
"""What noise may rise above its own floor and still be nothing but noise."""
SPEECH_ABOVE_NOISE_DB = 20.0
"""Only so far below the loudest sound of a recording is noise taken for silence."""

Levels = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording."""

    start: int
    """Its first sample, counted from the recording's."""
    samples: Samples
    silent: bool
    """Nothing but silence or the recording's own noise, so it need not be transcribed. In doubt it is not."""

    @property
    def start_seconds(self) -> float:
        return self.start / self.samples.rate

    @property
    def end_seconds(self) -> float:
        return (self.start + len(self.samples.values)) / self.samples.rate


def measure_recording(media: Media, limits: MediaLimits = DEFAULT_LIMITS) -> float:
    """How many seconds a recording lasts, by decoding and dropping it.

    Raises MediaError, naming the attachment, for one too short, too long or damaged anywhere.
    """
    with attached(media.name):
        length = measure_length(media, limits)
        if count_frames(length) < 1:
            raise MediaError("is shorter than 25 ms; send a longer clip")
        return length.samples / length.rate


def cut_recording(
    media: Media, limits: MediaLimits = DEFAULT_LIMITS, longest_seconds: float = LONGEST_SECONDS
) -> Iterator[Segment]:
    """Decode a recording at a rate that features are made from, and cut it while doing so.

    Raises MediaError, naming the attachment, where the damage is.
    """
    with attached(media.name), open_sound(media, limits) as (rate, blocks):
        yield from cut(resample(blocks, rate), rate if rate == NARROW_RATE else RATE, longest_seconds)


def cut(blocks: Iterable[Float32], rate: int, longest_seconds: float = LONGEST_SECONDS) -> Iterator[Segment]:
    """Cut sound of one channel, in blocks of any sizes, into segments of at most so many seconds.

    A cut falls into the quietest place of the later half of what a segment may hold; where there is no pause, into the
    last pause before it; only where there is none either, into speech. How sound is split into blocks changes nothing.
    Raises RequestError for a limit that leaves no choice.
    """
    if longest_seconds < FEWEST_SECONDS:
        raise RequestError(f"a segment may be limited to {FEWEST_SECONDS:g} seconds or more, not {longest_seconds:g}")
    longest = int(longest_seconds * FRAMES_PER_SECOND)
    hop, shortest = rate // FRAMES_PER_SECOND, longest // 10
    background = _Background()
    start = 0
    held = np.empty(0, np.float32)

    def take(frames: int) -> Segment:
        nonlocal start, held
        values, held = held[: frames * hop], held[frames * hop :]
        start += len(values)
        return Segment(start - len(values), Samples(values, rate), background.holds(_powers(values, rate)))

    for block in blocks:
        held = np.concatenate([held, block]) if len(held) else block
        while len(held) >= (longest + shortest) * hop:  # What is left after the cut is no scrap.
            yield take(_place(_powers(held[: (longest + shortest) * hop], rate), shortest, longest))
    if len(held) > longest * hop:
        powers = _powers(held, rate)
        yield take(_place(powers, shortest, min(longest, len(powers) - shortest)))
    if len(held):
        yield take(longest)


def _place(powers: Levels, shortest: int, longest: int) -> int:
    """After how many frames to cut; `powers` may go on behind the longest that a segment can be."""
    levels = _quietness(powers)[shortest : longest + 1]
    low, high = levels.min(), levels.max()
    pauses = np.flatnonzero(levels <= low + PAUSE_SHARE * (high - low))
    later = (len(levels) - 1) // 2
    if high - low < PAUSE_RANGE_DB or pauses[-1] >= later:
        return shortest + later + _last_minimum(levels[later:])
    breaks = np.flatnonzero(np.diff(pauses) > 1)
    first = int(pauses[breaks[-1] + 1] if len(breaks) else pauses[0])
    return shortest + first + _last_minimum(levels[first : pauses[-1] + 1])


def _last_minimum(levels: Levels) -> int:
    """Of places that are equally quiet the last: the fewer segments, the better."""
    return len(levels) - 1 - int(levels[::-1].argmin())


def _quietness(powers: Levels) -> Levels:
    """How loud it is around each border between frames, in decibels: [frames + 1]."""
    smooth = [_smooth(powers, width) for width in WIDTHS]
    deepest = smooth[1].max() - DEEPEST_DB
    quietness: Levels = np.mean([np.maximum(levels, deepest) for levels in smooth], axis=0)
    return quietness


def _smooth(powers: Levels, width: int) -> Levels:
    """The mean power of the frames around each border, or of those that there are, in decibels of full scale."""
    sums = np.concatenate([[0.0], np.cumsum(powers)])
    borders = np.arange(len(sums))
    low, high = np.maximum(borders - width // 2, 0), np.minimum(borders + width // 2, len(powers))
    return _decibels((sums[high] - sums[low]) / (high - low))


def _powers(values: Float32, rate: int) -> Levels:
    """The power of each 10 ms, a last incomplete one included, without offset and most of the mains' hum: [frames].

    That is the power of what changes within half a millisecond, which favours 300 Hz to 1.7 kHz.
    """
    hop, step = rate // FRAMES_PER_SECOND, rate // 2000
    changes = np.zeros(-(-len(values) // hop) * hop, np.float32)
    changes[step : len(values)] = values[step:] - values[:-step]
    frames = changes.reshape(-1, hop)  # [frames, samples]
    powers: Levels = np.square(frames).mean(axis=1, dtype=np.float64)
    return powers


def _decibels(powers: Levels) -> Levels:
    levels: Levels = 10 * np.log10(np.maximum(powers, 1e-12))
    return levels


class _Background:
    """What a recording sounds like where nobody speaks, as far as it was heard."""

    def __init__(self) -> None:
        self._floor_db, self._loudest_db = np.inf, -np.inf

    def holds(self, powers: Levels) -> bool:
        """Whether the next segment is nothing but this; what comes later changes no verdict."""
        levels = _smooth(powers, WIDTHS[0])
        peak = float(levels.max())
        self._floor_db = min(self._floor_db, float(np.quantile(levels, 0.1)))
        self._loudest_db = max(self._loudest_db, peak)
        noise_db = min(self._floor_db + NOISE_RANGE_DB, self._loudest_db - SPEECH_ABOVE_NOISE_DB)
        return peak <= max(SILENCE_DB, noise_db)
