"""Sound becomes the official features, and what is measured is what is prepared."""

import struct
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.errors import MediaError, MemphiError
from memphi.inputs.audio import (
    Length,
    clip_footprint,
    count_frames,
    log_mel,
    measure_clip,
    mel_matrix,
    prepare_clip,
    resample,
)
from memphi.inputs.media import MediaLimits, audio_media, open_media
from memphi.request import Media, Samples
from tests.pure.inputs_samples import DATA, SOUND_FORMATS, config, sound, tone

AUDIO = config().audio
FORMATS = pytest.mark.parametrize(("container", "codec", "exact"), SOUND_FORMATS)


def test_the_published_features():
    media = open_media(DATA / "1272-141231-0002.wav")
    expected = np.load(DATA / "1272-141231-0002.logmel10.npz")["features"]
    prepared = prepare_clip(media, AUDIO)
    assert prepared.footprint == measure_clip(media, AUDIO)
    assert (prepared.footprint.frames, prepared.footprint.tokens) == (1332, 167)
    assert prepared.footprint.seconds == pytest.approx(13.335)
    np.testing.assert_allclose(prepared.features[:, :10], expected, atol=2e-6)


def test_telephone_sound_has_its_own_path():
    media = open_media(DATA / "1272-128104-0004-8k.wav")
    prepared = prepare_clip(media, AUDIO)
    assert prepared.footprint == measure_clip(media, AUDIO)
    assert prepared.features.shape == (2938, 80)
    centres = 700 * np.expm1(np.arange(1, 81) * np.log1p(7690 / 700) / 81)
    assert (prepared.features[:, centres > 4200] == 0).all()
    assert prepared.features[:, centres < 3000].mean() > 4


def test_the_mel_matrix():
    matrix = mel_matrix(80)
    assert matrix.sum() == pytest.approx(241.49892, abs=1e-4)
    assert matrix[0, 1] == pytest.approx(0.57565, abs=1e-5)
    assert not matrix[:, 246:].any()
    assert not matrix[:, 0].any()


@pytest.mark.parametrize(
    ("seconds", "frames", "tokens"), [(0.025, 1, 1), (1, 98, 13), (40, 3998, 500), (3600, 359998, 45000)]
)
def test_official_counts(seconds, frames, tokens):
    found = clip_footprint(count_frames(Length(int(seconds * 16000), 16000)), AUDIO)
    assert (found.frames, found.tokens, found.seconds) == (frames, tokens, pytest.approx(seconds, abs=0.01))


@FORMATS
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (48000, 2), (8000, 1), (44100, 2)])
def test_measured_is_prepared(container, codec, exact, rate, channels):
    if codec == "libopus" and rate == 44100:
        pytest.skip("opus has no 44.1 kHz")
    samples = rate * 3 // 4 + 17
    media = open_media(sound(container, codec, rate, samples, channels))
    measured = measure_clip(media, AUDIO)
    prepared = prepare_clip(media, AUDIO)
    assert prepared.footprint == measured
    assert prepared.features.shape == (measured.frames, 80)
    assert np.isfinite(prepared.features).all()
    expected = count_frames(Length(samples, rate))
    assert measured.frames == expected if exact else expected <= measured.frames < expected + 40


@FORMATS
def test_decoding_keeps_the_sound(container, codec, exact):
    prepared = prepare_clip(open_media(sound(container, codec, 16000, 16000)), AUDIO)
    original = prepare_clip(audio_media(tone(16000, 16000)[0], 16000), AUDIO)
    loud = original.features[10:90] > original.features[10:90].max() - 3
    error = np.abs(prepared.features[10:90] - original.features[10:90])[loud]
    assert np.median(error) < (0.05 if exact else 1.0)


def test_channels_are_averaged():
    left, right = tone(8000, 16000, 2)
    stereo = open_media(sound("wav", "pcm_f32le", samples=8000, channels=2))
    mixed = audio_media((left + right) / 2, 16000)
    np.testing.assert_allclose(prepare_clip(stereo, AUDIO).features, prepare_clip(mixed, AUDIO).features, atol=1e-3)


def resample_directly(values, up, down):
    """scipy.signal.resample_poly(values, up, down), from its definition."""
    half = 10 * max(up, down)
    offsets = np.arange(-half, half + 1)
    kernel = np.sinc(offsets / max(up, down)) * np.kaiser(2 * half + 1, 5.0)
    kernel *= up / kernel.sum()
    spread = np.zeros(len(values) * up)
    spread[::up] = values
    count = -(-len(values) * up // down)
    padded = np.concatenate([np.convolve(spread, kernel)[half:], np.zeros(down)])
    return padded[: count * down : down]


@given(
    rate_and_steps=st.sampled_from(
        [(48000, 1, 3), (32000, 1, 2), (44100, 160, 441), (24000, 2, 3), (12000, 4, 3), (22050, 320, 441)]
    ),
    samples=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=4),
)
@settings(deadline=None, max_examples=60)
def test_resampling_is_resample_poly_however_it_is_cut(rate_and_steps, samples, cuts):
    rate, up, down = rate_and_steps
    values = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    found = np.concatenate(list(resample(np.split(values, sorted(cuts)), rate)))
    np.testing.assert_allclose(found, resample_directly(values, up, down), atol=2e-5)


def test_resampling_keeps_what_16_khz_can_hold_and_drops_the_rest():
    time_axis = np.arange(48000) / 48000
    low, high = (np.sin(2 * np.pi * hz * time_axis).astype(np.float32) for hz in (1000, 11000))
    found = np.concatenate(list(resample([low + high], 48000)))
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(found - expected)[200:-200].max() < 0.01


@given(cuts=st.lists(st.integers(0, 3000), max_size=6), rate=st.sampled_from([8000, 16000]))
@settings(deadline=None, max_examples=30)
def test_features_do_not_depend_on_blocks(cuts, rate):
    values = tone(3000, rate)[0]
    whole = log_mel([values], rate, 80)
    parts = log_mel(np.split(values, sorted(cuts)), rate, 80)
    np.testing.assert_allclose(parts, whole, atol=1e-4)
    assert len(whole) == count_frames(Length(3000, rate))


def test_too_short_and_too_long_are_refused():
    assert measure_clip(audio_media(np.zeros(400, np.float32), 16000), AUDIO).frames == 1
    limits = MediaLimits(seconds=0.5)
    for short in (
        audio_media(np.zeros(399, np.float32), 16000, "a"),
        open_media(sound("wav", "pcm_s16le", samples=399), "a"),
    ):
        for use in (measure_clip, prepare_clip):
            with pytest.raises(MediaError, match="a: is shorter than 25 ms"):
                use(short, AUDIO)
    for long in (
        audio_media(np.zeros(8001, np.float32), 16000, "a"),
        open_media(sound("wav", "pcm_s16le", samples=8001), "a"),
    ):
        for use in (measure_clip, prepare_clip):
            with pytest.raises(MediaError, match=r"a: is longer than 0\.5 seconds"):
                use(long, AUDIO, limits)


def test_odd_rates_are_refused():
    for rate in (0, 4000, 7999, 192001, 2**31):
        with pytest.raises(MediaError, match="samples a second"):
            measure_clip(audio_media(np.zeros(9000, np.float32), rate), AUDIO)
    assert measure_clip(audio_media(np.zeros(9000, np.float32), 11025), AUDIO).frames > 0


@pytest.mark.parametrize("wrong", [np.inf, np.nan, 1e9])
def test_samples_that_are_no_numbers_are_refused(wrong):
    values = tone(8000, 16000, 2)
    values[:, 100] = wrong, -wrong
    media = open_media(sound("wav", "pcm_f32le", channels=2, values=values))
    with pytest.raises(MediaError, match="no numbers or beyond all measure"):
        prepare_clip(media, AUDIO)
    with pytest.raises(MediaError, match="no numbers or beyond all measure"):
        audio_media(values.T, 16000)
    with pytest.raises(MediaError, match="no numbers or beyond all measure"):
        prepare_clip(Media("audio", "a", Samples(values[0], 16000), ""), AUDIO)


def test_a_file_cut_short_is_heard_as_far_as_it_goes():
    whole = sound("wav", "pcm_s16le", samples=16000)
    media = open_media(whole[: len(whole) // 2])
    measured = measure_clip(media, AUDIO)
    assert 40 <= measured.frames <= 52
    assert prepare_clip(media, AUDIO).footprint == measured


def test_what_is_left_out_of_a_flac_is_damage():
    """FFmpeg goes on behind it without a word."""
    whole = sound("flac", "flac", samples=40000)
    assert measure_clip(open_media(whole), AUDIO).frames == 248
    for at in (len(whole) // 2, 7 * len(whole) // 10):
        damaged = open_media(whole[:at] + bytes(50) + whole[at + 50 :])
        for use in (measure_clip, prepare_clip):
            with pytest.raises(MediaError, match="is damaged in the middle"):
                use(damaged, AUDIO)


def titles(count):
    """An ID3 tag of so many bytes and its head."""
    return b"ID3\3\0\0" + bytes([0, 0, count >> 7, count & 127]) + b"\x90" * count


def test_joined_files_are_heard_to_the_end():
    """With titles between them."""
    alone = sound("mp3", "libmp3lame", samples=32000)
    one, two = (open_media(titles(300) + alone + titles(200) + alone * more) for more in (0, 1))
    assert measure_clip(two, AUDIO).frames > 1.8 * measure_clip(one, AUDIO).frames
    assert prepare_clip(two, AUDIO).footprint == measure_clip(two, AUDIO)


@pytest.mark.parametrize(("container", "codec"), [("flac", "flac"), ("adts", "aac"), ("mp3", "libmp3lame")])
def test_titles_may_stand_before_a_sound(container, codec):
    alone = sound(container, codec, samples=32000)
    for before in (titles(300), titles(300) + titles(7)):
        assert measure_clip(open_media(before + alone), AUDIO) == measure_clip(open_media(alone), AUDIO)


def test_samples_of_64_bits_are_refused():
    rate, data = 16000, bytes(8 * 16000)
    form = struct.pack("<HHIIHH", 1, 1, rate, 8 * rate, 8, 64)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    for use in (measure_clip, prepare_clip):
        with pytest.raises(MediaError, match="has samples of 64 bits"):
            use(open_media(b"RIFF" + struct.pack("<I", len(body)) + body), AUDIO)


def test_a_picture_only_container_is_refused():
    media = open_media(b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "silent.mp4")
    with pytest.raises(MediaError, match=r"silent\.mp4: "):
        measure_clip(media, AUDIO)


@pytest.mark.parametrize(("container", "codec"), sorted({entry[:2] for entry in SOUND_FORMATS}))
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_damage_raises_only_our_errors(container, codec, data):
    content = bytearray(sound(container, codec, 16000, 4000))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(1, len(content)))]
    started = time.process_time()
    with suppress(MemphiError):
        media = open_media(bytes(content))
        measured = measure_clip(media, AUDIO)
        assert prepare_clip(media, AUDIO).footprint == measured
    assert time.process_time() - started < 5


def test_a_comment_cannot_claim_memory():
    content = sound("wav", "pcm_s16le")
    at = content.index(b"ISFT") + 4
    media = open_media(content[:at] + b"\xff\xff\xff\x7f" + content[at + 4 :])
    with pytest.raises(MediaError, match="damaged comments"):
        measure_clip(media, AUDIO)


def test_comments_may_be_in_any_encoding():
    content = sound("wav", "pcm_s16le")
    media = open_media(content.replace(b"Lavf", b"\xe9\xff\xfe\xe8"))
    assert measure_clip(media, AUDIO).frames == 48


def test_nothing_is_printed(capfd):
    for container, codec, _ in SOUND_FORMATS:
        content = bytearray(sound(container, codec))
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(40))
        with suppress(MediaError):
            prepare_clip(open_media(bytes(content[:-30])), AUDIO)
    assert capfd.readouterr() == ("", "")
