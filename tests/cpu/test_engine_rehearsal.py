"""While nothing is asked for, kernels are compiled that no step has needed yet; whoever comes does not notice."""

import time
from types import SimpleNamespace

import pytest
import torch

from memphi.engine import loop, worker
from memphi.engine.graphs import Graphs
from tests.cpu.test_worker import make_engine, wait_until
from tests.plain_graphs import PlainGraphs
from tests.scenes import mixed_requests


class Rehearsed(PlainGraphs):
    """Has kernels of so many graphs to get ready, and fails at some of them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left = 3
        self.failures = []
        self.are_taken = False

    @property
    def are_held(self):
        return self.are_taken

    def rehearse(self):
        if not self.left:
            return False
        self.left -= 1
        self.are_taken = True
        if self.failures:
            raise self.failures.pop()
        return True

    def drop(self):
        dropped, self.are_taken = self.are_taken, False
        return super().drop() or dropped


@pytest.fixture
def engine(model, tokenizer, monkeypatch):
    def make(model, pool, plan, config, forbidden):
        return Rehearsed(model, pool, plan.rows, forbidden)

    monkeypatch.setattr("memphi.engine.engine.make_graphs", make)
    monkeypatch.setattr(worker, "LONGEST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(loop, "QUIET_SECONDS", 0.05)
    made = make_engine(model, tokenizer, idle_seconds=0.2)
    yield made
    made.close()


def test_all_become_ready_and_what_was_taken_goes_as_memory_does(engine):
    graphs = engine.loop.runner.graphs
    wait_until(lambda: not graphs.left, "the last rehearsal")
    wait_until(lambda: not graphs.are_taken, "rest")


def test_none_in_a_short_pause(engine, monkeypatch):
    monkeypatch.setattr(loop, "QUIET_SECONDS", 3600.0)
    graphs = engine.loop.runner.graphs
    graphs.left = 1000
    engine.generate(mixed_requests()[0])
    left = graphs.left
    time.sleep(0.3)
    assert graphs.left == left


def test_a_request_comes_before_what_may_be_needed_once(engine, model, tokenizer):
    graphs = engine.loop.runner.graphs
    graphs.left = 10**6
    wait_until(lambda: graphs.left < 10**6, "the first rehearsal")
    with_others = [engine.generate(request).text for request in mixed_requests()]
    graphs.left = 0
    assert with_others == [engine.generate(request).text for request in mixed_requests()]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("no kernel for this")])
def test_a_graph_that_fails_is_told_and_left_to_the_step_that_needs_it(engine, error, caplog):
    graphs = engine.loop.runner.graphs
    graphs.failures = [error]
    graphs.left = 2
    wait_until(lambda: not graphs.left, "the last rehearsal")
    assert engine.generate(mixed_requests()[0]).text
    assert not graphs.failures
    assert ("no kernel for this" in caplog.text) == isinstance(error, ValueError)


def keys_of(form, most_rows):
    """What is run ahead, in its order, by rows and adapters."""
    model = SimpleNamespace(adapter_form=form, device=torch.device("cpu"))
    graphs = Graphs(model, SimpleNamespace(page_tokens=16), most_rows, 64, capture=False)
    warmed = []
    graphs._capture = SimpleNamespace(is_wanted=True, warm_up=warmed.append)
    graphs._make_step = lambda *key: (key[0], "+".join(sorted(key[1])))
    while graphs.rehearse():
        pass
    return warmed


def test_every_number_of_rows_under_every_adapter_once():
    used = ["", "vision", "speech", "speech+vision"]
    assert keys_of("packed", 6) == [(rows, names) for rows in (1, 2, 4, 6) for names in used]
    assert keys_of("merged", 1) == [(1, "")]
    assert keys_of("plain", 32) == [(rows, "") for rows in (1, 2, 4, 8, 16, 32)]
