"""Recordings are cut in their pauses, and nothing of them is lost or heard twice."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.errors import MediaError, RequestError
from memphi.inputs.audio import measure_clip
from memphi.inputs.media import MediaLimits, audio_media, open_media
from memphi.inputs.segments import LONGEST_SECONDS, cut, cut_recording, measure_recording
from tests.pure.inputs_samples import DATA, config, sound

RATE = 16_000
few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def speech(generator, seconds, rate=RATE):
    """Noise that swells and fades four times a second by 6 dB, as syllables do."""
    time = np.arange(round(seconds * rate)) / rate
    swell = 10 ** (3 * np.sin(2 * np.pi * (4 * time + generator.random())) / 20)
    return (0.1 * swell * generator.standard_normal(len(time))).astype(np.float32)


def noise(generator, samples, below_speech_db):
    return (0.1 * 10 ** (-below_speech_db / 20) * generator.standard_normal(samples)).astype(np.float32)


def conversation(generator, seconds, pauses=(0.3, 1.5), rate=RATE):
    """Sentences of up to four seconds with pauses between, and where these are: samples, [(first, last)]."""
    parts, gaps, length = [np.empty(0, np.float32)], [], 0
    while length < seconds * rate:
        parts.append(speech(generator, generator.uniform(0.4, 4), rate))
        silence = round(generator.uniform(*pauses) * rate)
        length += len(parts[-1])
        gaps.append((length, length + silence))
        parts.append(np.zeros(silence, np.float32))
        length += silence
    return np.concatenate(parts), gaps


def pieces(values, sizes):
    """The same samples in blocks of these sizes, again and again."""
    ends = itertools.accumulate(itertools.cycle(sizes))
    starts = itertools.chain([0], itertools.accumulate(itertools.cycle(sizes)))
    for start, end in zip(starts, ends, strict=False):
        if start >= len(values):
            return
        yield values[start:end]


def check_partition(segments, values, rate, longest_seconds):
    """Together the segments are the recording; each has its length within the limits."""
    assert all(segment.samples.rate == rate for segment in segments)
    np.testing.assert_array_equal(np.concatenate([s.samples.values for s in segments] or [values[:0]]), values)
    lengths = [len(segment.samples.values) for segment in segments]
    assert [segment.start for segment in segments] == list(itertools.accumulate(lengths, initial=0))[:-1]
    for segment, length in zip(segments, lengths, strict=True):
        assert segment.end_seconds - segment.start_seconds == pytest.approx(length / rate)
        assert 0 < length <= longest_seconds * rate
        assert len(segments) == 1 or length > longest_seconds * rate / 10 - rate / 50


@few
@given(seeds, st.sampled_from([8_000, 16_000]), st.integers(0, 40 * 16_000), st.floats(5, 31))
def test_every_sample_is_in_one_segment(seed, rate, samples, longest_seconds):
    generator = np.random.default_rng(seed)
    values = conversation(generator, samples / rate, rate=rate)[0][:samples]
    check_partition(list(cut([values], rate, longest_seconds)), values, rate, longest_seconds)


@few
@given(st.data())
def test_so_it_is_with_any_sound(data):
    """Silence, steady noise, a tone, an offset, clicks and squeaks one after another, in any order."""
    generator = np.random.default_rng(data.draw(seeds))
    kinds = {
        "silence": lambda n: np.zeros(n),
        "offset": lambda n: np.full(n, 0.7),
        "noise": lambda n: 0.3 * generator.standard_normal(n),
        "whisper": lambda n: 1e-4 * generator.standard_normal(n),
        "tone": lambda n: np.sin(np.arange(n) * 0.1),
        "clicks": lambda n: (generator.random(n) < 1e-4).astype(float),
    }
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(list(kinds)), st.integers(1, 20 * RATE)), max_size=5))
    values = np.concatenate([np.empty(0), *(kinds[kind](n) for kind, n in drawn)]).astype(np.float32)
    longest_seconds = data.draw(st.sampled_from([5.0, 7.77, 30.0]))
    check_partition(list(cut([values], RATE, longest_seconds)), values, RATE, longest_seconds)


@few
@given(seeds, st.lists(st.integers(1, 20 * RATE), min_size=1, max_size=4), st.floats(5, 31))
def test_the_blocks_in_which_sound_arrives_change_nothing(seed, sizes, longest_seconds):
    values, _ = conversation(np.random.default_rng(seed), 60)
    blocks = pieces(values, [5 * RATE, *sizes])  # Not scraps alone, which would take long.
    whole, again = cut([values], RATE, longest_seconds), cut(blocks, RATE, longest_seconds)
    for one, other in itertools.zip_longest(whole, again):
        assert (one.start, one.silent) == (other.start, other.silent)
        np.testing.assert_array_equal(one.samples.values, other.samples.values)


@few
@given(seeds, st.floats(8, 31), st.sampled_from([8, 15, 30, 200]), st.sampled_from([8_000, 16_000]))
def test_cuts_fall_into_pauses_however_noisy(seed, longest_seconds, below_speech_db, rate):
    generator = np.random.default_rng(seed)
    values, gaps = conversation(generator, 70, rate=rate)
    values += noise(generator, len(values), below_speech_db)
    starts = [segment.start for segment in cut([values], rate, longest_seconds)]
    assert len(starts) > 2
    for start in starts[1:]:
        assert any(first < start < last for first, last in gaps)


@few
@given(seeds, st.floats(-0.5, 0.5), st.floats(0, 0.2))
def test_an_offset_and_the_hum_of_the_mains_change_nothing(seed, offset, hum):
    values, gaps = conversation(np.random.default_rng(seed), 70)
    values += (offset + hum * np.sin(2 * np.pi * 50 * np.arange(len(values)) / RATE)).astype(np.float32)
    for segment in list(cut([values], RATE))[1:]:
        assert any(first < segment.start < last for first, last in gaps)


@few
@given(seeds, st.floats(3.5, 13), st.floats(0.3, 1.0))
def test_an_early_pause_is_better_than_a_word_cut_in_two(seed, early, pause):
    """The only pause before the limit is in the earlier half."""
    generator = np.random.default_rng(seed)
    parts = [speech(generator, early), np.zeros(round(pause * RATE), np.float32), speech(generator, 29)]
    first, second, *_ = cut([np.concatenate(parts)], RATE)
    assert len(first.samples.values) == second.start
    assert len(parts[0]) < second.start < len(parts[0]) + len(parts[1])


def test_the_longest_of_some_pauses_is_taken_in_its_middle():
    generator = np.random.default_rng(0)
    parts = []
    for seconds, pause in ((17, 0.4), (3, 1.2), (4, 0.4), (12, 0.0)):
        parts += [speech(generator, seconds), np.zeros(round(pause * RATE), np.float32)]
    values = np.concatenate(parts)
    values += noise(generator, len(values), 40)
    _, second = cut([values], RATE)
    middle = 17 + 0.4 + 3 + 0.6
    assert second.start_seconds == pytest.approx(middle, abs=0.25)


def test_a_dropout_is_no_pause():
    """A tenth of a second of zeros inside a word, beside a real pause that is not quite as quiet."""
    generator = np.random.default_rng(0)
    values = np.concatenate([speech(generator, 24), np.zeros(RATE, np.float32), speech(generator, 20)])
    values += noise(generator, len(values), 30)
    values[20 * RATE : 20 * RATE + RATE // 10] = 0
    _, second = cut([values], RATE)
    assert 24 < second.start_seconds < 25


def test_short_recordings_are_left_alone():
    values, _ = conversation(np.random.default_rng(0), LONGEST_SECONDS)
    (segment,) = cut([values[: int(LONGEST_SECONDS * RATE)]], RATE)
    assert (segment.start_seconds, segment.end_seconds, segment.silent) == (0.0, LONGEST_SECONDS, False)


def silences(parts):
    """Whether each segment of the joined parts is silent, and its seconds."""
    return [(s.silent, s.start_seconds, s.end_seconds) for s in cut([np.concatenate(parts)], RATE)]


@pytest.mark.parametrize("background_db", [200, 60, 30])
def test_what_holds_nothing_but_the_background_is_silent(background_db):
    generator = np.random.default_rng(0)
    parts = [conversation(generator, 20)[0], np.zeros(100 * RATE, np.float32), conversation(generator, 20)[0]]
    values = np.concatenate(parts)
    values += noise(generator, len(values), background_db)
    found = silences([values])
    begins, ends = len(parts[0]) / RATE, (len(parts[0]) + len(parts[1])) / RATE
    inside = [silent for silent, start, end in found if start > begins and end < ends]
    assert len(inside) >= 2
    assert all(inside)
    assert not any(silent for silent, start, end in found if start < begins - 1 or end > ends + 1)


@pytest.mark.parametrize("loudness", [1.0, 0.01, 0.001])
def test_a_soft_word_in_a_long_silence_is_heard(loudness):
    generator = np.random.default_rng(0)
    word = speech(generator, 0.4)
    parts = [np.zeros(45 * RATE, np.float32), loudness * word, np.zeros(45 * RATE, np.float32)]
    found = silences([speech(generator, 3), *parts])
    heard = [(start, end) for silent, start, end in found if not silent]
    assert any(start <= 48 and end >= 48.4 for start, end in heard)
    assert any(silent for silent, _, _ in found)


def test_noise_alone_might_be_something():
    generator = np.random.default_rng(0)
    assert not any(silent for silent, _, _ in silences([noise(generator, 100 * RATE, 10)]))
    assert all(silent for silent, _, _ in silences([np.zeros(100 * RATE, np.float32)]))


def test_real_speech_is_cut_where_nobody_speaks():
    """Cuts are at least 20 dB below the speech around them, in a reading of half a minute over the telephone."""
    media = open_media(DATA / "1272-128104-0004-8k.wav")
    segments = list(cut_recording(media, longest_seconds=8))
    values = np.concatenate([segment.samples.values for segment in segments])
    assert len(segments) >= 4
    for segment in segments[1:]:
        around = values[segment.start - 400 : segment.start + 400]
        assert np.square(around).mean() < np.square(values).mean() / 100


@pytest.mark.parametrize(("rate", "expected"), [(8_000, 8_000), (16_000, 16_000), (44_100, 16_000), (48_000, 16_000)])
def test_recordings_are_decoded_to_what_the_model_hears(rate, expected):
    media = open_media(sound("flac", "flac", rate, samples=7 * rate, channels=2))
    segments = list(cut_recording(media, longest_seconds=5))
    assert {segment.samples.rate for segment in segments} == {expected}
    assert segments[-1].end_seconds == measure_recording(media) == 7.0
    assert len(segments) == 2
    whole = audio_media(np.concatenate([segment.samples.values for segment in segments]), expected)
    audio = config().audio
    assert measure_clip(whole, audio) == measure_clip(media, audio)


def test_what_is_wrong_is_said_before_anything_is_cut():
    short = open_media(sound("wav", "pcm_s16le", RATE, samples=300))
    with pytest.raises(MediaError, match="shorter than 25 ms"):
        measure_recording(replace(short, name="short.wav"))
    with pytest.raises(MediaError, match=r"long.wav: is longer than 1 seconds"):
        measure_recording(
            open_media(sound("wav", "pcm_s16le", RATE, samples=20_000), "long.wav"), MediaLimits(seconds=1)
        )
    with pytest.raises(RequestError, match="limited to 5 seconds or more, not 4"):
        list(cut([], RATE, 4))
