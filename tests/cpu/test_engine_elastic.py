"""Memory follows the work: it goes back when idle and when others need it, and no answer changes."""

import time
from dataclasses import replace

import pytest

from memphi.config import EngineConfig
from memphi.engine.engine import make_loop
from memphi.engine.messages import Submission
from memphi.engine.worker import _sequence
from memphi.memory.planner import reserve_bytes
from tests.cpu.test_engine import engine, folder, mixed_requests  # noqa: F401

GIB = 1 << 30


def accepted(source, loop, requests):
    for request in requests:
        for part in source.accept(request):
            submission = Submission(next(source._ids), part)
            loop.add(_sequence(submission, source.model.config.language, source._worker.bounds), submission.started)


def run_all(loop):
    """Step until every request has ended."""
    events = []
    while loop.has_work:
        events += loop.step()
        time.sleep(0.0005 if loop.stalled else 0)
    return events


def answers(events):
    """Ids of the answers, oldest request first."""
    return [event.result.ids for event in sorted(events, key=lambda event: event.id) if event.result]


@pytest.fixture
def source(folder):  # noqa: F811
    built = engine(folder)
    yield built
    built.close()


def loop_of(source, **settings):
    return make_loop(source.model, source.tokenizer, source.plan, EngineConfig(**settings), lambda: None)


def test_an_idle_engine_gives_its_memory_back(source):
    loop = loop_of(source, idle_seconds=0.05)
    accepted(source, loop, mixed_requests())
    run_all(loop)
    kept = loop.scheduler.reservations.pages
    assert kept.idle_pages
    assert loop.scheduler.media.held_bytes
    time.sleep(0.06)
    loop.step()
    assert not kept.idle_pages
    assert not loop.scheduler.media.held_bytes
    assert loop.runner.pool.mapped_bytes <= 2**16
    accepted(source, loop, mixed_requests())
    run_all(loop)


def test_a_pool_that_shrinks_and_grows_changes_no_answer(source):
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=40)) for r in mixed_requests()]
    undisturbed = loop_of(source)
    accepted(source, undisturbed, requests)
    expected = answers(run_all(undisturbed))

    loop = loop_of(source)
    accepted(source, loop, requests)
    elastic, pages, total = loop._elastic, loop.scheduler.reservations.pages, 80 * GIB
    capacity, events, sizes = pages.capacity, [], set()
    for round_ in range(100000):
        if not loop.has_work:
            break
        # Others take all but a little of the card every few steps, and leave again.
        elastic.make_way(0 if round_ % 10 == 5 else total, total)
        loop.scheduler.check()
        sizes.add(pages.capacity)
        events += loop.step()
        time.sleep(0.0005 if loop.stalled else 0)
    assert answers(events) == expected
    assert min(sizes) < capacity
    elastic.make_way(total, total)
    assert pages.capacity == capacity


def test_the_oldest_request_keeps_its_pages(source):
    loop = loop_of(source)
    accepted(source, loop, mixed_requests()[:2])
    while not loop.scheduler.reservations.pages.used_pages:
        loop.step()
    loop._elastic.make_way(0, 80 * GIB)
    states = [sequence.reserved_pages > 0 for sequence in loop.scheduler.sequences]
    assert states == [True, False]
    loop._elastic.make_way(80 * GIB, 80 * GIB)
    assert len(answers(run_all(loop))) == 2


def test_what_is_left_to_others_is_a_twentieth_or_half_a_gib():
    assert reserve_bytes(80 * GIB) == 4 * GIB
    assert reserve_bytes(8 * GIB) == GIB // 2
