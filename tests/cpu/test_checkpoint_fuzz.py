"""Broken checkpoints: whatever is damaged, loading works or ends in one CheckpointError, soon and in little memory."""

import json
import os
import shutil
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memphi.checkpoint.headers import INDEX_NAME, list_tensors
from memphi.checkpoint.loader import load_model
from memphi.errors import CheckpointError
from tests.checkpoints import tiny_checkpoint

FUZZ = settings(deadline=5000, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["BF16", "F32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.fixture
def folder(written, tmp_path):
    return tmp_path / "model"


def restore(written, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written, folder)


def loads(folder):
    try:
        load_model(folder, "cpu", torch.bfloat16)
    except CheckpointError:
        return False
    return True


def files(folder):
    return [*sorted(folder.glob("*.safetensors")), folder / INDEX_NAME]


@FUZZ
@given(data=st.data())
def test_truncated_anywhere(written, folder, data):
    restore(written, folder)
    path = data.draw(st.sampled_from(files(folder)))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    # Only the index may lose its last byte, a line's end.
    assert loads(folder) == (path.name == INDEX_NAME and len(path.read_bytes()) == len(content) - 1)


@FUZZ
@given(data=st.data())
def test_bytes_of_a_header_or_of_the_index_changed(written, folder, data):
    restore(written, folder)
    path = data.draw(st.sampled_from(files(folder)))
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for place in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    loads(folder)


@FUZZ
@given(length=st.integers(0, 2**64 - 1), tail=st.binary(max_size=64))
def test_any_header_length(tmp_path, length, tail):
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + tail)
    tracemalloc.start()
    try:
        list_tensors(tmp_path)
    except CheckpointError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**20


@FUZZ
@given(
    entries=st.dictionaries(
        st.text(max_size=3),
        JSON | st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}),
        max_size=3,
    )
)
def test_any_json_as_header(tmp_path, entries):
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        list_tensors(tmp_path)
    except CheckpointError:
        return


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), JSON, max_size=3)}))
def test_any_json_as_index(written, folder, index):
    restore(written, folder)
    (folder / INDEX_NAME).write_text(json.dumps(index))
    assert not loads(folder)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("how", ["missing", "folder", "loop", "pipe"])
def test_a_shard_that_is_no_file(written, folder, place, how):
    restore(written, folder)
    replace(files(folder)[:-1][place], how)
    assert not loads(folder)


@pytest.mark.parametrize("how", ["missing", "folder", "loop", "pipe"])
def test_an_index_that_is_no_file_is_no_index(written, folder, how):
    restore(written, folder)
    replace(folder / INDEX_NAME, how)
    assert loads(folder)


def replace(path, how):
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
