"""Clips where memphi's answer is its own: company never counts, and the end of a long clip can be masked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from memphi.model.audio import WINDOW_BATCH
from memphi.model.phi4mm import Phi4MM
from tests.checkpoints import tiny_model
from tests.oracle import TOLERANCE, Oracle, largest_difference, make_clip, parity_config

VISIBLE = 1e-3
LENGTHS = (163, 1, 4100, 640, 8, 77, 4001, 12, 900, 31, 250)


@pytest.fixture(scope="module")
def model():
    return tiny_model(parity_config())


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


def encode(model, clips, head="speech"):
    with torch.inference_mode():
        return model.encode_clips(clips, head)


@pytest.mark.parametrize("head", ["speech", "vision"])
def test_clips_together_equal_each_alone(model, oracle, head):
    clips = [make_clip(model.config, frames, seed) for seed, frames in enumerate(LENGTHS)]
    assert len(clips) > WINDOW_BATCH
    for clip, together in zip(clips, encode(model, clips, head), strict=True):
        assert largest_difference(together, encode(model, [clip], head)[0]) <= TOLERANCE
        assert largest_difference(together, oracle.embed_clip(clip, head)) <= TOLERANCE


def test_the_heads_differ(model):
    clip = make_clip(model.config, 50)
    assert largest_difference(encode(model, [clip], "speech")[0], encode(model, [clip], "vision")[0]) > VISIBLE


@pytest.mark.parametrize("garbage", [1e4, float("nan")])
def test_garbage_in_company_changes_nothing(model, garbage):
    clip, other = make_clip(model.config, 163), make_clip(model.config, 640)
    spoilt = replace(other, features=np.full_like(other.features, garbage))
    assert torch.equal(encode(model, [clip, other])[0], encode(model, [clip, spoilt])[0])


def test_transformers_lets_company_change_a_clip(model, oracle):
    """Why clips of different lengths are compared one by one: its mask is added to the scores as 0 and 1."""
    clips = [make_clip(model.config, 163), make_clip(model.config, 640)]
    mask = torch.arange(640)[None] < torch.tensor([[163], [640]])
    together = oracle.clip_features(clips, mask)[0, :21]
    alone = oracle.clip_features(clips[:1])[0]
    assert largest_difference(together, alone) > VISIBLE


def masked(model: Phi4MM) -> Phi4MM:
    """The same weights with the tail of a long clip's last window masked."""
    config = replace(model.config, audio=replace(model.config.audio, mask_tail=True))
    other = tiny_model(config)
    other.load_state_dict(model.state_dict())
    return other


def literal_tail(oracle: Oracle, clip) -> torch.Tensor:
    """The last window's real tokens, run through transformers' conformer layers without any padding."""
    encoder = oracle.audio_embed.encoder
    with torch.inference_mode():
        frames = torch.from_numpy(clip.features)[None]
        tokens, _ = encoder.embed(encoder.encoder_embedding(frames), None)
        x = tokens[:, tokens.shape[1] // 500 * 500 :]
        bias = encoder.relative_attention_bias_layer(x)
        for layer in encoder.encoders:
            x = layer(x, bias)
    return x[0]


@pytest.mark.parametrize("frames", [4001, 4498, 9000])
def test_a_long_clips_tail_is_masked_only_when_asked(model, oracle, frames):
    clip = make_clip(model.config, frames)
    whole = clip.footprint.tokens // 500 * 500
    plain, tail_masked = (one.audio([torch.from_numpy(clip.features)])[0] for one in (model, masked(model)))
    assert largest_difference(plain, oracle.clip_features([clip])[0]) <= TOLERANCE
    assert largest_difference(plain[:whole], tail_masked[:whole]) <= TOLERANCE
    assert largest_difference(tail_masked[whole:], literal_tail(oracle, clip)) <= TOLERANCE
    assert largest_difference(plain[whole:], tail_masked[whole:]) > VISIBLE


@pytest.mark.parametrize("frames", [50, 4000, 8000])
def test_clips_without_a_tail_do_not_depend_on_the_switch(model, frames):
    clip = make_clip(model.config, frames)
    assert torch.equal(encode(model, [clip])[0], encode(masked(model), [clip])[0])
