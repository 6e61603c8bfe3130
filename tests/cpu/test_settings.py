"""What torch makes of the allocators' settings, and what --debug-cuda sees."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from memphi.checkpoint.writer import write_checkpoint
from memphi.cli import main
from memphi.engine import watch
from memphi.engine.settings import ALLOCATOR_VARIABLES, ALLOCATORS
from memphi.engine.watch import memory_kept, watch_for_nan
from memphi.errors import DoesNotFitError, MediaError, MemphiError
from memphi.verify import sample_requests, trace_memphi
from tests.checkpoints import tiny_checkpoint, tiny_model, write_tokenizer


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*ALLOCATOR_VARIABLES, "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.setenv(name, "")  # so that what a test leaves is undone
        monkeypatch.delenv(name)
    return os.environ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("settings") / "model", dtype=torch.float32)


def ask(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["memphi", *map(str, words)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    return code, *capsys.readouterr()


# --- the allocator -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before_torch", [True, False])
@pytest.mark.parametrize("name", ["expandable", "split128"])
def test_torch_reads_what_is_set(name, before_torch):
    steps = ["import torch", f"from memphi.engine.settings import use_allocator; use_allocator({name!r})"]
    steps = reversed(steps) if before_torch else steps
    code = "; ".join((*steps, "print(torch._C._accelerator_getAllocatorSettings())"))
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (said.stdout.strip(), said.stderr) == (ALLOCATORS[name], "")


@pytest.mark.parametrize("option", re.findall(r"(\w+):", ",".join(ALLOCATORS.values())))
def test_torch_knows_every_option(option):
    """It may ignore a name that it does not know, but for one that it knows it refuses a value that is none."""
    with pytest.raises(ValueError):  # noqa: PT011 (the words are those of C++'s library)
        torch._C._accelerator_setAllocatorSettings(f"{option}:none")


def test_the_command_sets_it_or_tells_why_not(monkeypatch, capsys, environment, folder):
    options = ("--model", folder, "--device", "cpu", "--dtype", "fp32", "--max-tokens", 2)
    code, out, err = ask(monkeypatch, capsys, "ask", "Go on.", *options, "--allocator", "expandable")
    assert (code, err) == (0, "")
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    environment["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:64"
    again = ask(monkeypatch, capsys, "ask", "Go on.", *options, "--allocator", "expandable")
    assert again[:2] == (0, out)
    assert again[2].startswith("memphi: PYTORCH_ALLOC_CONF=max_split_size_mb:64 is set and stays as it is")
    assert again[2].count("\n") == 1


# --- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_first_module_whose_output_is_not_finite_is_named(wrong):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))
    handles = watch_for_nan(model)
    model(torch.ones(3, 4))
    with torch.no_grad():
        model[1][0].bias[2] = wrong
    with pytest.raises(MemphiError, match=r"is that of 1\.0: 3 of 18 numbers \(torch\.float32, \[3, 6\]\)"):
        model(torch.ones(3, 4))
    for handle in handles:
        handle.remove()
    assert not model(torch.ones(3, 4)).isfinite().all()


def test_what_modules_return_is_looked_into():
    class Pair(nn.Module):
        def forward(self, value):
            return torch.arange(3), [value, (value / 0,)]

    model = Pair()
    watch_for_nan(model)
    with pytest.raises(MemphiError, match="is that of the model: 2 of 2 numbers"):
        model(torch.ones(2))


def test_a_sound_model_passes_in_every_mode(folder):
    """No module puts out -inf on purpose, for masks or padding."""
    from memphi.inputs.prompt import prepare
    from memphi.inputs.tokenizer import Tokenizer

    model = tiny_model()
    watch_for_nan(model)
    tokenizer = Tokenizer.from_folder(folder)
    for request in sample_requests(model.config, seed=0):
        trace_memphi(model, prepare(request, model.config, tokenizer), new_tokens=2)


def test_on_the_cpu_only_nan_is_looked_for_and_that_is_said(monkeypatch, capsys, folder):
    options = ("--model", folder, "--device", "cpu", "--dtype", "fp32", "--max-tokens", 2)
    plain = ask(monkeypatch, capsys, "ask", "Go on.", *options)
    code, out, err = ask(monkeypatch, capsys, "ask", "Go on.", *options, "--debug-cuda")
    assert (code, out) == plain[:2]
    assert err == "memphi: --debug-cuda only looks for NaN here: the device is cpu\n"


def test_a_model_that_is_broken_is_one_sentence(monkeypatch, capsys, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.language.layers[1].mlp.down.weight[0, 0] = float("nan")
    write_checkpoint(model, tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--device", "cpu", "--dtype", "fp32", "--max-tokens", 2)
    code, out, err = ask(monkeypatch, capsys, "ask", "Go on.", *options, "--debug-cuda")
    assert (code, out) == (1, "")
    assert "memphi: the first output that is not finite is that of language.layers.1.mlp.down" in err
    assert "Traceback" not in err


# --- records of memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def recording(monkeypatch):
    """As if torch recorded; returns the files that were asked for."""
    written = []
    monkeypatch.setattr(watch, "_records", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    return written


@pytest.mark.parametrize("error", [DoesNotFitError("no room"), RuntimeError("CUDA error"), MemphiError("NaN")])
def test_what_fails_leaves_a_file_and_says_which(recording, tmp_path, error):
    told = []
    with pytest.raises(type(error)), memory_kept(told.append, tmp_path):
        raise error
    assert len(recording) == len(told) == 1
    assert told[0].startswith(f"{recording[0]} holds what the GPU's memory was used for")
    assert recording[0].startswith(str(tmp_path / "memphi-memory-"))


@pytest.mark.parametrize("error", [MediaError("damaged"), BrokenPipeError(), KeyboardInterrupt()])
def test_what_fails_without_the_gpu_leaves_none(recording, tmp_path, error):
    with pytest.raises(type(error)), memory_kept(pytest.fail, tmp_path):
        raise error
    assert recording == []


def test_without_records_an_error_passes(tmp_path):
    with pytest.raises(RuntimeError), memory_kept(pytest.fail, tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_records_that_cannot_be_written_do_not_hide_the_error(recording, monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    told = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with pytest.raises(ValueError, match="the real one"), memory_kept(told.append, tmp_path):
        raise ValueError("the real one")
    assert "could not be written to" in told[0]
    assert told[0].endswith("an illegal memory access was encountered")
