"""Memory follows the work: it goes back when idle and when others need it, and no answer changes."""

import time
from dataclasses import replace

import pytest
import torch

from memphi.cache.pool import PagePool
from memphi.config import EngineConfig
from memphi.engine.engine import make_loop
from memphi.engine.loop import WAITING
from memphi.engine.messages import Submission
from memphi.engine.worker import _sequence
from memphi.errors import DoesNotFitError
from memphi.memory.sizing import reserve_bytes
from memphi.request import FinishReason, Request
from tests.cpu.test_engine import engine, folder, mixed_requests  # noqa: F401
from tests.scenes import GREEDY, alone

GIB = 1 << 30
CARD_PAGES, RESERVE_PAGES = 60, 4


def accepted(source, loop, requests):
    for request in requests:
        for part in source.accept(request):
            submission = Submission(next(source._ids), part)
            loop.add(_sequence(submission, source._worker.bounds), submission.started)


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


class Card:
    """A card of a few pages, shared with a neighbour; the pool maps no more than it has."""

    def __init__(self, stage, monkeypatch):
        self.stage, self.pool, self.neighbour_pages = stage, stage.pool, 0
        self.mapped = {0}
        monkeypatch.setattr("memphi.engine.elastic.reserve_bytes", lambda total: RESERVE_PAGES * self.pool.page_bytes)
        monkeypatch.setattr(PagePool, "mapped_bytes", property(lambda pool: len(self.mapped) * pool.page_bytes))
        self.pool.ensure, self.pool.trim = self._ensure, self._trim
        stage.loop._elastic._free_memory = self._free_memory
        monkeypatch.setattr("memphi.engine.elastic.LOOK_SECONDS", 0.0)

    @property
    def free_pages(self):
        return CARD_PAGES - self.neighbour_pages - len(self.mapped)

    def _free_memory(self):
        return self.free_pages * self.pool.page_bytes, CARD_PAGES * self.pool.page_bytes

    def _ensure(self, pages):
        wanted = self.mapped | set(pages)
        if len(wanted) > CARD_PAGES - self.neighbour_pages:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        PagePool.ensure(self.pool, pages)
        self.mapped = wanted

    def _trim(self, keep):
        self.mapped = {page for page in self.mapped if page == 0 or page in keep}
        return PagePool.trim(self.pool, keep)


LONG = Request.ask("word " * 120, sampling=GREEDY)
SHORT = Request.ask("hello", sampling=replace(GREEDY, max_tokens=30))


@pytest.fixture
def card(stage, monkeypatch):
    """A card whose neighbour takes all that is free while the oldest of two requests is half prefilled."""
    shared = Card(stage(pages=52, step_tokens=128), monkeypatch)
    for request in (LONG, SHORT):
        shared.stage.submit(request)
    for _ in range(2):
        shared.stage.step()
    oldest = shared.stage.scheduler.active[0]
    assert oldest.pending > 1
    shared.neighbour_pages = CARD_PAGES - len(shared.mapped)
    while WAITING not in shared.stage.loop.stats.rungs:
        shared.stage.step()
    return shared


def test_a_neighbour_on_the_card_costs_nothing_but_time(card, model, tokenizer, caplog):
    stage = card.stage
    for _ in range(5):
        stage.step()
        stage.scheduler.check()
        assert stage.loop.stalled
    assert not stage.ends
    assert stage.loop.stats.rungs[WAITING] == 1
    card.neighbour_pages = 0
    stage.step()
    assert not stage.loop.stalled
    stage.run()
    assert [stage.result(i).ids for i in (0, 1)] == [r.ids for r in alone(model, tokenizer, [LONG, SHORT])]
    assert sum(WAITING in record.message for record in caplog.get_records("setup")) == 1
    assert not caplog.records


def test_who_waits_for_a_neighbour_may_be_cancelled_and_joined(card, model, tokenizer):
    stage = card.stage
    third = stage.submit(SHORT)
    stage.step()
    stage.cancel(0)
    assert stage.result(0).finish_reason is FinishReason.CANCELLED
    stage.run()  # What the long one held is enough for the short ones.
    assert stage.result(1).ids == stage.result(third).ids == alone(model, tokenizer, [SHORT])[0].ids


def test_nobody_waits_for_a_neighbour_for_ever(card, monkeypatch):
    monkeypatch.setattr("memphi.engine.loop.PATIENCE_SECONDS", 0.0)
    card.stage.run()
    with pytest.raises(DoesNotFitError, match="too little memory for this request"):
        card.stage.result(0)
    assert len(card.stage.result(1).ids) == 30


def test_who_needs_more_than_a_neighbour_left_waits_for_it_and_not_for_ever(stage, monkeypatch):
    """The pool shrinks to what the oldest request has, which then needs another page."""
    shared = Card(stage(pages=52, speculation=False), monkeypatch)
    long = shared.stage.submit(Request.ask("word " * 60, sampling=replace(GREEDY, max_tokens=400)))
    for _ in range(3):
        shared.stage.step()
    shared.neighbour_pages = CARD_PAGES - 25
    while shared.stage.scheduler.active:
        shared.stage.step()
    short = shared.stage.submit(SHORT)
    for _ in range(20):
        shared.stage.step()
    assert not shared.stage.ends
    assert shared.stage.loop.stalled
    assert shared.stage.loop.stats.rungs[WAITING] == 1
    monkeypatch.setattr("memphi.engine.loop.PATIENCE_SECONDS", 0.0)
    shared.stage.run()
    with pytest.raises(DoesNotFitError, match="too little memory for this request"):
        shared.stage.result(long)
    assert len(shared.stage.result(short).ids) == 30


def test_who_waits_goes_on_when_the_neighbour_is_gone(stage, monkeypatch, model, tokenizer):
    shared = Card(stage(pages=52, speculation=False), monkeypatch)
    request = Request.ask("word " * 60, sampling=replace(GREEDY, max_tokens=400))
    long = shared.stage.submit(request)
    for _ in range(3):
        shared.stage.step()
    shared.neighbour_pages = CARD_PAGES - 25
    while shared.stage.scheduler.active:
        shared.stage.step()
    for _ in range(5):
        shared.stage.step()
    shared.neighbour_pages = 0
    shared.stage.run()
    assert shared.stage.result(long).ids == alone(model, tokenizer, [request])[0].ids
    assert not shared.stage.loop._waiting_since


def test_with_a_dial_nobody_waits_for_others(stage):
    dialled = stage()
    assert not dialled.loop._elastic.is_crowded()


def test_the_allocator_s_unused_blocks_are_no_neighbour(stage, monkeypatch):
    """They are the work space of steps, which the pool has to leave, whether it is taken just now or not."""
    shared = stage()
    elastic, pages, total = shared.loop._elastic, shared.scheduler.reservations.pages, 80 * GIB
    most, reserve, unused_bytes = pages.capacity, reserve_bytes(total), [0]
    elastic._workspace_bytes = 3 * GIB
    monkeypatch.setattr(type(elastic._gauge), "unused_bytes", lambda gauge: unused_bytes[0])
    for unused_bytes[0], free_bytes in ((3 * GIB, reserve), (0, reserve + 3 * GIB), (5 * GIB, reserve - 2 * GIB)):
        elastic.make_way(free_bytes, total)
        assert pages.capacity == most
    unused_bytes[0] = 0
    elastic.make_way(reserve, total)
    assert pages.capacity < most


def test_a_pool_grows_by_what_is_there_whatever_was_promised(stage, monkeypatch):
    """Pages without memory behind them would be counted twice, once as free and once as the pool's."""
    shared = Card(stage(pages=52), monkeypatch)
    elastic, pages = shared.stage.loop._elastic, shared.stage.scheduler.reservations.pages
    shared.neighbour_pages = CARD_PAGES - 2
    elastic.make_way(*shared._free_memory())
    assert pages.capacity == 1
    shared.neighbour_pages = 20
    for _ in range(4):
        elastic.make_way(*shared._free_memory())
        assert pages.capacity == CARD_PAGES - 20 - RESERVE_PAGES
