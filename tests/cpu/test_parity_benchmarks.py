"""The full-size benchmarks run, here on tiny sizes, and their gates can fail."""

import gc
import json
import sys
import time

import pytest
import torch

from benchmarks.document import write_document
from benchmarks.load import drop_from_page_cache, load_in_fresh_process, measure_write, read_counters, sampled_peaks
from benchmarks.parity import compare, measure
from memphi.inputs.tokenizer import Tokenizer
from tests.checkpoints import tiny_config, write_tokenizer
from tests.oracle import parity_config


def test_parity_measures_all_modes(tmp_path):
    write_tokenizer(tmp_path)
    figures = measure(parity_config(), Tokenizer.from_folder(tmp_path), torch.device("cpu"))
    assert list(figures["modes"]) == ["text", "vision", "speech", "vision_speech"]
    for name, mode in figures["modes"].items():
        errors = mode["relative_error"]
        assert errors["memphi fp32"] == 0
        assert errors["transformers fp32"] < 1e-5 < 1e-3 < errors["memphi bf16"] < 2e-2
        assert 1e-3 < errors["transformers bf16"] < 2e-2
        assert (errors["transformers bf16 merged"] == errors["transformers bf16"]) == (name == "text")
        assert 0.5 < mode["ratio"] < 1.5


@pytest.mark.parametrize(
    ("ours", "theirs", "reference", "holds"),
    [(0.01, 0.01, 0, True), (0.03, 0.03, 0, False), (0.012, 0.01, 0, False), (0.01, 0.01, 0.001, False)],
)
def test_parity_holds_only_within_its_limits(ours, theirs, reference, holds):
    exact = torch.eye(3)
    runs = {
        "memphi bf16": exact * (1 + ours),
        "memphi fp32": exact,
        "transformers bf16": exact * (1 + theirs),
        "transformers fp32": exact * (1 + reference),
    }
    assert compare(runs, 3)["holds"] is holds


def test_load_compares_every_bit_in_a_fresh_process(tmp_path):
    folder = tmp_path / "model"
    written = measure_write(tiny_config(), folder)
    drop_from_page_cache(folder)
    good = load_in_fresh_process(folder)
    assert good["bit_identical"]
    assert written["checkpoint_bytes"] > good["model_bytes"] > 100_000
    assert good["peak_bytes"]["RssAnon"] >= good["imported_bytes"]["RssAnon"] > 0
    shard = next(folder.glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    assert not load_in_fresh_process(folder)["bit_identical"]


def test_peaks_are_seen():
    gc.collect()
    before = read_counters()["RssAnon"]
    with sampled_peaks() as peaks:
        block = bytearray(256 * 2**20)  # Far more than other tests' threads may give back meanwhile.
        block[:: 2**12] = b"x" * (len(block) // 2**12)
        for _ in range(1000):  # On a busy machine the thread that samples may wait for its turn.
            if peaks["RssAnon"] >= before + 48 * 2**20:
                break
            time.sleep(0.01)
        del block
    assert peaks["RssAnon"] >= before + 48 * 2**20


@pytest.mark.parametrize("program", ["benchmarks/parity.py", "benchmarks/parity/__main__.py"])
def test_a_document_says_where_it_comes_from(tmp_path, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "--out", "x.json"])
    write_document(tmp_path / "new" / "x.json", torch.device("cpu"), "abc", {"holds": True})
    document = json.loads((tmp_path / "new" / "x.json").read_text())
    assert document["command"] == "python -m benchmarks.parity --out x.json"
    assert document["benchmark"] == "parity"
    assert document["commit"] == "abc"
    assert document["holds"] is True
    assert {"date", "device", "torch", "python", "benchmark"} <= document.keys()
