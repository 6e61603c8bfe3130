"""The benchmark of the kernels gets through all it measures, at small sizes."""

import json

import pytest
import torch

from benchmarks import kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_the_benchmark_writes_one_document(tmp_path):
    out = tmp_path / "kernels.json"
    assert kernels.main(["--out", str(out), "--commit", "none"]) == 0
    document = json.loads(out.read_text())
    assert {figure["kernel"] for figure in document["figures"]} == {
        *(
            "add_norm",
            "gate",
            "tabulate",
            "rotate_and_keep",
            "divide",
            "attend_new",
            "attend_new, 8 bits",
            "attend",
            "chain",
        )
    }
    assert all(
        figure["relative_error"] < 1e-5 and all(figure["microseconds"].values()) for figure in document["figures"]
    )
