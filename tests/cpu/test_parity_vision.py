"""Images where memphi follows the official code and transformers does not: position buckets and masked queries.

The official behaviour is written out once more here, slowly and literally, from the specification (4.1, 4.2).
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from memphi.config import VisionConfig
from memphi.oracle import model_weights
from tests.checkpoints import tiny_model
from tests.oracle import (
    TOLERANCE,
    Oracle,
    all_logits,
    largest_difference,
    make_image,
    make_prompt,
    parity_config,
)

EMBED = "model.embed_tokens_extend.image_embed."
BUCKETS = json.loads((Path(__file__).parents[1] / "data" / "navit_position_buckets.json").read_text())
VISIBLE = 1e-3
"""A difference that rounding cannot make."""


@pytest.fixture(scope="module")
def model():
    """A tower with the official 32 x 32 patches, of two pixels each."""
    vision = VisionConfig(hidden_size=12, intermediate_size=20, layers=2, heads=2, crop_size=64, patch_size=2)
    return tiny_model(replace(parity_config(), vision=vision))


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


def literal_attention(x, weights, prefix, heads, valid):
    """Attention among valid patches only, zeros for the others: what flash attention does to unpadded rows."""
    part = {name: linear(x, weights, f"{prefix}{name}_proj") for name in "qkv"}
    mixed = torch.zeros_like(x)
    size = x.shape[1] // heads
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        query, key, value = (part[name][valid, columns] for name in "qkv")
        mixed[valid, columns] = torch.softmax(query @ key.T * size**-0.5, dim=-1) @ value
    return linear(mixed, weights, f"{prefix}out_proj")


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def literal_features(config, weights, crop, mask):
    """One crop [3, 64, 64] and its mask [32, 32] to patch features [1024, hidden]."""
    tower = f"{EMBED}img_processor."
    side, size = config.patches, config.patch_size
    filters = weights[f"{tower}embeddings.patch_embedding.weight"].flatten(1)
    patches = [
        crop[:, r * size : (r + 1) * size, c * size : (c + 1) * size].flatten()
        for r in range(side)
        for c in range(side)
    ]
    x = torch.stack(patches) @ filters.T + weights[f"{tower}embeddings.patch_embedding.bias"]
    rows, columns = BUCKETS[str(int(mask[:, 0].sum()))], BUCKETS[str(int(mask[0].sum()))]
    ids = [side * rows[r] + columns[c] if mask[r, c] else 0 for r in range(side) for c in range(side)]
    x = x + weights[f"{tower}embeddings.position_embedding.weight"][ids]
    valid = torch.from_numpy(mask.flatten())
    for i in range(config.layers):
        layer = f"{tower}encoder.layers.{i}."
        normed = norm(x, weights, f"{layer}layer_norm1")
        x = x + literal_attention(normed, weights, f"{layer}self_attn.", config.heads, valid)
        inner = F.gelu(linear(norm(x, weights, f"{layer}layer_norm2"), weights, f"{layer}mlp.fc1"), approximate="tanh")
        x = x + linear(inner, weights, f"{layer}mlp.fc2")
    return x


def literal_pool(features, side):
    grid = features.view(side, side, -1)
    return torch.stack(
        [torch.stack([grid[r : r + 2, c : c + 2].mean((0, 1)) for c in range(0, side, 2)]) for r in range(0, side, 2)]
    )  # [side / 2, side / 2, hidden]


def literal_embedding(model, image):
    """One image of one crop beside the global view, row by row (spec 4.2)."""
    config, weights = model.config.vision, model_weights(model)
    masks = image.patch_mask
    overview, crop = (
        literal_pool(literal_features(config, weights, torch.from_numpy(image.crops[i]), masks[i]), config.patches)
        for i in range(2)
    )
    rows = []
    half = masks[1][::2, ::2]
    for r in range(int(half[:, 0].sum())):
        rows += [*crop[r, : int(half[0].sum())], weights[f"{EMBED}sub_GN"].flatten()]
    rows.append(weights[f"{EMBED}glb_GN"].flatten())
    for r in range(config.patches // 2):
        rows += [*overview[r], weights[f"{EMBED}sub_GN"].flatten()]
    hidden = F.gelu(linear(torch.stack(rows), weights, f"{EMBED}img_projection.0"))
    return linear(hidden, weights, f"{EMBED}img_projection.2")


def our_features(model, image):
    with torch.inference_mode():
        return model.vision(torch.from_numpy(image.crops), torch.from_numpy(image.patch_mask))


def our_embedding(model, image):
    with torch.inference_mode():
        return model.encode_images([image])[0]


@pytest.mark.parametrize("valid", [(32, 32), (20, 24), (31, 32), (32, 17), (13, 7), (1, 32), (2, 1), (24, 3)])
def test_an_image_equals_the_specification_read_literally(model, valid):
    image = make_image(model.config, valid=valid)
    assert largest_difference(our_embedding(model, image), literal_embedding(model, image)) <= TOLERANCE


@pytest.mark.parametrize("count", range(1, 33))
def test_valid_patches_equal_transformers_except_where_its_buckets_differ(model, oracle, count):
    image = make_image(model.config, valid=(count, 32))
    valid = torch.from_numpy(image.patch_mask.reshape(2, -1))
    difference = largest_difference(our_features(model, image)[valid], oracle.patch_features(image)[valid])
    assert difference > VISIBLE if count in (20, 24) else difference <= TOLERANCE


@pytest.mark.parametrize(("valid", "same"), [((30, 32), True), ((12, 8), True), ((31, 32), False), ((30, 9), False)])
def test_masked_queries_are_zero_where_transformers_lets_them_see(model, oracle, valid, same):
    prompt = make_prompt(model.config, [make_image(model.config, valid=valid)])
    difference = largest_difference(all_logits(model, prompt), oracle.logits(prompt))
    assert difference <= TOLERANCE if same else difference > VISIBLE


def test_what_lies_behind_the_mask_matters_only_to_windows_it_shares(model):
    """Pixels under masked patches reach the result through mixed 2 x 2 windows alone, as in the official code."""
    for valid, same in (((12, 20), True), ((11, 20), False)):
        image = make_image(model.config, valid=valid)
        shown = image.patch_mask.repeat(2, axis=1).repeat(2, axis=2)[:, None]
        changed = replace(image, crops=np.where(shown, image.crops, 5.0).astype(np.float32))
        difference = largest_difference(our_embedding(model, image), our_embedding(model, changed))
        assert difference == 0 if same else difference > VISIBLE
