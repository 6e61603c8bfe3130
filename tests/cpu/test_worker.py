"""One engine, many callers: whoever comes, goes, breaks off or is interrupted, nobody else notices and nobody hangs."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace

import pytest

from memphi.config import EngineConfig
from memphi.engine import engine as engine_module
from memphi.engine.engine import Engine
from memphi.engine.messages import Submission
from memphi.engine.pressure import Part
from memphi.errors import DoesNotFitError, WorkerError
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import FinishReason, Request
from tests.faults import KINDS, failing
from tests.scenes import GREEDY, mixed_requests, picture, plan_of

PATIENCE_SECONDS = 30
ENDLESS = Request.ask("Go on.", sampling=replace(GREEDY, max_tokens=8000))


@pytest.fixture
def engine(model, tokenizer):
    made = make_engine(model, tokenizer)
    yield made
    made.close()
    assert not made.loop.has_work
    if not made.broken:
        made.loop.scheduler.check()
        assert made.loop.scheduler.reservations.claimed_pages == 0


def make_engine(model, tokenizer, **settings):
    config = EngineConfig(**{"rows": 8, **settings})
    made = Engine(model, tokenizer, config, plan_of(model, config, pages=1024))
    made.broken = False
    return made


def wait_until(holds, what):
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, f"{what} does not happen"
        time.sleep(0.005)


def wait_for_rest(engine):
    wait_until(lambda: not engine.loop.has_work, "the end of all requests")


def run_threads(*works):
    """Do all at once; returns what each returns or raises."""
    outcomes = {}

    def do(place, work):
        try:
            outcomes[place] = work()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=do, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def join(threads):
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a caller hangs"


def test_threads_share_an_engine(engine, expected):
    requests = mixed_requests()
    orders = [[(first + step) % 5 for step in range(5)] for first in range(5)]
    works = [lambda order=order: engine.generate([requests[i] for i in order]) for order in orders]
    works += [lambda i=i: "".join(piece.text for piece in engine.stream(requests[i])) for i in range(5)]
    threads, outcomes = run_threads(*works)
    join(threads)
    for place, order in enumerate(orders):
        assert [result.ids for result in outcomes[place]] == [expected[i] for i in order]
    assert [outcomes[5 + i] for i in range(5)] == [outcomes[0][i].text for i in range(5)]


def test_tasks_share_an_engine_and_may_leave(engine, expected):
    requests = mixed_requests()

    async def listen(request, most=None):
        ids = []
        async for delta in engine.submit(request):
            ids += delta.ids
            if most is not None and len(ids) >= most:
                break
        return tuple(ids)

    async def all_of_them():
        endless = asyncio.create_task(listen(ENDLESS))
        never_heard = asyncio.create_task(listen(ENDLESS))
        left = asyncio.create_task(listen(ENDLESS, most=3))
        never_heard.cancel()
        answers = await asyncio.gather(*(listen(request) for request in requests))
        assert len(await left) >= 3
        endless.cancel()
        for task in (endless, never_heard):
            with pytest.raises(asyncio.CancelledError):
                await task
        return answers

    assert asyncio.run(asyncio.wait_for(all_of_them(), PATIENCE_SECONDS)) == expected
    wait_for_rest(engine)


def test_a_text_is_encoded_once(engine, monkeypatch):
    seen, encode_text = [], Tokenizer.encode_text
    monkeypatch.setattr(Tokenizer, "encode_text", lambda self, text: seen.append(text) or encode_text(self, text))
    engine.generate(Request.ask("Once and no more.", sampling=GREEDY))
    assert [text for text in seen if "no more" in text] == ["Once and no more."]


def test_pieces_that_wait_for_their_reader_are_joined(engine):
    request = mixed_requests()[0]
    whole = engine.generate(request)

    async def listen_late():
        pieces = []
        async for delta in engine.submit(request):
            time.sleep(0.2)  # The event loop too is held up.
            pieces.append(delta)
        return pieces

    pieces = asyncio.run(listen_late())
    assert len(pieces) < len(whole.ids)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(number for piece in pieces for number in piece.ids) == whole.ids
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [whole.finish_reason]


def test_errors_reach_a_task(engine):
    async def listen(request):
        return [delta async for delta in engine.submit(request)]

    with pytest.raises(DoesNotFitError, match="8192"):
        asyncio.run(listen(Request.ask("word " * 9000)))
    with failing(engine.loop.runner, "run", KINDS["torch"]), pytest.raises(DoesNotFitError, match="too little memory"):
        asyncio.run(listen(mixed_requests()[0]))


def test_a_loop_that_was_closed_over_a_request_harms_nobody(engine, expected):
    """Its generators are not ended, and what is posted to them finds no loop."""
    loop = asyncio.new_event_loop()
    pieces = engine.submit(ENDLESS)
    assert loop.run_until_complete(anext(pieces)).ids
    loop.close()
    assert engine.generate(mixed_requests()[0]).ids == expected[0]
    del pieces
    engine.close()


def test_a_stream_closed_early_frees_what_it_held(engine, expected):
    for _ in range(3):
        stream = engine.stream(ENDLESS)
        assert next(stream).ids
        stream.close()
    never_begun = engine.stream(ENDLESS)
    wait_for_rest(engine)
    assert engine.stats.ended["cancelled"] == 3
    assert engine.generate(mixed_requests()[1]).ids == expected[1]
    never_begun.close()


def test_closing_answers_everybody(model, tokenizer):
    engine = make_engine(model, tokenizer, rows=2)
    works = [lambda: engine.generate(ENDLESS) for _ in range(4)]
    works.append(lambda: list(engine.stream(ENDLESS)))
    threads, outcomes = run_threads(*works)
    wait_until(lambda: len(engine.loop.scheduler.sequences) == 5, "the arrival of all requests")
    wait_until(lambda: engine.stats.answer_tokens > 5, "an answer")
    threads_of_late, late = run_threads(*[lambda: engine.generate(ENDLESS) for _ in range(4)])
    engine.close()
    join([*threads, *threads_of_late])
    assert len(outcomes) == 5
    assert all(outcomes[i].finish_reason is FinishReason.CANCELLED for i in range(4))
    assert outcomes[4][-1].finish_reason is FinishReason.CANCELLED
    for outcome in late.values():
        assert isinstance(outcome, WorkerError) or outcome.finish_reason is FinishReason.CANCELLED
    engine.loop.scheduler.check()
    assert not engine.loop.scheduler.sequences
    with pytest.raises(WorkerError, match="the engine has stopped"):
        engine.generate(ENDLESS)
    engine.close()


def test_an_error_in_a_step_fails_its_requests_only(engine, expected):
    with failing(engine.loop.runner, "run", lambda: ValueError("a broken card"), times=1):
        with pytest.raises(ValueError, match="a broken card"):
            engine.generate(mixed_requests()[0])
        assert engine.generate(mixed_requests()[1]).ids == expected[1]


def test_an_engine_that_breaks_says_so_to_everybody(engine):
    threads, outcomes = run_threads(lambda: engine.generate(ENDLESS), lambda: list(engine.stream(ENDLESS)))
    wait_until(lambda: engine.stats.answer_tokens > 5, "an answer")
    engine.broken = True
    assert gc.get_freeze_count() > 0
    with failing(engine.loop.scheduler, "plan_step", lambda: AssertionError("pages are missing")):
        join(threads)
    assert gc.get_freeze_count() == 0  # Garbage that is older than the work is looked at again.
    for outcome in outcomes.values():
        assert isinstance(outcome, WorkerError)
        assert str(outcome) == "the engine has stopped after AssertionError: pages are missing; load the model again"
        assert isinstance(outcome.__cause__, AssertionError)
    with pytest.raises(WorkerError, match="load the model again"):
        engine.generate(ENDLESS)
    engine.loop.close()


def test_an_engine_that_nobody_has_ends_its_thread(model, tokenizer):
    engine = make_engine(model, tokenizer)
    engine.generate(mixed_requests()[0])
    thread, gone = engine._worker._thread, weakref.ref(engine)
    assert thread.is_alive()
    del engine
    assert gone() is None
    assert not thread.is_alive()


def test_an_engine_may_be_collected_in_its_own_thread(model, tokenizer, monkeypatch):
    """Running out of memory collects garbage, and an engine in a cycle may be part of it."""
    unheard = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    engine = make_engine(model, tokenizer)
    engine.itself = engine
    worker, gone = engine._worker, weakref.ref(engine)
    request = mixed_requests()[0]
    submission = Submission(0, Part(request, engine.measure(request)))
    run = engine.loop.runner.run
    fails = iter([True])
    engine.loop.runner.run = lambda plan: (_ for _ in ()).throw(KINDS["torch"]()) if next(fails, False) else run(plan)
    events = []
    gc.collect()
    gc.disable()
    try:
        del engine
        worker.submit(submission, events.append)
        worker._thread.join(PATIENCE_SECONDS)
    finally:
        gc.enable()
    assert gone() is None
    assert not worker._thread.is_alive()
    assert events[-1].result.finish_reason is FinishReason.CANCELLED
    assert not unheard


def test_an_engine_may_be_collected_where_its_prompts_are_prepared(model, tokenizer, monkeypatch):
    """Any thread may collect garbage, and the engine's waits at its end for those that prepare."""
    begun, go_on, prepare = threading.Event(), threading.Event(), engine_module.prepare_sequence

    def prepare_and_collect(*arguments):
        begun.set()
        go_on.wait()
        gc.unfreeze()  # As another engine does that comes to rest.
        gc.collect()
        return prepare(*arguments)

    monkeypatch.setattr(engine_module, "prepare_sequence", prepare_and_collect)
    engine = make_engine(model, tokenizer)
    engine.itself = engine
    thread, gone, events = engine._worker._thread, weakref.ref(engine), []
    (part,) = engine.accept(Request.ask("What is it?", [picture(1)], sampling=GREEDY))
    engine.hand_over(part, events.append)
    begun.wait()
    gc.disable()
    try:
        del engine
        go_on.set()
        thread.join(PATIENCE_SECONDS)
    finally:
        gc.enable()
    assert gone() is None
    assert not thread.is_alive()
    assert events[-1].result.finish_reason is FinishReason.CANCELLED


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_an_interrupt_frees_the_request(engine, expected):
    def interrupt():
        wait_until(lambda: engine.stats.answer_tokens > 5, "an answer")
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate([ENDLESS, ENDLESS])
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_rest(engine)
    assert engine.stats.ended["cancelled"] == 2
    assert engine.generate(mixed_requests()[2]).ids == expected[2]


def test_an_idle_engine_waits(engine):
    """A loop with nothing to do costs nothing."""
    engine.generate(mixed_requests()[0])
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2
