"""Memory runs out anywhere, in every way there is: answers stay the same, or one sentence says what would work."""

import weakref
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from memphi.engine.engine import Engine
from memphi.engine.preparation import Preparation
from memphi.engine.recovery import QUIET_STEPS, attempt, is_out_of_memory, told_plainly
from memphi.engine.rungs import PauseNewest
from memphi.errors import DoesNotFitError
from memphi.model.phi4mm import Phi4MM
from memphi.request import Request
from tests.faults import KINDS, Faults, From, failing, older_spared
from tests.scenes import GREEDY, alone, clip, mixed_requests, picture

CPU = torch.device("cpu")
TOO_LITTLE = r"this machine has too little memory for this request.*; send fewer or smaller attachments.*--each"
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)


@pytest.fixture(autouse=True)
def _quick_collections():
    with older_spared():
        yield


def answer_under(faults, stage, requests):
    """Answer requests together while memory runs out; returns their numbers."""
    numbers = [stage.submit(request) for request in requests]
    with faults:
        stage.run()
    return numbers


def serves(plan, number):
    return any(part.sequence.id == number for part in (*plan.rows, *plan.slices))


class TestWords:
    """What counts as running out of memory."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_is_known(self, kind):
        error = KINDS[kind]()
        assert is_out_of_memory(error)
        with (
            pytest.raises(DoesNotFitError, match="this machine has too little memory for the model; wait"),
            told_plainly("the model", CPU, "wait"),
        ):
            raise error

    def test_the_host_s_allocator_says_what_is_looked_for(self):
        with pytest.raises(DoesNotFitError), told_plainly("this", CPU, "wait"):
            torch.empty(2**60, dtype=torch.uint8)

    def test_other_errors_pass(self):
        with pytest.raises(RuntimeError, match="shape"), told_plainly("this", CPU, "wait"):
            raise RuntimeError("shape mismatch")
        with pytest.raises(RuntimeError, match="shape"):
            attempt(lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 60, 700])
def test_every_kind_is_recovered_from(stage, expected, kind, at):
    struck = stage()
    faults = Faults({at}, KINDS[kind], struck.pool)
    assert [struck.result(i).ids for i in answer_under(faults, struck, mixed_requests())] == expected
    assert faults.raised == 1
    assert sum(struck.loop.stats.rungs.values()) == 1
    struck.check_empty()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_fault_anywhere_changes_no_answer(model, tokenizer, stage, sampling):
    """Every 211th allocation of a mixed scenario, one after another."""
    requests = mixed_requests(sampling)
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    counted = Faults()
    answer_under(counted, stage(step_tokens=100, crops_per_pass=3), requests)
    assert counted.allocations > 1000
    for at in range(0, counted.allocations, 211):
        struck = stage(step_tokens=100, crops_per_pass=3)
        faults = Faults({at}, pool=struck.pool)
        assert [struck.result(i).ids for i in answer_under(faults, struck, requests)] == wanted
        assert faults.raised == 1
        struck.check_empty()


def test_a_fault_at_a_call_for_pages_changes_no_answer(stage, expected):
    counted = stage(step_tokens=50)
    calls = []
    ensure = counted.pool.ensure
    counted.pool.ensure = lambda pages: calls.append(pages) or ensure(pages)
    assert counted.ids(mixed_requests()) == expected
    for at in range(0, len(calls), 2):
        struck = stage(step_tokens=50)
        for request in mixed_requests():
            struck.submit(request)
        ensure, seen = struck.pool.ensure, []

        def strike(pages, seen=seen, at=at, ensure=ensure):
            seen.append(pages)
            if len(seen) == at + 1:
                raise KINDS["torch"]()
            ensure(pages)

        struck.pool.ensure = strike
        struck.run()
        assert [struck.result(i).ids for i in range(5)] == expected
        assert len(seen) > at


@pytest.mark.parametrize("every", [450, 1100])
@pytest.mark.parametrize("settings", [{}, {"pages": 20}, {"pages": None, "kv_cache": False}])
def test_one_fault_after_another_changes_no_answer(model, tokenizer, stage, every, settings):
    requests = mixed_requests(SAMPLED)
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    struck = stage(**settings)
    faults = Faults(range(every - 1, 10**9, every), pool=struck.pool)
    assert [struck.result(i).ids for i in answer_under(faults, struck, requests)] == wanted
    assert faults.raised > 2
    struck.check_empty()


@pytest.mark.parametrize("victim", range(5))
@pytest.mark.parametrize("settings", [{}, {"pages": None, "kv_cache": False}])
def test_a_request_that_never_fits_fails_alone(stage, expected, victim, settings):
    """Whenever a step serves it memory runs out, whoever else is in the step."""
    struck = stage(**settings)
    run = struck.loop.runner.run

    def strike(plan):
        if serves(plan, victim):
            raise KINDS["torch"]()
        return run(plan)

    struck.loop.runner.run = strike
    for request in mixed_requests():
        struck.submit(request)
    struck.run()
    with pytest.raises(DoesNotFitError, match=TOO_LITTLE):
        struck.result(victim)
    assert [struck.result(i).ids for i in range(5) if i != victim] == expected[:victim] + expected[victim + 1 :]
    assert struck.loop.stats.ended["failed"] == 1
    struck.loop.runner.run = run
    assert struck.ids(mixed_requests()) == expected
    struck.check_empty()


def test_one_that_fails_in_the_middle_of_its_answer_fails_alone(stage, expected):
    struck = stage()
    run = struck.loop.runner.run

    def strike(plan):
        if any(row.sequence.id == 1 and len(row.sequence.answer) == 4 for row in plan.rows):
            raise KINDS["torch"]()
        return run(plan)

    struck.loop.runner.run = strike
    for request in mixed_requests():
        struck.submit(request)
    struck.run()
    with pytest.raises(DoesNotFitError):
        struck.result(1)
    assert [i for piece in struck.deltas[1] for i in piece.ids] == list(expected[1][:4])
    assert [struck.result(i).ids for i in (0, 2, 3, 4)] == [expected[0], *expected[2:]]
    struck.check_empty()


def test_without_any_memory_every_request_is_told_and_the_next_one_works(stage, expected):
    struck = stage()
    faults = Faults(From(0), pool=struck.pool)
    for number in answer_under(faults, struck, mixed_requests()):
        with pytest.raises(DoesNotFitError, match=TOO_LITTLE):
            struck.result(number)
    assert set(struck.loop.stats.rungs) >= {
        "halve the encoders' slice",
        "halve the prefill chunk",
        "pause the newest request",
    }
    assert struck.ids(mixed_requests()) == expected
    struck.check_empty()


def test_after_quiet_steps_everything_is_as_it_was(stage, expected):
    struck = stage()
    limits = struck.scheduler.limits
    answer_under(Faults(From(0, 14), pool=struck.pool), struck, mixed_requests())
    lowered = struck.scheduler.limits
    assert lowered.crops < limits.crops
    assert lowered.step_tokens < limits.step_tokens
    assert lowered.rows < limits.rows
    moves = sum(struck.loop.stats.rungs.values())
    long = Request.ask("Go on.", sampling=replace(GREEDY, max_tokens=(moves + 1) * QUIET_STEPS))
    struck.answer([long])
    assert struck.scheduler.limits == limits
    assert struck.ids(mixed_requests()) == expected


def test_a_pause_gives_all_rows_back(stage):
    paused = stage()
    paused.scheduler.limits = replace(paused.scheduler.limits, rows=64)
    for request in mixed_requests():
        paused.submit(request)
    paused.step()
    rung = PauseNewest(paused.scheduler)
    assert rung.take(None)
    assert rung.take(None)
    assert paused.scheduler.limits.rows == 3
    rung.undo()
    rung.undo()
    assert paused.scheduler.limits.rows == 64


@pytest.mark.parametrize("kind", ["torch", "host", "CPU allocator"])
def test_nothing_of_a_failed_step_stays(stage, kind):
    """Not its tensors, once the ladder looks for memory; its traceback would keep them."""
    struck = stage()
    made, alive = [], []

    def fail(plan):
        tensor = torch.zeros(10)
        cycle = [tensor]
        cycle.append(cycle)  # Only collecting garbage frees it, and only once no frame has it.
        made.append(weakref.ref(tensor))
        raise KINDS[kind]()

    climb_down = struck.loop._ladder.climb_down

    def look(plan):
        alive.append(made[-1]() is not None)
        return climb_down(plan)

    struck.loop._ladder.climb_down = look
    struck.loop.runner.run = fail
    number = struck.submit(mixed_requests()[1])
    struck.run()
    assert len(alive) > 3
    assert not any(alive)
    assert isinstance(struck.ends[number], DoesNotFitError)
    assert struck.ends[number].__context__ is None
    assert struck.ends[number].__traceback__ is None


def test_another_error_fails_only_who_is_in_the_step(stage, expected):
    struck = stage()
    struck.submit(mixed_requests()[0])
    for _ in range(3):
        struck.step()
    struck.submit(mixed_requests()[1])
    with failing(Phi4MM, "encode_crops", lambda: ValueError("a broken tower"), times=1):
        while not any(isinstance(end, Exception) for end in struck.ends.values()):
            struck.step()
    with pytest.raises(ValueError, match="a broken tower"):
        struck.result(1)
    struck.scheduler.check()
    struck.run()
    assert set(struck.ends) >= {0, 1}
    assert struck.ids(mixed_requests()) == expected
    struck.check_empty()


def test_who_waits_for_a_picture_encodes_it_when_its_encoder_fails(stage, expected):
    """Two want one picture; the request whose slice fails goes, the other makes the picture itself."""
    shared = stage(crops_per_pass=1)
    first, second = (shared.submit(mixed_requests()[1]) for _ in range(2))
    with failing(Phi4MM, "encode_crops", lambda: ValueError("a broken tower"), times=1):
        shared.run()
    with pytest.raises(ValueError, match="a broken tower"):
        shared.result(first)
    assert shared.result(second).ids == expected[1]
    shared.check_empty()


def test_a_host_without_memory_for_an_attachment_is_one_sentence(stage, expected):
    struck = stage()
    with failing(struck.loop._preparation, "_prepare", MemoryError, times=1):
        for request in mixed_requests():
            struck.submit(request)
        struck.run()
    with pytest.raises(
        DoesNotFitError, match="this machine has too little memory for this request's attachments; send"
    ):
        struck.result(0)
    assert [struck.result(i).ids for i in range(1, 5)] == expected[1:]
    struck.check_empty()


def test_one_let_in_again_at_once_is_prepared_again(stage, expected):
    """Paused while it encodes and let in before the preparation has noticed: its own decoded pictures do not bar it."""
    large = stage(crops_per_pass=1)
    large.loop._preparation._host_bytes = 1
    number = large.submit(mixed_requests()[1])
    large.step()
    large.step()
    sequence = large.scheduler.sequences[0]
    assert sequence.state.value == "encoding"
    large.scheduler.pause(sequence)
    for _ in range(100):
        large.step()
    assert large.result(number).ids == expected[1]


def test_what_is_being_prepared_is_not_begun_again():
    prepared = []
    from memphi.engine.sequence import Sequence, State

    sequence = Sequence(0, None, None, 1, State.PREPARING)
    preparation = Preparation(prepared.append, lambda _: 0, 100, lambda: None)
    preparation.add(sequence)
    preparation.add(sequence)
    preparation.advance()
    preparation.add(sequence)
    preparation.close()
    assert len(prepared) == 1
    assert len(preparation.advance()) == 1
    assert not preparation._waiting
    assert not preparation._begun


def test_what_becomes_ready_while_it_is_asked_for_is_not_lost():
    from memphi.engine.sequence import Sequence, State

    class Asked(Future):
        """Becomes ready right after somebody was told that it is not."""

        def done(self):
            was = super().done()
            if not was:
                self.set_result(None)
            return was

    preparation = Preparation(lambda sequence: None, lambda _: 0, 100, lambda: None)
    preparation._begun = [(Sequence(0, None, None, 1, State.PREPARING), Asked())]
    assert [len(preparation.advance()) for _ in range(3)] == [0, 1, 0]
    preparation.close()


@pytest.mark.parametrize("at", ["encode_crops", "encode_windows", "forward"])
def test_the_engine_says_it_in_one_sentence_and_goes_on(model, tokenizer, at):
    engine = Engine(model, tokenizer)
    request = Request.ask("What is it?", [picture(1, 60, 60), clip(1, 0.3)], sampling=replace(GREEDY, max_tokens=2))
    expected = engine.generate(request).ids
    engine.loop.scheduler.media.drop_idle()
    with failing(Phi4MM, at, KINDS["torch"]):
        with pytest.raises(DoesNotFitError, match=TOO_LITTLE):
            engine.generate([request, request])
        with pytest.raises(DoesNotFitError):
            list(engine.stream(request))
    assert engine.generate(request).ids == expected
    engine.close()
    assert not engine.loop.has_work
    engine.loop.scheduler.check()
