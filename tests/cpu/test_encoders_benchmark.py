"""The benchmark of the encoders gets through all it measures, at small sizes."""

import json

import pytest
import torch

from benchmarks import encoders


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_the_benchmark_writes_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "PICTURES", {"a small picture": (300, 200)})
    out = tmp_path / "encoders.json"
    assert (
        encoders.main(["--out", str(out), "--commit", "none", "--repeats", "1", "--crops", "2", "--seconds", "1"]) == 0
    )
    figures = json.loads(out.read_text())["figures"]
    assert len(figures) == 2 + 3 + 4 + 4
    assert all(figure["seconds"] > 0 for figure in figures)
