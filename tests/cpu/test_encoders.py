"""However attachments are cut into slices, and whoever shares a call, each is embedded as it is whole and alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memphi.cache.media import MediaEntry, MediaKey
from memphi.config import AudioConfig
from memphi.engine.encoders import Encoders
from memphi.engine.step import EncodeSlice
from memphi.inputs.audio import decode_clip, prepare_clip
from memphi.inputs.image import decode_image, prepare_image
from memphi.inputs.media import audio_media, image_media
from memphi.model import audio as audio_module
from memphi.model.audio import count_windows, cut_window
from memphi.model.projector import slice_order, token_order
from tests.checkpoints import tiny_config, tiny_model
from tests.oracle import largest_difference, make_clip, make_image, make_prompt, mode_prompts, parity_config

TOLERANCE = 1e-5
SIDE = tiny_config().vision.patches
LAYOUTS = [(1, 1, None), (2, 2, (SIDE + 3, 2 * SIDE)), (1, 3, None), (3, 1, (2 * SIDE + 1, 5)), (1, 1, (1, 1))]
FRAMES = (163, 4700, 8, 8001, 4000, 163, 3993)


@pytest.fixture(scope="module")
def model():
    return tiny_model(parity_config())


@pytest.fixture(scope="module")
def prompts(model):
    """Images of every layout and clips of every length in four prompts of three modes, two heads among them."""
    images = [make_image(model.config, *layout, seed=seed) for seed, layout in enumerate(LAYOUTS)]
    clips = [make_clip(model.config, frames, seed) for seed, frames in enumerate(FRAMES)]
    return [
        make_prompt(model.config, images[:2]),
        make_prompt(model.config, clips=clips[:2]),
        make_prompt(model.config, images[2:4], clips[2:5]),
        make_prompt(model.config, images[4:], clips[5:]),
    ]


def units_of(model, prompt, span):
    if span.kind == "image":
        return prompt.images[span.index].footprint.crops
    return count_windows(prompt.clips[span.index].footprint.frames, model.config.audio)


def entries_of(model, prompts):
    """An empty entry for each attachment: (sequence, entry, span, units)."""
    entries = []
    for prompt in prompts:
        sequence = SimpleNamespace(prompt=prompt)
        for span in prompt.spans:
            key = MediaKey(f"{len(entries)}", "auto", 1, "bf16", prompt.mode.audio_head)
            units = units_of(model, prompt, span)
            entries.append((sequence, MediaEntry(key, span.tokens, 0, units), span, units))
    return entries


def slices_of(entries, most):
    """Every attachment in slices of at most so many units, in order: one list per attachment."""
    return [
        [
            EncodeSlice(sequence, entry, span.kind, span.index, first, min(most, units - first))
            for first in range(0, units, most)
        ]
        for sequence, entry, span, units in entries
    ]


def check(model, prompts, entries):
    expected = [rows for prompt in prompts for _, rows in model.encode_media(prompt)]
    for (_, entry, span, _), rows in zip(entries, expected, strict=True):
        assert entry.value.shape == (span.tokens, model.config.language.hidden_size)
        assert largest_difference(entry.value, rows) <= TOLERANCE


@pytest.mark.parametrize("most", [1, 2, 3, 100])
@torch.inference_mode()
def test_slices_in_turn_equal_the_whole(model, prompts, most):
    entries = entries_of(model, prompts)
    for slices in slices_of(entries, most):
        for piece in slices:
            Encoders(model).run([piece])
    check(model, prompts, entries)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_slices_of_several_attachments_share_a_call(model, prompts, seed):
    random = np.random.default_rng(seed)
    entries = entries_of(model, prompts)
    left = slices_of(entries, 1 + seed)
    encoders = Encoders(model)
    while left := [slices for slices in left if slices]:
        chosen = random.permutation(len(left))[: random.integers(1, len(left) + 1)]
        encoders.run([left[i].pop(0) for i in chosen])
    check(model, prompts, entries)


@torch.inference_mode()
def test_a_slice_encoded_once_more_changes_nothing(model, prompts):
    entries = entries_of(model, prompts)
    for slices in slices_of(entries, 2):
        for piece in slices:
            Encoders(model).run([piece])
            Encoders(model).run([piece])
    check(model, prompts, entries)


@torch.inference_mode()
def test_several_slices_of_one_attachment_share_a_call(model, prompts):
    entries = entries_of(model, prompts)
    Encoders(model).run([piece for slices in slices_of(entries, 1) for piece in slices])
    check(model, prompts, entries)


def test_only_a_slices_units_reach_the_towers(model, prompts, monkeypatch):
    sizes = []
    encode_crops, encode_windows = model.encode_crops, model.audio.encode_windows
    monkeypatch.setattr(model, "encode_crops", lambda *a: sizes.append(len(a[0])) or encode_crops(*a))
    monkeypatch.setattr(
        model.audio, "encode_windows", lambda w: sizes.append([len(x.frames) for x in w]) or encode_windows(w)
    )
    image, clip = (slices[1] for slices in (slices_of(entries_of(model, prompts[at : at + 1]), 1)[1] for at in (0, 1)))
    Encoders(model).run([image, clip])
    assert sizes == [1, [4700 - 3992]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("crops", [1, 2, 5])
def test_slices_decide_every_token_once(layout, crops):
    image = make_image(tiny_config(), *layout)
    order, cells = token_order([image]), (SIDE // 2) ** 2
    total = image.footprint.crops
    found = np.full(image.footprint.tokens, -1)
    for first in range(0, total, crops):
        count = min(crops, total - first)
        tokens, sources = slice_order(image, first, count)
        assert (found[tokens] == -1).all()
        separates = sources >= count * cells
        assert first == 0 or not separates.any()
        found[tokens] = np.where(separates, sources + (total - count) * cells, sources + first * cells)
    assert (found == order).all()


def audio_config(mask_tail=False):
    return AudioConfig(8, 8, 1, 1, 8, window_tokens=500, mask_tail=mask_tail)


@pytest.mark.parametrize(
    ("frames", "windows"),
    [
        (1, [(0, 1, 0, 1, 1)]),
        (4000, [(0, 4000, 0, 500, 500)]),
        (4001, [(0, 4001, 0, 500, 500), (3992, 4001, 1, 1, 500)]),
        (9000, [(0, 4008, 0, 500, 500), (3992, 8008, 1, 500, 500), (7992, 9000, 1, 125, 500)]),
    ],
)
@pytest.mark.parametrize("mask_tail", [False, True])
def test_windows_take_eight_more_frames_on_either_side(frames, windows, mask_tail):
    config = audio_config(mask_tail)
    clip = torch.arange(frames)[:, None]
    assert count_windows(frames, config) == len(windows)
    for i, (start, end, skip, tokens, rows) in enumerate(windows):
        window = cut_window(clip, i, config)
        assert window.frames.flatten().tolist() == list(range(start, end))
        assert (window.skip, window.tokens) == (skip, tokens)
        assert window.rows == (tokens if mask_tail else rows)


@pytest.mark.parametrize("values", [12, 12 * 30, 12 * 10**6])
@torch.inference_mode()
def test_how_much_is_subsampled_at_once_changes_nothing(model, monkeypatch, values):
    clips = [make_clip(model.config, frames, frames) for frames in (90, 90, 90, 4100, 25, 25, 8)]
    expected = [model.encode_clips([clip], "speech")[0] for clip in clips]
    monkeypatch.setattr(audio_module, "CONVOLVED_VALUES", values)
    monkeypatch.setattr(audio_module, "LEAST_CONVOLVED_VALUES", 1)
    for one, other in zip(model.encode_clips(clips, "speech"), expected, strict=True):
        assert largest_difference(one, other) <= TOLERANCE


@torch.inference_mode()
def test_entries_are_what_the_decoder_takes(model):
    prompt = mode_prompts(model.config)[3]
    entries = entries_of(model, [prompt])
    Encoders(model).run([piece for slices in slices_of(entries, 3) for piece in slices])
    media = [(span.start, entry.value) for _, entry, span, _ in entries]
    ids = torch.tensor(prompt.ids)
    assert largest_difference(model.embed(ids, media), model.embed(ids, model.encode_media(prompt))) <= TOLERANCE


@pytest.mark.parametrize("most", [1, 2, 100])
@torch.inference_mode()
def test_what_is_made_of_decoded_media_equals_what_is_prepared(model, most):
    """Of a picture with padding and of a clip of three windows."""
    random, config = np.random.default_rng(0), model.config
    picture = image_media(random.integers(0, 256, (3 * config.vision.crop_size - 9, 40, 3), np.uint8))
    sound = audio_media(random.standard_normal(90 * 16_000) * 0.1, 16_000)
    prepared = make_prompt(config, [prepare_image(picture, config.vision)], [prepare_clip(sound, config.audio)])
    decoded = make_prompt(config, [decode_image(picture, config.vision)], [decode_clip(sound, config.audio)])
    entries = entries_of(model, [decoded])
    assert sorted(units for *_, units in entries) == [3, 4]
    for slices in slices_of(entries, most):
        for piece in slices:
            Encoders(model).run([piece])
    check(model, [prepared], entries)


def test_no_slices_are_no_work(model):
    Encoders(model).run([])
