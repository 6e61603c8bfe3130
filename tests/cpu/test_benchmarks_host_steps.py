"""The host's own time for a step, with kernels left out, which leaves nothing behind."""

import torch

from benchmarks.host_steps import measure
from memphi.model.kernels import skinny


def test_every_set_of_adapters_is_measured():
    before = skinny.most_rows(torch.device("cpu"))
    figures = measure(layers=2, repeats=1)
    assert [figure["adapters"] for figure in figures] == ["none", "vision", "none, vision, speech"]
    # Norms, turning, attention in lines and the gate in every layer; the last norm, the table and the division.
    assert {figure["launches"] for figure in figures} == {2 * 5 + 3}
    assert all(figure["milliseconds"] > 0 for figure in figures)
    assert skinny.most_rows(torch.device("cpu")) == before
