"""The official names, renamed as the specification says, are exactly what transformers' model is made of."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from memphi import official
from memphi.checkpoint.names import from_converted, from_official
from memphi.config import ModelConfig
from memphi.errors import CheckpointError
from memphi.oracle import build_oracle, fill_oracle, model_weights, transformers_name
from tests.checkpoints import tiny_model
from tests.oracle import parity_config, placeholders

TENSORS = Path(__file__).parents[1] / "data" / "tensors.json.gz"


@pytest.fixture(scope="module")
def official_shapes():
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(TENSORS.read_bytes())).items()}


@pytest.fixture(scope="module")
def oracle_shapes():
    config = ModelConfig.from_folder(official.folder())
    oracle = build_oracle(config, {"image": 200010, "audio": 200011}, "meta", torch.bfloat16)
    return {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}


def test_every_official_tensor_has_its_place_in_transformers(official_shapes, oracle_shapes):
    base = {name: shape for name, shape in official_shapes.items() if ".lora_" not in name}
    renamed = {transformers_name(name): shape for name, shape in base.items()}
    assert len(renamed) == len(base) > 1500
    assert renamed | {"lm_head.weight": (200064, 3072)} == oracle_shapes


def test_both_columns_of_our_table_mean_the_same(official_shapes):
    layers = ModelConfig.from_folder(official.folder()).vision.layers
    for name in official_shapes:
        if ".lora_" not in name:
            assert from_converted(transformers_name(name), layers) == from_official(name, layers)


def test_a_missing_or_unknown_tensor_is_an_error():
    config = parity_config()
    oracle = build_oracle(config, placeholders(config), "cpu", torch.float32)
    weights = model_weights(tiny_model(config))
    with pytest.raises(CheckpointError, match=r"no place for the tensor 'model\.extra'"):
        fill_oracle(oracle, config, weights | {"model.extra": torch.zeros(1)})
    del weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 more tensors, one is 'model\.norm\.weight'"):
        fill_oracle(oracle, config, weights)
