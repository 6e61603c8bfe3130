"""Checkpoints in the official layout: written, read back, refused when wrong; memory while they are read."""

import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memphi import official
from memphi.checkpoint.headers import list_tensors, read_header
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.names import from_official, official_name
from memphi.checkpoint.random import random_model
from memphi.checkpoint.reader import fill_tensors
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import ModelConfig
from memphi.errors import CheckpointError
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.phi4mm import Phi4MM
from tests.checkpoints import STOP_TOKEN_IDS, tiny_checkpoint, tiny_config, tiny_model, variants, write_tokenizer

TOWER = "model.embed_tokens_extend.image_embed.img_processor"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("official") / "model")


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def edit(shard, change):
    """Rewrite one shard with the official library after `change` has been at its tensors."""
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def first_shard(folder):
    return min(folder.glob("*.safetensors"))


def merge(folder):
    """Put all shards into one file without an index."""
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


# The official model


def test_our_modules_have_exactly_the_official_names_and_shapes():
    stored = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "tensors.json.gz").read_bytes()))
    config = ModelConfig.from_folder(official.folder())
    with torch.device("meta"):
        state = Phi4MM(config).state_dict()
    renamed = {from_official(name, config.vision.layers): shape for name, shape in stored.items()}
    del renamed[None]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == renamed


# Written and read back


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_is_written_is_read_back_bit_for_bit(name, dtype, tmp_path):
    config = variants()[name]
    folder = tiny_checkpoint(tmp_path / "model", config, dtype, seed=3)
    loaded = load_model(folder, "cpu", dtype)
    assert loaded.config == config
    assert_same_weights(loaded, tiny_model(config, dtype, seed=3))


def test_a_model_of_mixed_dtypes_is_read_back_bit_for_bit(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    model.audio.float()
    write_checkpoint(model, tmp_path / "model")
    assert_same_weights(load_model(tmp_path / "model", "cpu", torch.float32), model.float())
    assert len(load_file(first_shard(tmp_path / "model"))) == len(model.state_dict())


def test_the_loaded_model_is_ready_for_inference(written):
    model = load_model(written, "cpu", torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32


def test_a_shard_is_what_the_official_library_would_read(written):
    index = json.loads((written / "model.safetensors.index.json").read_text())
    state = tiny_model(dtype=torch.bfloat16).state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert len(set(index["weight_map"].values())) > 1
    for ours, tensor in state.items():
        with safe_open(written / index["weight_map"][official_name(ours)], "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert torch.equal(shard.get_tensor(official_name(ours)), tensor)


def test_shards_may_come_in_any_order_and_without_index(folder):
    expected = load_model(folder, "cpu", torch.bfloat16)
    shards = sorted(folder.glob("*.safetensors"))
    for number, shard in enumerate(reversed(shards)):
        shard.rename(folder / f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert_same_weights(load_model(folder, "cpu", torch.bfloat16), expected)


def test_one_file_without_index_is_a_checkpoint_too(folder):
    expected = load_model(folder, "cpu", torch.bfloat16)
    merge(folder)
    assert_same_weights(load_model(folder, "cpu", torch.bfloat16), expected)


def test_unused_vision_tensors_are_skipped(folder):
    shard = merge(folder)
    unused = {
        f"{TOWER}.encoder.layers.2.mlp.fc1.weight": torch.zeros(3),
        f"{TOWER}.post_layernorm.bias": torch.zeros(2),
        f"{TOWER}.head.probe": torch.zeros(1),
    }
    edit(shard, lambda tensors: tensors.update(unused))
    load_model(folder, "cpu", torch.bfloat16)


def test_progress_counts_every_byte_once(written):
    seen = []
    load_model(written, "cpu", torch.float32, progress=lambda done, total: seen.append((done, total)))
    totals = {total for _, total in seen}
    assert totals == {sum(tensor.end - tensor.start for tensor in list_tensors(written))}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]


def test_a_written_folder_holds_configs_and_tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    model = tiny_model()
    write_checkpoint(model, tmp_path / "new" / "model", tmp_path / "tokenizer")
    assert ModelConfig.from_folder(tmp_path / "new" / "model") == model.config
    assert json.loads((tmp_path / "new" / "model" / "config.json").read_text())["torch_dtype"] == "float32"
    assert Tokenizer.from_folder(tmp_path / "new" / "model").end_id == STOP_TOKEN_IDS[0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_packed_tokenizer_is_unpacked(tmp_path):
    write_checkpoint(tiny_model(), tmp_path / "model", official.folder())
    packed = gzip.decompress((official.folder() / "tokenizer.json.gz").read_bytes())
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == packed


# Writing that fails


def test_a_folder_in_use_is_not_written_into(folder):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_checkpoint(tiny_model(), folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_empty_folder_is_written_into(tmp_path):
    (tmp_path / "model").mkdir()
    write_checkpoint(tiny_model(), tmp_path / "model")
    load_model(tmp_path / "model", "cpu", torch.float32)


@pytest.mark.parametrize("writes", range(6))
def test_an_interrupted_run_leaves_no_folder(tmp_path, monkeypatch, writes):
    calls = iter(range(100))

    def fail(_):
        if next(calls) == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tiny_model(), tmp_path / "model", shard_bytes=300_000)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_no_folder(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_checkpoint(tiny_model(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "rest").touch()
    write_checkpoint(tiny_model(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "rest").exists()


# Reading what is wrong


def refuse(folder, *words):
    """Loading must fail before the weights' memory is taken, with every one of the words in the message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("allocated"))
        with pytest.raises(CheckpointError) as caught:
            load_model(folder, "cpu", torch.bfloat16)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_a_missing_tensor_is_named(folder):
    shard = merge(folder)
    edit(shard, lambda tensors: tensors.pop("model.norm.weight"))
    refuse(folder, str(folder), "model.norm.weight")


def test_an_unknown_tensor_is_named(folder):
    shard = merge(folder)
    edit(shard, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    refuse(folder, shard.name, "model.extra.weight")


def test_a_tensor_of_a_layer_too_many_is_named(folder):
    shard = merge(folder)
    edit(shard, lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.zeros(48)}))
    refuse(folder, shard.name, "model.layers.2.input_layernorm.weight", "config.json")


def test_a_wrong_shape_is_named(folder):
    shard = merge(folder)
    edit(shard, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    refuse(folder, shard.name, "model.norm.weight", "[47]", "[48]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_a_wrong_dtype_is_named(folder, dtype):
    shard = merge(folder)
    edit(shard, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48).to(dtype)}))
    refuse(folder, shard.name, "model.norm.weight", "BF16, F16, F32")


def test_a_truncated_shard_is_named(folder):
    shard = first_shard(folder)
    content = shard.read_bytes()
    for length in (0, 7, 8, 200, len(content) - 1):
        shard.write_bytes(content[:length])
        refuse(folder, shard.name, "truncated")


def test_a_shard_with_a_tail_is_refused(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes() + b"\0")
    refuse(folder, shard.name, "longer than its header says")


def test_a_missing_shard_is_named(folder):
    shard = first_shard(folder)
    shard.unlink()
    refuse(folder, shard.name, "is missing", "tensors")
    (folder / "model.safetensors.index.json").unlink()
    refuse(folder, shard.name, "is missing")


def test_a_tensor_in_two_shards_is_refused(folder):
    shard = merge(folder)
    save_file({"model.norm.weight": torch.zeros(48)}, folder / "other.safetensors")
    refuse(folder, "model.norm.weight", shard.name, "other.safetensors")


@pytest.mark.parametrize(
    "target", ["../model.safetensors", "/model.safetensors", "model.bin", 3, None, "a\0.safetensors"]
)
def test_an_index_may_name_only_shards_beside_it(folder, target):
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(value))
    refuse(folder, index.name, "model.norm.weight", "expected a *.safetensors file")


def test_an_index_that_disagrees_with_the_shards_is_refused(folder):
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    owner = value["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(value))
    refuse(folder, index.name, "model.norm.weight", owner, "no shard")
    other = next(shard for shard in value["weight_map"].values() if shard != owner)
    value["weight_map"]["model.norm.weight"] = other
    index.write_text(json.dumps(value))
    refuse(folder, index.name, "model.norm.weight", owner, other)


def test_a_pickle_is_refused_with_a_reason(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuse(folder, "pytorch_model.bin", "pickle", "*.safetensors only")


def test_folders_without_weights_are_refused(folder, tmp_path):
    for path in folder.glob("model*"):
        path.unlink()
    refuse(folder, "holds no *.safetensors")
    refuse(tmp_path / "nowhere", "does not exist")


def test_a_header_length_beyond_the_file_or_all_reason_is_refused(folder):
    shard = merge(folder)
    content = shard.read_bytes()
    for length in (len(content), 2**24 + 1, 2**63, 2**64 - 1):
        shard.write_bytes(length.to_bytes(8, "little") + content[8:])
        refuse(folder, shard.name, "truncated or no safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0]},
        {"dtype": "BF16", "shape": [-2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [2.0], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [1] * 9, "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [2**64], "data_offsets": [0, 2**65]},
        {"dtype": "BF16", "shape": [2], "data_offsets": [4, 0]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]},
        {"dtype": ["BF16"], "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "BF16", "shape": [3], "data_offsets": [0, 4]},
        {"shape": [2], "data_offsets": [0, 4]},
        [],
        None,
    ],
)
def test_a_damaged_header_entry_is_named(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'x'"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"\xff{}", b"[" * 100_000, b"1" * 5000, b'{"x":1,"x":1}'])
def test_a_damaged_header_is_refused(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"a\.safetensors has a damaged header"):
        read_header(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(folder):
    tensors = list_tensors(folder)
    first_shard(folder).write_bytes(b"")
    pairs = [(tensor, torch.empty(tensor.shape, dtype=torch.bfloat16)) for tensor in tensors]
    with pytest.raises(CheckpointError, match="ends within tensor"):
        fill_tensors(pairs, torch.device("cpu"), None)


# Memory


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_reading_holds_one_piece_of_a_tensor_and_not_the_tensor(tmp_path):
    items = 75_000_000
    save_file({"x": torch.zeros(items)}, tmp_path / "a.safetensors")  # 300 MB
    # A mapped file takes the tensor's place on a device: what is written to it is not anonymous memory.
    target = torch.from_file(str(tmp_path / "target"), shared=True, size=items, dtype=torch.bfloat16)
    before, seen = anonymous_bytes(), []
    pairs = [(stored, target) for stored in read_header(tmp_path / "a.safetensors")]
    fill_tensors(pairs, torch.device("cpu"), lambda *_: seen.append(anonymous_bytes()))
    assert max(seen) - before < 64 * 2**20


# Random weights


def test_random_weights_depend_on_seed_and_name_alone():
    assert_same_weights(tiny_model(seed=1), tiny_model(seed=1))
    one, two = tiny_model(seed=1).state_dict(), tiny_model(seed=2).state_dict()
    assert not any(torch.equal(tensor, two[name]) for name, tensor in one.items())
    deeper = replace(tiny_config(), language=replace(tiny_config().language, layers=3))
    more = tiny_model(deeper, seed=1).state_dict()
    assert all(torch.equal(tensor, more[name]) for name, tensor in one.items())


def test_random_weights_leave_no_tensor_unset():
    model = random_model(tiny_config(), "cpu", torch.float32)
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        assert tensor.std() > 0, name
    assert 8 < model.audio.mean.mean() < 12
    assert model.audio.inverse_deviation.min() > 0.2


def test_random_towers_of_the_official_depth_keep_their_features_apart():
    # Alike features would hide a mix-up of patches or moments from every comparison on random weights.
    config = tiny_config()
    deep = replace(config, vision=replace(config.vision, layers=26), audio=replace(config.audio, layers=24))
    model = random_model(deep, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    crops = torch.randn(1, 3, 112, 112, generator=generator)
    patches = model.vision(crops, torch.ones(1, 8, 8, dtype=torch.bool))[0]
    moments = model.audio([10 + 3 * torch.randn(160, 80, generator=generator)])[0]
    for features in (patches, moments):
        alike = torch.nn.functional.cosine_similarity(features[:-1], features[1:], dim=-1)
        assert alike.mean() < 0.9
