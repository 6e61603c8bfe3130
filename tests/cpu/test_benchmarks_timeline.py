"""The timeline of a workload: on a CPU nothing overlaps, and there are no kernels to name."""

from dataclasses import replace

from benchmarks.timeline import look, show
from memphi import load
from memphi.bench.workloads import WORKLOADS
from memphi.config import EngineConfig


def test_all_steps_of_a_workload_are_seen(capsys):
    engine = load("demo", device="cpu", config=EngineConfig(speculation=False))
    figure = look(engine, replace(WORKLOADS["decode-1"], prompt_tokens=40, answer_tokens=40))
    engine.close()
    kinds = {kind["kind"]: kind for kind in figure["steps"]}
    assert kinds["prompts"]["tokens"] == 40
    assert kinds["answers"]["steps"] == 39
    for kind in kinds.values():
        assert 0 < kind["device_seconds"] <= kind["host_seconds"]
    assert sum(kind["host_seconds"] for kind in kinds.values()) < figure["seconds"]
    assert any("adapters.py" in host["line"] for host in figure["host"])  # Where a fifth of all samples is.
    assert figure["kernels"] == []
    show(figure)
    assert capsys.readouterr().out.startswith("== decode-1: ")
