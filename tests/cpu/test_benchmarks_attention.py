"""The benchmark of attention over prompts gets through all it measures, at small sizes."""

import json

import pytest
import torch

from benchmarks import attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_the_benchmark_writes_one_document(tmp_path):
    out = tmp_path / "attention.json"
    assert attention.main(["--out", str(out), "--commit", "none"]) == 0
    document = json.loads(out.read_text())
    rows = [figure["rows"] for figure in document["figures"]]
    assert rows == ["1 x 20", "2 x 16", "8 over 20", "8 over 24", "3 over 40 + 20 over 5", "2 crops"]
    assert {"blocks of 1 chunks", "blocks of 2 chunks"} < set(document["figures"][3]["microseconds"])
    for figure in document["figures"]:
        assert figure["relative_error"] < 1e-5
        assert set(figure["microseconds"]) == set(figure["first_call_milliseconds"])
        assert all(figure["microseconds"].values())
