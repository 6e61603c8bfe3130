"""Events from threads into an event loop: all of them, in order, with few wake-ups."""

import asyncio
import threading

from memphi.engine.messages import Event
from memphi.engine.posts import MANY_EVENTS, Posts
from memphi.request import Delta

COUNT, PIECE = 500, Delta("a", (1,))


def test_all_that_is_sent_arrives_in_order_from_every_thread():
    async def hear():
        posts = Posts(asyncio.get_running_loop())
        boxes = [asyncio.Queue() for _ in range(4)]
        threads = [threading.Thread(target=send, args=(posts, box)) for box in boxes]
        for thread in threads:
            thread.start()
        heard = [[(await box.get()).id for _ in range(COUNT)] for box in boxes]
        for thread in threads:
            thread.join()
        return heard

    def send(posts, box):
        for number in range(COUNT):
            posts.send(box, Event(number))

    assert asyncio.run(hear()) == [list(range(COUNT))] * 4


def test_one_wake_up_brings_all_that_is_there(monkeypatch):
    async def hear():
        loop = asyncio.get_running_loop()
        wake, calls = loop.call_soon_threadsafe, []
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (calls.append(call), wake(call)))
        posts, box = Posts(loop), asyncio.Queue()
        for _ in range(2):
            for number in range(COUNT):
                posts.send(box, Event(number))
            assert [(await box.get()).id for _ in range(COUNT)] == list(range(COUNT))
        return len(calls)

    assert asyncio.run(hear()) == 2


def test_nobody_listens_in_a_closed_loop():
    loop = asyncio.new_event_loop()
    posts, box = Posts(loop), asyncio.Queue()
    loop.close()
    posts.send(box, Event(1))
    assert box.empty()


def test_after_many_events_the_next_have_time_and_an_end_has_none(monkeypatch):
    monkeypatch.setattr("memphi.engine.posts.REST_SECONDS", 3600.0)

    async def hear():
        posts, box = Posts(asyncio.get_running_loop()), asyncio.Queue()
        for number in range(MANY_EVENTS - 1):
            posts.send(box, Event(number, delta=PIECE))
        few = [(await box.get()).id for _ in range(MANY_EVENTS - 1)]
        for number in range(MANY_EVENTS):
            posts.send(box, Event(number, delta=PIECE))
        many = [(await box.get()).id for _ in range(MANY_EVENTS)]
        posts.send(box, Event(1, delta=PIECE))
        await asyncio.sleep(0.05)
        assert box.empty()
        posts.send(box, Event(2, delta=PIECE))
        posts.send(box, Event(3))
        return few, many, [(await box.get()).id for _ in range(3)]

    few, many, rest = asyncio.run(hear())
    assert few == [*range(MANY_EVENTS - 1)]
    assert many == [*range(MANY_EVENTS)]
    assert rest == [1, 2, 3]


def test_who_has_time_comes_in_the_end():
    async def hear():
        posts, box = Posts(asyncio.get_running_loop()), asyncio.Queue()
        for number in range(3 * MANY_EVENTS):
            posts.send(box, Event(number, delta=PIECE))
            await asyncio.sleep(0)
        return [(await asyncio.wait_for(box.get(), 5)).id for _ in range(3 * MANY_EVENTS)]

    assert asyncio.run(hear()) == [*range(3 * MANY_EVENTS)]
