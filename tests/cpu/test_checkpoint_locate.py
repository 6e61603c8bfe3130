"""Where a model is, on a machine without a network: what is found, and what is said otherwise."""

import shutil
import time

import pytest

from memphi import official
from memphi.checkpoint import locate as module
from memphi.checkpoint.locate import PINNED_REVISIONS, Location, locate
from memphi.config import DEFAULT_MODEL
from memphi.errors import CheckpointError
from tests.checkpoints import tiny_checkpoint

OTHER = "someone/other.model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache and a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def put(cache, name, revision, tmp_path):
    """A finished download as the hub's library keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    written = tiny_checkpoint(tmp_path / "written")
    return shutil.move(written, repository / "snapshots" / revision)


def test_a_folder_is_itself(tmp_path):
    assert locate(str(tmp_path)) == Location(str(tmp_path), tmp_path)


def test_random_takes_the_official_configs():
    assert locate("random") == Location("random", official.folder(), random=True)


def test_the_demo_is_found_or_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "checkpoint" / "locate.py"))
    with pytest.raises(CheckpointError, match="no demo checkpoint"):
        locate("demo")
    (tmp_path / "demo" / "checkpoint").mkdir(parents=True)
    assert locate("demo") == Location("demo", tmp_path / "demo" / "checkpoint")


@pytest.mark.parametrize(
    "name",
    ["", "phi", "/nowhere/at-all", "../x/y", "a/b/c", "-a/b", "a--b/..c", "a/" + "x" * 200, "x" * 5000, "a\0b/c"],
)
def test_what_is_neither_folder_nor_hub_name_is_an_error(name, cache):
    with pytest.raises(CheckpointError, match=r"is no folder|is neither"):
        locate(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="give the folder"):
        locate(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", [DEFAULT_MODEL, OTHER])
@pytest.mark.parametrize("offline", [False, True])
def test_without_network_and_copy_the_advice_comes_soon(name, offline, cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"hf download {name}"):
        locate(name)
    assert time.monotonic() - start < 10


def test_the_pinned_copy_is_used_without_asking(cache, tmp_path, monkeypatch):
    snapshot = put(cache, DEFAULT_MODEL, PINNED_REVISIONS[DEFAULT_MODEL], tmp_path)
    monkeypatch.setattr(module, "_can_reach", lambda _: pytest.fail("asked"))
    assert locate(DEFAULT_MODEL).folder == snapshot


def test_another_revision_of_the_default_model_is_not_taken(cache, tmp_path):
    put(cache, DEFAULT_MODEL, "0" * 40, tmp_path)
    with pytest.raises(CheckpointError, match="hf download"):
        locate(DEFAULT_MODEL)


def test_a_copy_of_another_model_is_used_where_there_is_no_network(cache, tmp_path):
    snapshot = put(cache, OTHER, "1" * 40, tmp_path)
    assert locate(OTHER).folder == snapshot


def test_an_interrupted_download_is_taken_up_again(cache, tmp_path, monkeypatch):
    snapshot = put(cache, DEFAULT_MODEL, PINNED_REVISIONS[DEFAULT_MODEL], tmp_path)
    max(snapshot.glob("*.safetensors")).unlink()
    monkeypatch.setattr(module, "_can_reach", lambda _: True)
    monkeypatch.setattr(module, "_download", lambda name: tmp_path / name)
    assert locate(DEFAULT_MODEL).folder == tmp_path / DEFAULT_MODEL


def test_whatever_a_download_raises_becomes_one_sentence(cache, monkeypatch):
    def fail(*_, **kwargs):
        if "local_files_only" in kwargs:
            return "nowhere"
        raise RuntimeError("the line was cut\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(module, "_can_reach", lambda _: True)
    with pytest.raises(CheckpointError, match=f"^{OTHER} could not be downloaded: the line was cut$"):
        locate(OTHER)
