"""Steps of prompts that graphs compute change no answer: whatever comes with them, and whatever fails."""

from dataclasses import replace

import pytest
import torch

from memphi.cache.pool import make_pool
from memphi.engine.graphs import Graphs
from memphi.memory.costs import graphed
from memphi.model.rows import Row
from tests.faults import KINDS, failing
from tests.plain_graphs import PlainPrefills, use_plain_graphs
from tests.scenes import GREEDY, alone, mixed_requests

LONG = replace(GREEDY, max_tokens=40)
MOST_TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def _plain_graphs():
    with pytest.MonkeyPatch.context() as patch:
        use_plain_graphs(patch, prefill_tokens=MOST_TOKENS)
        yield


@pytest.fixture(scope="module")
def engine_of(stage):
    def make(**settings):
        return stage(**{"kernels": "auto", "speculation": False, **settings})

    return make


@pytest.fixture(scope="module")
def long(model, tokenizer):
    return [result.ids for result in alone(model, tokenizer, mixed_requests(LONG))]


def prefills_of(staged) -> PlainPrefills:
    return staged.loop.runner.graphs.prefills


def again(staged, requests):
    """Answers to requests whose prompts are computed anew."""
    staged.scheduler.reservations.pages.drop_idle()
    return staged.ids(requests)


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 9}, {"pages": 20}, {"rows": 2}, {"speculation": True}])
def test_answers_are_those_without_graphs(engine_of, long, settings):
    staged = engine_of(**settings)
    for _ in range(3):
        assert again(staged, mixed_requests(LONG)) == long
    assert prefills_of(staged).computed
    staged.check_empty()


def test_a_graph_is_for_the_second_step_of_its_kind(engine_of):
    lone = engine_of()
    for expected in (0, 1, 2):
        again(lone, mixed_requests(GREEDY)[:1])
        assert len(prefills_of(lone).computed) == expected


def test_answers_go_along_with_prompts(engine_of, long):
    """A request that comes while another is answered."""
    staged = engine_of()
    for _ in range(3):
        staged.scheduler.reservations.pages.drop_idle()
        first = staged.submit(mixed_requests(LONG)[0])
        while len(staged.deltas[first]) < 3:
            staged.step()
        second = staged.submit(mixed_requests(LONG)[1])
        staged.run()
        assert [staged.result(number).ids for number in (first, second)] == long[:2]
    assert any(1 in tokens and max(tokens) > 1 for tokens in prefills_of(staged).computed)


def test_prompts_fly(engine_of, long, monkeypatch):
    """From the second time on steps of prompts are launched behind others; what they choose, answers begin with."""
    monkeypatch.setattr(graphed, "PREFILL_ROWS", 2)  # So that answers soon go in their own.
    staged, behind = engine_of(step_tokens=40), []
    launch = staged.loop.runner.launch

    def note(plan, divided, before=None):
        rows = plan.rows if before is not None else ()
        prompts, answers = (any((row.tokens > 1) == wanted for row in rows) for wanted in (True, False))
        firsts = any(row.follows and not row.sequence.answer_tokens for row in rows)
        behind.append((prompts, answers, firsts))
        return launch(plan, divided, before)

    monkeypatch.setattr(staged.loop.runner, "launch", note)
    for _ in range(3):
        assert again(staged, mixed_requests(LONG)) == long
    assert {(True, True, True), (False, True, False)} <= set(behind)
    staged.check_empty()


def test_more_answers_than_a_graph_of_prompts_takes_go_in_their_own(engine_of, long, monkeypatch):
    monkeypatch.setattr(graphed, "PREFILL_ROWS", 2)
    staged = engine_of()
    for _ in range(4):
        staged.scheduler.reservations.pages.drop_idle()
        numbers = [staged.submit(request) for request in mixed_requests(LONG)[:3]]
        while len(staged.deltas[numbers[2]]) < 3:
            staged.step()
        numbers.append(staged.submit(mixed_requests(LONG)[3]))
        staged.run()
        assert [staged.result(number).ids for number in numbers] == long[:4]
    assert max(map(len, prefills_of(staged).computed)) <= 2


def test_a_prompt_that_is_too_long_goes_without(engine_of, long, monkeypatch):
    monkeypatch.setattr(graphed, "PREFILL_ROW_TOKENS", 10)
    lone = engine_of()
    for _ in range(3):
        assert again(lone, mixed_requests(LONG)[:1]) == long[:1]
    assert not prefills_of(lone).computed


@pytest.mark.parametrize("times", [1, 3])
def test_what_fails_is_computed_again(engine_of, long, times):
    struck = engine_of()
    for _ in range(2):
        assert again(struck, mixed_requests(LONG)) == long
    with failing(PlainPrefills, "compute", KINDS["torch"], times=times):
        assert again(struck, mixed_requests(LONG)) == long
    assert struck.loop.stats.rungs
    struck.check_empty()


def test_prefills_that_are_dropped_are_made_again_when_they_are_needed_twice(engine_of, long):
    staged = engine_of()
    for runs in (1, 2, 2):
        before = len(prefills_of(staged).computed)
        for _ in range(runs):
            assert again(staged, mixed_requests(LONG)[:1]) == long[:1]
        assert len(prefills_of(staged).computed) - before == runs - 1
        staged.loop.runner.graphs.drop()


def test_what_was_needed_once_is_captured_by_an_idle_engine(model, monkeypatch):
    """Once, of each kind, and no more than are held; what failed waits until it is needed again."""
    captured = []
    pool = make_pool(model.config.language, 8, model.dtype, model.device)
    graphs = Graphs(model, pool, 4, 64, capture=False, prefill_tokens=256)
    prefills = graphs.prefills
    monkeypatch.setattr(graphs._capture, "take", captured.append)
    monkeypatch.setattr("memphi.memory.costs.graphed.PREFILL_KINDS", 1)
    for tokens in (10, 20, 100, 160, 250, 70):
        assert prefills.miss([Row(tokens)])
    assert not prefills.miss([Row(300)])
    while prefills.rehearse():
        pass
    assert len(captured) == 4 == len(prefills._held.steps)
    assert prefills.can_compute([Row(30)])
    assert not prefills.can_compute([Row(30, adapter="vision")])
    assert prefills.miss([Row(30, adapter="vision")])
    assert not prefills.can_compute([Row(30, adapter="vision")])  # There is no room for one more.
    prefills.drop()
    assert not prefills.rehearse()

    def fail(step):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs._capture, "take", fail)
    assert prefills.miss([Row(10)])
    with pytest.raises(torch.OutOfMemoryError):
        prefills.rehearse()
    assert not prefills.rehearse()
