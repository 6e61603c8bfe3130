"""memphi's logits equal transformers' in fp32 on random weights, wherever the two agree by design."""

import pytest

from tests.checkpoints import tiny_model, variants
from tests.oracle import (
    TOLERANCE,
    Oracle,
    all_logits,
    largest_difference,
    make_clip,
    make_image,
    make_prompt,
    parity_config,
)

SHAPES = sorted(variants())


@pytest.fixture(scope="module", params=SHAPES)
def pair(request):
    model = tiny_model(parity_config(variants()[request.param]))
    return model, Oracle(model)


def check(pair, **contents):
    """Compare every logit of a prompt; the oracle's must not be all alike."""
    model, oracle = pair
    prompt = make_prompt(model.config, **contents)
    expected = oracle.logits(prompt)
    assert expected.std() > 0.5
    assert largest_difference(all_logits(model, prompt), expected) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 17, 130])
def test_text(pair, tokens):
    check(pair, text_tokens=tokens)


@pytest.mark.parametrize(
    ("rows", "columns", "valid"),
    [(1, 1, None), (2, 1, None), (1, 1, (4, 6)), (3, 2, (22, 14)), (1, 3, (2, 24)), (2, 2, (10, 16))],
)
def test_one_image(pair, rows, columns, valid):
    check(pair, images=[make_image(pair[0].config, rows, columns, valid)])


def test_images_of_different_grids(pair):
    config = pair[0].config
    images = [make_image(config, 1, 1, seed=1), make_image(config, 2, 3, (14, 22), 2), make_image(config, 3, 1, seed=3)]
    check(pair, images=images)


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 16, 17, 98, 163])
def test_one_clip(pair, frames):
    check(pair, clips=[make_clip(pair[0].config, frames)])


def test_clips_of_one_length(pair):
    check(pair, clips=[make_clip(pair[0].config, 77, seed) for seed in range(3)])


def test_clips_of_different_lengths_equal_those_transformers_encodes_alone(pair):
    model, oracle = pair
    prompt = make_prompt(model.config, clips=[make_clip(model.config, frames, frames) for frames in (9, 120, 58)])
    embeddings = [(span.start, oracle.embed_clip(prompt.clips[span.index], "speech")) for span in prompt.spans]
    expected = oracle.logits_with(prompt, embeddings)
    assert largest_difference(all_logits(model, prompt), expected) <= TOLERANCE


def test_images_and_clips_together(pair):
    config = pair[0].config
    images = [make_image(config, 1, 2, (8, 12), 1), make_image(config, 2, 1, seed=2)]
    check(pair, images=images, clips=[make_clip(config, 40, 3), make_clip(config, 40, 4)])


@pytest.mark.parametrize("frames", [3992, 4000, 4001, 4498, 8010])
def test_clips_of_more_than_one_window(pair, frames):
    check(pair, clips=[make_clip(pair[0].config, frames)])


@pytest.mark.parametrize("tokens", [62, 63, 64, 65, 66])
def test_both_rope_regimes_of_a_short_context(tokens):
    model = tiny_model(parity_config(short_tokens=64))
    check((model, Oracle(model)), text_tokens=tokens)


@pytest.mark.parametrize("tokens", range(4095, 4101))
def test_both_rope_regimes_at_the_official_length(long_pair, tokens):
    check(long_pair, text_tokens=tokens)


@pytest.fixture(scope="module")
def long_pair():
    model = tiny_model(parity_config())
    return model, Oracle(model)


def test_a_prompt_with_media_in_the_long_regime():
    model = tiny_model(parity_config(short_tokens=64))
    pair = (model, Oracle(model))
    check(pair, images=[make_image(model.config, 1, 2)], clips=[make_clip(model.config, 200)])


def test_the_check_can_fail():
    model = tiny_model(parity_config())
    oracle = Oracle(model)
    model.vision.layers[0].mlp.up.weight[0, 0] += 0.1
    prompt = make_prompt(model.config, images=[make_image(model.config)])
    assert largest_difference(all_logits(model, prompt), oracle.logits(prompt)) > TOLERANCE
