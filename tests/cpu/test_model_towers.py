"""How the towers' work is cut changes no feature: crops and windows in slices, sound subsampled in pieces."""

import copy
from dataclasses import replace

import pytest
import torch

from memphi.model.attention import EagerAttention, SdpaAttention
from memphi.model.phi4mm import CROP_BATCH, Phi4MM
from tests.checkpoints import tiny_model
from tests.oracle import TOLERANCE, all_logits, largest_difference, make_clip, make_image, mode_prompts, parity_config


@pytest.fixture(scope="module")
def model():
    return tiny_model(parity_config())


def with_attention(model, attention):
    other = Phi4MM(model.config, attention)
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("mode", range(4))
def test_sdpa_equals_eager(model, mode):
    prompt = mode_prompts(model.config)[mode]
    eager, sdpa = (
        all_logits(with_attention(model, backend), prompt) for backend in (EagerAttention(), SdpaAttention())
    )
    assert largest_difference(eager, sdpa) <= TOLERANCE


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 30), (5, 0), (5, 30), (33, 31)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (6, 1)])
def test_causal_attention_of_both_backends(tokens, past, heads, kv_heads):
    """Against one query at a time over the keys up to its position."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, tokens, heads, 8, generator=random)
    key, value = (torch.randn(2, past + tokens, kv_heads, 8, generator=random) for _ in range(2))
    expected = torch.empty_like(query)
    for row in range(2):
        for i in range(tokens):
            for head in range(heads):
                of = head // (heads // kv_heads)
                keys, values = (part[row, : past + i + 1, of] for part in (key, value))
                expected[row, i, head] = torch.softmax(keys @ query[row, i, head] / 8**0.5, dim=0) @ values
    for backend in (EagerAttention(), SdpaAttention()):
        assert largest_difference(backend.causal(query, key, value), expected) <= 1e-5


@torch.inference_mode()
def test_images_together_equal_each_alone(model):
    """More crops than a slice takes, with and without padding, so that slices mix images."""
    side = model.config.vision.patches
    layouts = [(1, 1, None), (2, 2, (side + 3, 2 * side)), (1, 3, None), (3, 1, (2 * side + 1, 5)), (1, 1, (1, 1))]
    images = [make_image(model.config, *layout, seed=seed) for seed, layout in enumerate(layouts)]
    assert sum(image.footprint.crops for image in images) > 2 * CROP_BATCH - 1
    for image, together in zip(images, model.encode_images(images), strict=True):
        assert together.shape == (image.footprint.tokens, model.config.language.hidden_size)
        assert largest_difference(together, model.encode_images([image])[0]) <= TOLERANCE


@torch.inference_mode()
def test_a_crop_without_padding_is_the_same_beside_padded_ones(model):
    """Of the crops here some are, and alone there are none: their patches stand elsewhere."""
    full = make_image(model.config)
    padded = make_image(model.config, valid=(3, 4), seed=1)
    features = model.vision(
        *(torch.cat([torch.from_numpy(part(i)) for i in (full, padded)]) for part in (crops, masks))
    )
    alone = model.vision(torch.from_numpy(full.crops), torch.from_numpy(full.patch_mask))
    assert largest_difference(features[:2], alone) <= TOLERANCE


class Noting(SdpaAttention):
    """Notes how many crops came at once, and how many patches each had."""

    def __init__(self):
        self.runs = []

    def full(self, query, key, value, mask):
        assert mask is None
        self.runs.append((len(query), query.shape[2]))
        return super().full(query, key, value, mask)


@pytest.mark.parametrize(
    ("valid", "padded"),
    [
        ([None, None], []),
        ([(3, 4), (1, 1)], [(1, 12), (1, 1)]),
        ([(3, 4), None, (2, 6), None, None, (4, 1), (5, 7)], [(1, 35), (2, 12), (1, 4)]),
    ],
)
@torch.inference_mode()
def test_crops_see_no_padding_and_are_what_each_is_alone(model, valid, padded):
    """In any order; each view of an image is a crop, its global view without padding."""
    noting = Noting()
    tower = with_attention(model, noting).vision
    images = [make_image(model.config, valid=part, seed=seed) for seed, part in enumerate(valid)]
    pixels, mask = (torch.cat([torch.from_numpy(part(i)) for i in images]) for part in (crops, masks))
    together = tower(pixels, mask)
    whole = len(pixels) - sum(crops for crops, _ in padded)
    assert noting.runs == [(whole, mask[0].numel()), *padded] * model.config.vision.layers
    eager = with_attention(model, EagerAttention()).vision
    for place in range(len(pixels)):
        alone = eager(pixels[place : place + 1], mask[place : place + 1])
        assert largest_difference(together[place], alone[0]) <= TOLERANCE


@pytest.mark.parametrize("valid", [None, (3, 4)])
@torch.inference_mode()
def test_what_layers_add_to_lies_in_order(model, valid):
    """A norm would copy what does not."""
    image, orders = make_image(model.config, valid=valid), []
    norms = [norm for layer in model.vision.layers for norm in (layer.attention_norm, layer.mlp_norm)]
    hooks = [norm.register_forward_hook(lambda _, args, out: orders.append(args[0])) for norm in norms]
    model.vision(torch.from_numpy(image.crops), torch.from_numpy(image.patch_mask))
    for hook in hooks:
        hook.remove()
    assert len(orders) == 2 * model.config.vision.layers
    assert all(x.is_contiguous() for x in orders)


@torch.inference_mode()
def test_a_mask_on_all_crops_is_the_definition(model):
    """Every patch of crops with and without padding through one mask, as the definition has it, layer by layer."""
    valid = [None, (3, 4), None, (2, 2), (5, 7), (1, 3)]
    images = [make_image(model.config, valid=part, seed=seed) for seed, part in enumerate(valid)]
    pixels, mask = (torch.cat([torch.from_numpy(part(i)) for i in images]) for part in (crops, masks))
    tower, seen = model.vision, mask.flatten(1)
    x = tower.patch_embedding(pixels).flatten(2).transpose(1, 2)
    x = x + tower.position_embedding(torch.from_numpy(tower._positions(mask.numpy())))
    for layer in tower.layers:
        attention, normed = layer.attention, layer.attention_norm(x)
        parts = (
            part(normed).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        mixed = EagerAttention().full(*parts, seen[:, None, None, :]).transpose(1, 2).flatten(2)
        x = x + attention.out(mixed * seen[:, :, None])
        x = x + layer.transform(x)
    pooled = mask[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    features = model.vision(pixels, mask)
    assert (pooled & ~seen).any()
    assert largest_difference(features[pooled], x[pooled]) <= TOLERANCE
    assert not features[~pooled].any()


def crops(image):
    return image.crops


def masks(image):
    return image.patch_mask


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 50])
@torch.inference_mode()
def test_subsampling_in_pieces_equals_the_whole(model, chunk_tokens):
    for frames in (*range(1, 35), 63, 64, 65, 199, 400, 401):
        x = torch.randn(2, frames, model.config.audio.mel_bins, generator=torch.Generator().manual_seed(frames))
        whole = model.audio.subsampling(x, chunk_tokens=10**6)
        assert whole.shape == (2, -(-frames // 8), model.config.audio.hidden_size)
        assert largest_difference(model.audio.subsampling(x, chunk_tokens), whole) <= 1e-5


@torch.inference_mode()
def test_long_sound_is_windows_of_500_tokens_that_do_not_see_each_other(model):
    """Beyond eight frames of a window's border, changing one window's sound leaves the others' features alone."""
    clip = torch.from_numpy(make_clip(model.config, 3 * 4000).features)
    changed = clip.clone()
    changed[4100:7900] += 1
    before, after = model.audio([clip])[0], model.audio([changed])[0]
    same = (before == after).all(dim=1)
    assert before.shape[0] == 1500
    assert same[:500].all()
    assert same[1000:].all()
    assert not same[500:1000].any()


@torch.inference_mode()
def test_the_conformers_sums_are_not_rounded(model):
    """Of a model in bf16 they are fp32, and features are bf16 again."""
    clip = torch.from_numpy(make_clip(model.config, 400).features)
    audio, rounded = model.audio, copy.deepcopy(model.audio).bfloat16()
    exact = copy.deepcopy(rounded).float()
    sums = []
    for layer in rounded.layers:
        layer.attention_norm.register_forward_hook(lambda _, args, out: sums.append((args[0].dtype, out.dtype)))
    (features,) = rounded([clip])
    assert sums == [(torch.float32, torch.bfloat16)] * len(audio.layers)
    assert features.dtype == torch.bfloat16
    assert relative(features, exact([clip])[0]) < 0.01


def relative(real, wanted):
    return float((real.float() - wanted).norm() / wanted.norm())


class Watching(SdpaAttention):
    """Keeps the biases that it was given."""

    def __init__(self):
        self.biases = []

    def full(self, query, key, value, mask):
        self.biases.append(mask)
        return super().full(query, key, value, mask)


@pytest.mark.parametrize("frames", [(4000,), (8000, 4000), (90, 4000, 37), (8, 8), (4100, 90)])
@torch.inference_mode()
def test_windows_of_all_clips_share_one_bias_that_no_kernel_copies(model, frames):
    """It is made once for all layers, it is each head's own by distance, and its rows begin where kernels want them."""
    watching = Watching()
    encoder = with_attention(model, watching).audio
    clips = [torch.from_numpy(make_clip(model.config, n, n).features) for n in frames]
    lengths = [min(500, -(-n // 8)) for n in frames if n <= 4000] + [500] * sum(2 for n in frames if n > 4000)
    encoder(clips)
    assert len(watching.biases) == model.config.audio.layers
    assert len({bias.data_ptr() for bias in watching.biases}) == 1
    bias, longest = watching.biases[0], max(lengths)
    assert bias.shape == (len(lengths) if len(set(lengths)) > 1 else 1, model.config.audio.heads, longest, longest)
    assert bias.stride(-1) == 1
    assert all(step % 16 == 0 for step in bias.stride()[:-1])
    table, reach = encoder.relative_bias.weight, model.config.audio.bias_distance
    ends = sorted((bias[:, 0, 0] > -torch.inf).sum(-1).tolist())
    assert ends == sorted(lengths if len(bias) > 1 else [longest])
    for query, key in [(0, 0), (0, longest - 1), (longest - 1, 0), (longest // 2, longest // 3)]:
        for row in bias[:, :, query, key]:
            place = min(max(key - query, -reach), reach - 1) + reach
            assert torch.equal(row, table[place]) or (row == -torch.inf).all()


@pytest.mark.parametrize("window_batch", [1, 3, 100])
@torch.inference_mode()
def test_windows_in_slices_equal_all_at_once(model, window_batch):
    clips = [torch.from_numpy(make_clip(model.config, frames, frames).features) for frames in (50, 50, 8100, 9, 4000)]
    for one, other in zip(model.audio(clips), model.audio(clips, window_batch), strict=True):
        assert largest_difference(one, other) <= TOLERANCE


@torch.inference_mode()
def test_a_windows_size_is_the_configs(model):
    config = replace(model.config, audio=replace(model.config.audio, window_tokens=20))
    small = tiny_model(config)
    small.load_state_dict(model.state_dict())
    clip = make_clip(config, 8 * 40)
    first, second = torch.from_numpy(clip.features[:168]), torch.from_numpy(clip.features)
    assert largest_difference(small.audio([second])[0][:20], model.audio([second])[0][:20]) > 1e-3
    assert largest_difference(small.audio([second])[0][:20], small.audio([first])[0][:20]) <= TOLERANCE


def test_nothing_to_encode_is_nothing(model):
    assert model.encode_images([]) == []
    assert model.encode_clips([], "speech") == []
