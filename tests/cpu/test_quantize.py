"""`memphi quantize`: a folder from a folder; interrupted, resumed, refused; memory while it is made."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from memphi.checkpoint import quantisation
from memphi.checkpoint.calibration import example_rows
from memphi.checkpoint.headers import list_tensors
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.names import PARTS
from memphi.checkpoint.quantisation import BUFFER_BYTES, CALIBRATED, quantise_folder
from memphi.cli import app
from memphi.errors import CheckpointError
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory import costs
from memphi.model.quant.examples import Examples
from memphi.model.quant.swap import quantised_weights
from memphi.model.quant.weights import WEIGHTS
from tests.checkpoints import tiny_checkpoint, tiny_config

SCHEMES = pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def damaged(source, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def assert_same_state(first, second, but_for_calibrated=False):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    differ = {name for name, tensor in first.items() if not torch.equal(tensor.float(), second[name].float())}
    fitted = {name for name in first if name.startswith("language.layers.") and name.endswith(PARTS)}
    assert not differ - (fitted if but_for_calibrated else set())


# --- what is written -----------------------------------------------------------------------------------------------


@SCHEMES
def test_a_folder_holds_what_quantising_while_loading_makes(source, scheme, tmp_path):
    """But for what is fitted to example texts."""
    quantise_folder(source, tmp_path / "small", scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    loaded = load_model(tmp_path / "small", "cpu", torch.bfloat16)
    assert loaded.config.scheme == scheme
    assert_same_state(loaded, load_model(source, "cpu", torch.bfloat16, scheme=scheme), scheme in CALIBRATED)
    assert Tokenizer.from_folder(tmp_path / "small").image_id == Tokenizer.from_folder(source).image_id
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["memphi"]["scheme"], config["torch_dtype"]) == (scheme, "bfloat16")


@pytest.mark.parametrize("scheme", CALIBRATED)
@torch.no_grad()
def test_layers_are_fitted_to_what_the_examples_come_to_behind_the_quantised_layers_before(source, tmp_path, scheme):
    quantise_folder(source, tmp_path / "small", scheme)
    stored = quantised_weights(load_model(tmp_path / "small", "cpu", torch.bfloat16))
    model = load_model(source, "cpu", torch.float32)
    rows = example_rows(Tokenizer.from_folder(source), model.config)
    ids = torch.tensor(list(chain(*rows)))
    embeddings = stored["language.embedding.weight"].look_up(ids, torch.float32)
    examples = Examples(model.config.language, [len(row) for row in rows], embeddings)
    for number, layer in enumerate(model.language.layers):
        for linear in examples.quantise(layer, WEIGHTS[scheme]):
            same = zip(
                linear.weight.buffers(), stored[f"language.layers.{number}.{linear.name}.weight"].buffers(), strict=True
            )
            assert all(torch.equal(a.float(), b.float()) for a, b in same)


def test_pieces_of_any_size_make_the_same_folder(source, tmp_path, monkeypatch):
    quantise_folder(source, tmp_path / "one", "int4")
    monkeypatch.setattr("memphi.model.quant.swap.QUANTISED_NUMBERS", 500)
    monkeypatch.setattr(quantisation, "_COPIED_BYTES", 100)
    quantise_folder(source, tmp_path / "other", "int4")
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_layer_is_a_file_that_the_official_library_reads(source, tmp_path):
    quantise_folder(source, tmp_path / "small", "int4")
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    name = "model.layers.1.self_attn.qkv_proj.base_layer.weight"
    files = {file for tensor, file in index["weight_map"].items() if ".layers.1." in tensor and "extend" not in tensor}
    assert files == {index["weight_map"][f"{name}.codes"]}
    tensors = load_file(tmp_path / "small" / index["weight_map"][f"{name}.codes"])
    weight = quantised_weights(load_model(tmp_path / "small", "cpu", torch.bfloat16))[
        "language.layers.1.attention.qkv.weight"
    ]
    assert all(torch.equal(tensors[f"{name}.{part}"], buffer) for part, buffer in weight.named_buffers())


def test_the_report_has_every_layers_error(source, tmp_path):
    errors = quantise_folder(source, tmp_path / "small", "int4")
    report = json.loads((tmp_path / "small" / "quantisation.json").read_text())
    assert (report["scheme"], report["other_scheme"]) == ("int4", "int8")
    layers = {layer["layer"]: layer for layer in report["layers"]}
    whole = load_model(source, "cpu", torch.float32).state_dict()
    weights = quantised_weights(load_model(tmp_path / "small", "cpu", torch.float32))
    assert {error.name for error in errors} == weights.keys()
    for name in ("language.layers.0.mlp.down.weight", "vision.layers.1.attention.query.weight"):
        layer, weight = ".".join(name.split(".")[:3]), weights[name]
        meant = weight.dequantise(0, weight.out_features, torch.float32)
        real = float((meant - whole[name]).norm() / whole[name].norm())
        assert layers[layer]["weights"][name.removeprefix(layer + ".")] == pytest.approx(real, rel=1e-3)
        assert min(layers[layer]["weights"].values()) <= layers[layer]["relative_error"]
        assert layers[layer]["relative_error"] <= max(layers[layer]["weights"].values())


def test_progress_counts_what_is_read(source, tmp_path):
    seen = []
    quantise_folder(source, tmp_path / "small", "int8", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.end - tensor.start for tensor in list_tensors(source))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- interrupted ---------------------------------------------------------------------------------------------------


def interrupt_after(share):
    def progress(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.0])
def test_an_interrupted_run_goes_on_where_it_ended(source, tmp_path, share):
    quantise_folder(source, tmp_path / "whole", "int4")
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(source, tmp_path / "small", "int4", progress=interrupt_after(share))
    assert not (tmp_path / "small").exists()
    partial = tmp_path / ".small.partial"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert (len(finished) > 0) == (share > 0.3)
    with pytest.raises(CheckpointError):
        load_model(partial, "cpu", torch.bfloat16)
    errors = quantise_folder(source, tmp_path / "small", "int4")
    assert not partial.exists()
    for path, written in finished.items():
        assert (tmp_path / "small" / path.name).stat().st_mtime_ns == written
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name
    assert len(errors) == len(quantised_weights(load_model(tmp_path / "small", "cpu", torch.bfloat16)))


@pytest.mark.parametrize("change", ["scheme", "source"])
def test_another_run_begins_anew(damaged, tmp_path, change):
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(damaged, tmp_path / "small", "int4", progress=interrupt_after(0.8))
    if change == "source":
        shutil.rmtree(damaged)
        tiny_checkpoint(damaged, seed=1)
    scheme = "int8" if change == "scheme" else "int4"
    quantise_folder(damaged, tmp_path / "small", scheme)
    loaded = load_model(tmp_path / "small", "cpu", torch.bfloat16)
    quantise_folder(damaged, tmp_path / "anew", scheme)
    assert_same_state(loaded, load_model(tmp_path / "anew", "cpu", torch.bfloat16))


def test_a_shard_that_was_damaged_since_is_written_again(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(source, tmp_path / "small", "int4", progress=interrupt_after(0.8))
    for shard in sorted((tmp_path / ".small.partial").glob("*.safetensors"))[::2]:
        shard.write_bytes(shard.read_bytes()[:-5])
    quantise_folder(source, tmp_path / "small", "int4")
    quantise_folder(source, tmp_path / "anew", "int4")
    assert_same_state(*(load_model(tmp_path / name, "cpu", torch.bfloat16) for name in ("small", "anew")))


KILLED = """
import os, signal, sys
from pathlib import Path
from memphi.checkpoint.quantisation import quantise_folder

def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

quantise_folder(Path(sys.argv[1]), Path(sys.argv[2]), "int8", progress=progress)
"""


def test_a_killed_run_leaves_nothing_that_looks_finished(source, tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / "small"])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".small.partial"]
    quantise_folder(source, tmp_path / "small", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_is_one_error_and_leaves_no_folder(source, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"small cannot be written: .*the same command goes on from there"):
            quantise_folder(source, tmp_path / "small", "int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "small").exists()
    quantise_folder(source, tmp_path / "small", "int8")


def test_a_disk_with_too_little_room_is_told_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(CheckpointError, match=r"has 1000 bytes free, and the folder takes \d+ more"):
        quantise_folder(source, tmp_path / "small", "int8", progress=lambda *_: pytest.fail("began"))


def test_what_a_killed_run_had_begun_takes_no_room_from_the_next(source, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        quantise_folder(source, tmp_path / "small", "int8", progress=interrupt_after(0.9))
    partial = tmp_path / ".small.partial"
    assert list(partial.glob("*.unfinished"))

    def usage(_):
        return shutil._ntuple_diskusage(10**9, 10**9, 0 if list(partial.glob("*.unfinished")) else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    quantise_folder(source, tmp_path / "small", "int8")
    load_model(tmp_path / "small", "cpu", torch.bfloat16)


def test_a_second_run_of_the_same_is_kept_out(source, tmp_path):
    pytest.importorskip("fcntl")
    quantise_folder(source, tmp_path / "alone", "int8")
    refusals = []

    def begin_another(done, total):
        if done > total / 2 and not refusals:
            with pytest.raises(CheckpointError, match="another run is writing") as refusal:
                quantise_folder(source, tmp_path / "small", "int8")
            refusals.append(refusal)

    quantise_folder(source, tmp_path / "small", "int8", progress=begin_another)
    assert refusals
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "small" / path.name).read_bytes(), path.name


def test_a_link_leads_to_where_the_folder_is_written(source, tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("empty", "disk"), ("dangling", "later")):
        (tmp_path / name).symlink_to(tmp_path / target)
        quantise_folder(source, tmp_path / name, "int8")
        load_model(tmp_path / name, "cpu", torch.bfloat16)
        assert (tmp_path / name).is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "later", "empty", "dangling"}


def test_where_a_disk_is_mounted_nothing_is_begun(source, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "small")
    with pytest.raises(CheckpointError, match="small is where a disk is mounted; give a folder in it"):
        quantise_folder(source, tmp_path / "small", "int8", progress=lambda *_: pytest.fail("began"))


# --- refused -------------------------------------------------------------------------------------------------------


def spoil(folder, name, value):
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].view(-1)[3] = value
            save_file(tensors, shard, {"format": "pt"})


@SCHEMES
def test_a_bad_tensor_is_named_and_leaves_no_folder(damaged, tmp_path, scheme):
    name = "model.layers.1.mlp.down_proj.base_layer.weight"
    spoil(damaged, name, float("nan"))
    with pytest.raises(CheckpointError, match=f"tensor '{re.escape(name)}' holds a number that is infinite or none"):
        quantise_folder(damaged, tmp_path / "small", scheme)
    assert not (tmp_path / "small").exists()
    with pytest.raises(CheckpointError, match=f"tensor '{re.escape(name)}' holds a number that is infinite or none"):
        load_model(damaged, "cpu", torch.bfloat16, scheme=scheme)


def test_what_cannot_be_quantised_is_refused(source, tmp_path):
    quantise_folder(source, tmp_path / "small", "int8")
    with pytest.raises(CheckpointError, match=r"small holds weights in int8 already; give the folder that it was made"):
        quantise_folder(tmp_path / "small", tmp_path / "again", "int4")
    with pytest.raises(CheckpointError, match=r"small exists and is not empty"):
        quantise_folder(source, tmp_path / "small", "int8")
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        quantise_folder(tmp_path, tmp_path / "other", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("change", ["kind", "missing", "scheme", "word"])
def test_a_quantised_folder_that_is_wrong_is_refused(source, tmp_path, change):
    quantise_folder(source, tmp_path / "small", "int4")
    name = "model.layers.0.mlp.down_proj.base_layer.weight"
    if change in ("kind", "missing"):
        index = tmp_path / "small" / "model.safetensors.index.json"
        shard = tmp_path / "small" / json.loads(index.read_text())["weight_map"][f"{name}.codes"]
        tensors = load_file(shard)
        if change == "kind":
            tensors[f"{name}.codes"] = tensors[f"{name}.codes"].to(torch.int8)
        else:
            del tensors[f"{name}.affine"]
            index.unlink()
        save_file(tensors, shard, {"format": "pt"})
    else:
        config = tmp_path / "small" / "config.json"
        wrong = "int8" if change == "scheme" else "int3"
        config.write_text(config.read_text().replace('"scheme": "int4"', f'"scheme": "{wrong}"'))
    words = {
        "kind": f"'{name}.codes' is stored as I8; expected U8",
        "missing": f"no *.safetensors file holds '{name}.affine'",
        "scheme": "is stored as U8; expected I8|has shape|belongs to no layer",
        "word": "memphi.scheme is 'int3'; expected one of bf16, int8, int4, fp8",
    }
    match = words[change] if change == "scheme" else re.escape(words[change])
    with pytest.raises(CheckpointError, match=match):
        load_model(tmp_path / "small", "cpu", torch.bfloat16)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_a_table(source, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "small"), "--scheme", "int4"])
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["weights", "scheme", "error", "worst"]
    assert {row[0]: row[1] for row in rows[1:]}["language.layers.*.mlp.down"] == "int4"
    assert {row[0]: row[1] for row in rows[1:]}["language.embedding"] == "int8"
    assert all(float(row[2][:-1]) <= float(row[3][:-1]) for row in rows[1:])


def test_random_has_no_files(tmp_path):
    with pytest.raises(CheckpointError, match="random has no files to quantise; load it with --model random --scheme"):
        CliRunner().invoke(
            app, ["quantize", "random", str(tmp_path / "small"), "--scheme", "int4"], catch_exceptions=False
        )


# --- memory --------------------------------------------------------------------------------------------------------

MEASURED = """
import re, sys, threading
from pathlib import Path
import torch
from memphi.checkpoint import calibration
from memphi.checkpoint.quantisation import quantise_folder

torch.set_num_threads(1)
calibration.EXAMPLE_TOKENS = 512

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

source, folder, warm, scheme = sys.argv[1:]
quantise_folder(Path(warm), Path(folder + "-warm"), scheme)
before, most, seen, ended = resident(), 0, 0, threading.Event()

def watch():
    global most, seen
    while not ended.wait(0.005):
        most, seen = max(most, resident()), seen + 1

watching = threading.Thread(target=watch)
watching.start()
quantise_folder(Path(source), Path(folder), scheme)
ended.set()
watching.join()
print(most - before, seen)
"""


FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(128 * 2**10)}
"""What glibc keeps of freed memory differs from run to run, here by 120 MiB; what is asked for does not."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_no_more_memory_than_a_buffer_whatever_the_model(source, tmp_path, scheme):
    """With layers of 43 MB and an embedding of 41 MB, 220 MB in all; calibrated, half of that and what is stated."""
    config = tiny_config(
        hidden_size=1024,
        layers=2 if scheme in CALIBRATED else 4,
        heads=8,
        kv_heads=2,
        intermediate_size=2560 if scheme in CALIBRATED else 6144,
        vocab_size=20_000,
        max_tokens=64,
    )
    large = tiny_checkpoint(tmp_path / "large", config, shard_bytes=10**9)
    total = sum(tensor.end - tensor.start for tensor in list_tensors(large))
    stated = BUFFER_BYTES + (costs.calibrating(config, 4, 512).bytes if scheme in CALIBRATED else 0)
    assert scheme in CALIBRATED or total > 1.4 * stated
    taken = subprocess.run(
        [sys.executable, "-c", MEASURED, large, tmp_path / "small", source, scheme],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | FREED_AT_ONCE,
    )
    most, seen = map(int, taken.stdout.split())
    assert seen >= 5
    assert 0 < most <= stated, f"{most / 2**20:.0f} MiB of {stated / 2**20:.0f}"
