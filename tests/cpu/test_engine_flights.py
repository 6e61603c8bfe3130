"""A step launched behind another that is still in flight changes no answer: whoever comes, ends or is cut off then."""

import random
from dataclasses import replace

import pytest
import torch

from memphi.engine.runner import Flight
from memphi.request import FinishReason, Request
from tests.checkpoints import tiny_config
from tests.faults import KINDS, Faults, failing
from tests.plain_graphs import PlainGraphs, use_plain_graphs
from tests.scenes import GREEDY, Stage, alone, conversation, lively_model, mixed_requests

LONG = replace(GREEDY, max_tokens=40)


@pytest.fixture(scope="module", autouse=True, params=[0, 4096], ids=["answers", "prompts too"])
def _plain_graphs(request):
    """Graphs of answers alone, and of prompts as well, whose steps fly likewise."""
    with pytest.MonkeyPatch.context() as patch:
        use_plain_graphs(patch, prefill_tokens=request.param)
        yield


@pytest.fixture(scope="module")
def flying(stage):
    """Make a loop whose answers fly; without drafts, which decide otherwise."""

    def make(**settings):
        return stage(**{"kernels": "auto", "speculation": False, **settings})

    return make


@pytest.fixture(scope="module")
def long(model, tokenizer):
    return [result.ids for result in alone(model, tokenizer, mixed_requests(LONG))]


def graphs_of(staged) -> PlainGraphs:
    return staged.loop.runner.graphs


def test_answers_are_those_of_step_by_step(flying, long):
    together = flying()
    assert together.ids(mixed_requests(LONG)) == long
    assert graphs_of(together).behind > 30
    assert max(graphs_of(together).decoded) == 5
    together.check_empty()


def test_no_more_is_computed_than_step_by_step(stage, flying):
    """Ends by length are known: nothing is launched in vain, and every token is counted once."""
    counted = []
    for make in (flying, lambda: stage(speculation=False)):
        staged = make()
        staged.answer(mixed_requests(LONG))
        stats = staged.loop.stats
        counted.append((stats.prompt_tokens, stats.answer_tokens, stats.steps, stats.open, stats.ended))
    assert counted[0] == counted[1]


def test_all_but_the_first_steps_of_a_lone_answer_are_launched_ahead(flying):
    lone = flying()
    lone.answer(mixed_requests(LONG)[:1])
    assert graphs_of(lone).behind == len(graphs_of(lone).decoded) - 1 == LONG.max_tokens - 2


@pytest.mark.parametrize("settings", [{"step_tokens": 9}, {"pages": 20}, {"rows": 2}, {"crops_per_pass": 1}])
def test_those_who_come_late_join(model, tokenizer, flying, settings):
    """One in every few rounds, so that prompts, pictures and answers meet in every way."""
    requests = [replace(r, sampling=replace(LONG, max_tokens=9 + 7 * i)) for i, r in enumerate(mixed_requests())] * 2
    wanted = [r.ids for r in alone(model, tokenizer, requests[:5])] * 2
    late = flying(**settings)
    for number, request in enumerate(requests):
        late.submit(request)
        for _ in range(3 + number):
            late.step()
    late.run()
    assert [late.result(i).ids for i in range(10)] == wanted
    assert graphs_of(late).behind
    late.check_empty()


def test_speculation_goes_beside_it(model, tokenizer, flying):
    requests = [*mixed_requests(replace(GREEDY, max_tokens=100)), conversation(3, LONG)]
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    both = flying(speculation=True)
    for request, ids in zip(requests, wanted, strict=True):
        assert both.ids([request]) == [ids]
    assert both.ids(requests) == wanted
    assert both.loop.stats.drafted_tokens
    assert graphs_of(both).behind
    both.check_empty()


def test_others_who_draw_or_ask_for_more_are_heard_at_once(model, tokenizer, flying):
    samplings = [
        replace(LONG, max_tokens=10),
        replace(LONG, temperature=1.0, seed=3),
        replace(LONG, repetition_penalty=1.3, max_tokens=15),
        replace(LONG, top_logprobs=2, max_tokens=20),
        LONG,
    ]
    requests = [replace(r, sampling=s) for r, s in zip(mixed_requests(), samplings, strict=True)]
    wanted, launched = alone(model, tokenizer, requests), set()
    mixed = flying()
    launch = mixed.loop.runner.launch

    def note(plan, *rest):
        launched.update(row.sequence.id for row in plan.rows)
        return launch(plan, *rest)

    mixed.loop.runner.launch = note
    assert [r.ids for r in mixed.answer(requests)] == [r.ids for r in wanted]
    assert len(mixed.result(3).logprobs) == 20
    assert not launched & {1, 2, 3}
    assert mixed.ids(requests[:1]) == [wanted[0].ids]
    assert 5 in launched


# --- ends that no integer tells ------------------------------------------------------------------------------------


def stopping(model, tokenizer, places):
    """A model that ends the mixed requests' answers at some of their ids, and those requests."""
    requests = mixed_requests(replace(LONG, ignore_eos=False))
    answers = [r.ids for r in alone(model, tokenizer, mixed_requests(LONG))]
    return requests, tuple({ids[place] for ids, place in zip(answers, places, strict=True)})


@pytest.mark.parametrize("places", [(1, 2, 3, 4, 5), (9, 30, 9, 22, 14)])
def test_stop_ids_end_answers_among_others(tokenizer, places):
    ending = lively_model()
    requests, stops = stopping(ending, tokenizer, places)
    ending.config = replace(ending.config, stop_token_ids=stops)
    wanted = alone(ending, tokenizer, requests)
    assert all(r.finish_reason is FinishReason.STOP for r in wanted)
    flight = Stage(ending, tokenizer, 128, rows=8, kernels="auto", speculation=False)
    results = flight.answer(requests)
    assert [(r.ids, r.text, r.finish_reason) for r in results] == [(r.ids, r.text, r.finish_reason) for r in wanted]
    assert flight.loop.stats.answer_tokens == sum(len(r.ids) for r in wanted)
    assert flight.answer(requests)[2].ids == wanted[2].ids  # What pages are found again hold no id in vain.
    flight.check_empty()
    lone = Stage(ending, tokenizer, 128, rows=8, kernels="auto", speculation=False)
    assert lone.ids(requests[-1:]) == [wanted[-1].ids]
    assert sum(graphs_of(lone).decoded) == len(wanted[-1].ids)  # One in vain: the prompt's step gave the first id.


def test_stop_strings_end_answers_among_others(model, tokenizer, flying):
    texts = [r.text for r in alone(model, tokenizer, mixed_requests(LONG))]
    requests = [
        replace(r, sampling=replace(LONG, stop=(text[n : n + 3],)))
        for n, (r, text) in enumerate(zip(mixed_requests(), texts, strict=True), 3)
    ]
    wanted, flight = alone(model, tokenizer, requests), flying()
    results = flight.answer(requests)
    assert [(r.ids, r.text) for r in results] == [(r.ids, r.text) for r in wanted]
    assert all(r.finish_reason is FinishReason.STOP for r in results)
    for number, result in enumerate(results):
        assert "".join(piece.text for piece in flight.deltas[number]) == result.text
    flight.check_empty()


def test_a_cancel_at_any_round_leaves_the_others_alone(flying, expected):
    undisturbed = flying()
    undisturbed.ids(mixed_requests())
    for step in range(undisturbed.steps):
        disturbed = flying()
        for request in mixed_requests():
            disturbed.submit(request)
        for _ in range(step):
            disturbed.step()
        disturbed.cancel(step % 5)
        disturbed.scheduler.check()
        heard = len(disturbed.deltas[step % 5])
        disturbed.run()
        assert len(disturbed.deltas[step % 5]) == heard
        for number, ids in enumerate(expected):
            result = disturbed.result(number)
            cut = result.finish_reason is FinishReason.CANCELLED
            assert result.ids == (ids[: len(result.ids)] if cut else ids)
            assert number == step % 5 or not cut
        disturbed.check_empty()


def test_who_comes_after_all_were_cancelled_in_flight(flying, expected):
    emptied = flying()
    for request in mixed_requests():
        emptied.submit(request)
    while emptied.loop._flight is None:
        emptied.step()
    for number in range(5):
        emptied.cancel(number)
    assert not emptied.loop.has_work
    assert not emptied.loop.stalled  # What is in flight is to be forgotten yet.
    emptied.loop._elastic.rest()
    assert not emptied.step()
    emptied.step()
    assert emptied.loop.stalled
    assert emptied.ids(mixed_requests()) == expected
    emptied.check_empty()


# --- crossing, pauses, faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [128, 14, 24])
def test_crossing_equals_starting_over_while_others_fly(tokenizer, pages):
    model = lively_model(tiny_config(short_tokens=96, max_tokens=512))
    requests = mixed_requests(replace(GREEDY, max_tokens=70))
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    crossing = Stage(model, tokenizer, pages, rows=8, kernels="auto", speculation=False)
    assert crossing.ids(requests) == wanted
    assert graphs_of(crossing).behind
    crossing.check_empty()


def test_growth_pauses_the_newest(model, tokenizer, flying):
    sampling = replace(GREEDY, max_tokens=400)
    requests = [Request.ask(text, sampling=sampling) for text in ("One.", "Two and three.", "Four?")]
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    tight = flying(pages=46)
    assert tight.ids(requests) == wanted
    assert tight.loop.stats.pauses > 0
    assert graphs_of(tight).behind > 400
    tight.check_empty()


@pytest.mark.parametrize("seed", range(4))
def test_pauses_smaller_pools_and_rungs_at_any_time(flying, long, seed):
    chance, shaken = random.Random(seed), flying(step_tokens=40)
    scheduler, pages = shaken.scheduler, shaken.scheduler.reservations.pages.capacity
    numbers = [shaken.submit(request) for request in mixed_requests(LONG)]
    while shaken.loop.has_work:
        shaken.step()
        draw = chance.random()
        if draw < 0.1 and len(scheduler.active) > 1:
            scheduler.pause(scheduler.active[-1])
        elif draw < 0.2:
            shaken.loop._elastic._resize(chance.randint(30, pages))
        elif draw < 0.25:
            scheduler.reservations.pages.drop_idle()
            shaken.pool.trim(scheduler.reservations.pages.kept())
        scheduler.check()
    assert [shaken.result(number).ids for number in numbers] == long
    assert scheduler.stats.pauses
    shaken.check_empty()


def test_a_fault_anywhere_changes_no_answer(flying, long):
    counted, requests = Faults(), mixed_requests(LONG)
    undisturbed = flying()
    with counted:
        assert undisturbed.ids(requests) == long
    for at in range(counted.allocations // 3, counted.allocations, counted.allocations // 40):
        struck = flying()
        with Faults({at}, pool=struck.pool) as faults:
            assert struck.ids(requests) == long
        assert faults.raised == 1
        struck.check_empty()


@pytest.mark.parametrize("every", [300, 900])
def test_one_fault_after_another_changes_no_answer(flying, long, every, monkeypatch):
    monkeypatch.setattr("memphi.engine.recovery.QUIET_STEPS", 3)
    struck = flying(pages=40)
    with Faults(range(every - 1, 10**9, every), pool=struck.pool) as faults:
        assert struck.ids(mixed_requests(LONG)) == long
    assert faults.raised > 3
    struck.check_empty()


@pytest.mark.parametrize("error", [KINDS["torch"], lambda: ValueError("a broken launch")])
def test_a_step_that_cannot_be_launched_behind_is_planned_again(flying, long, error):
    struck, raised = flying(), []
    launch = struck.loop.runner.launch

    def strike(plan, divided, before=None):
        flight = launch(plan, divided, before)
        if before is not None and len(raised) < 5:
            raised.append(plan)
            raise error()  # When the device has done it already.
        return flight

    struck.loop.runner.launch = strike
    assert struck.ids(mixed_requests(LONG)) == long
    assert len(raised) == 5
    assert not struck.loop.stats.rungs
    struck.check_empty()


@pytest.mark.parametrize("times", [1, 3])
def test_what_cannot_be_heard_is_computed_again(flying, long, times):
    struck = flying()
    with failing(Flight, "land", KINDS["host"], times=times):
        assert struck.ids(mixed_requests(LONG)) == long
    assert 1 <= sum(struck.loop.stats.rungs.values()) <= times  # Without graphs nothing flies.
    struck.check_empty()


def test_another_error_fails_those_in_flight_and_nobody_else(flying, expected):
    struck = flying()
    for request in mixed_requests()[:2]:
        struck.submit(request)
    while struck.loop._flight is None:
        struck.step()
    struck.cancel(0)
    with failing(Flight, "land", lambda: RuntimeError("an illegal address"), times=1):
        struck.step()
    with pytest.raises(RuntimeError, match="an illegal address"):
        struck.result(1)
    assert struck.result(0).finish_reason is FinishReason.CANCELLED
    assert struck.ids(mixed_requests()) == expected
    struck.check_empty()


def test_graphs_that_are_dropped_in_flight(flying, long, caplog):
    """What they chose went with them: nothing is launched behind, and nothing fails."""
    dropped, rounds = flying(), 0
    for request in mixed_requests(LONG):
        dropped.submit(request)
    while dropped.loop.has_work:
        dropped.step()
        rounds += 1
        if rounds % 5 == 0:
            graphs_of(dropped).allowed = rounds % 2 == 0
            graphs_of(dropped).drop()
    assert [dropped.result(i).ids for i in range(5)] == long
    assert not caplog.records


def test_nobody_in_flight_waits_for_a_capture(flying, monkeypatch):
    """A graph for fewer rows is captured with nothing in flight, and then they fly again."""
    captured, first, behind = set(), [], []
    monkeypatch.setattr(PlainGraphs, "ready", lambda self, rows: captured.add(len(rows)))
    monkeypatch.setattr(PlainGraphs, "is_ready", lambda self, rows: len(rows) in captured)
    requests = [replace(r, sampling=replace(LONG, max_tokens=9 + 7 * i)) for i, r in enumerate(mixed_requests())]
    ending = flying()
    launch = ending.loop.runner.launch

    def note(plan, divided, before=None):
        if all(row.follows for row in plan.rows):
            behind.append((len(plan.rows), len(plan.rows) in captured))
        elif before is None:
            first.append(len(plan.rows))
        return launch(plan, divided, before)

    ending.loop.runner.launch = note
    ending.answer(requests)
    assert {1, 2, 3, 4} <= {rows for rows, _ in behind} & set(first)
    assert all(was_there for _, was_there in behind)
    ending.check_empty()


@torch.inference_mode()
def test_what_a_flight_brings_is_its_own(flying):
    """The next step's choice does not change what the one before told."""
    lone = flying()
    lone.submit(mixed_requests(LONG)[0])
    while lone.loop._flight is None:
        lone.step()
    flight = lone.loop._flight
    told = flight.chosen.clone()
    graphs_of(lone)._chosen.fill_(3)
    assert torch.equal(flight.chosen, told)
