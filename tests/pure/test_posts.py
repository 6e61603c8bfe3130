"""Events from threads into an event loop: all of them, in order, with few wake-ups."""

import asyncio
import threading

from memphi.engine.messages import Event
from memphi.engine.posts import Posts

COUNT = 500


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
