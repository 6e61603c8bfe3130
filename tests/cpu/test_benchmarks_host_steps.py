"""The host's own time for steps and rounds, with kernels left out, which leaves nothing behind."""

import pytest
import torch

from benchmarks.host_steps import measure, measure_round
from memphi.engine.runner import Runner
from memphi.model.kernels import skinny


def test_every_set_of_adapters_is_measured():
    before = skinny.most_rows(torch.device("cpu"))
    figures = measure(layers=2, repeats=1)
    assert [figure["adapters"] for figure in figures] == ["none", "vision", "none, vision, speech"]
    # Norms, turning, attention in lines and the gate in every layer; the last norm, the table and the division. Where
    # not all tokens use one adapter, what adapters make of x in the four linears of every layer.
    assert [figure["launches"] for figure in figures] == [2 * 5 + 3, 2 * 5 + 3, 2 * (5 + 4) + 3]
    assert all(figure["milliseconds"] > 0 for figure in figures)
    assert skinny.most_rows(torch.device("cpu")) == before


@pytest.mark.parametrize("prompts", [0, 2])
def test_rounds_are_of_as_many_rows_as_they_say(monkeypatch, prompts):
    rows, run, launch = list[int](), Runner.run, Runner.launch
    monkeypatch.setattr(Runner, "run", lambda runner, plan: (rows.append(len(plan.rows)), run(runner, plan))[1])
    monkeypatch.setattr(
        Runner, "launch", lambda runner, plan, *rest: (rows.append(len(plan.rows)), launch(runner, plan, *rest))[1]
    )
    figure = measure_round(3, prompts, repeats=2)
    assert figure["milliseconds"] > 0
    assert (figure["answers"], figure["prompts"]) == (3, prompts)
    assert rows[-1] == 3 + prompts
