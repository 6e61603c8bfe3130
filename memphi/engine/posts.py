"""Events from an engine's thread to those who wait in an event loop: one wake-up brings all that are there."""

import asyncio
from collections import deque
from contextlib import suppress

from memphi.engine.messages import Event

Letterbox = asyncio.Queue[Event]

MANY_EVENTS, REST_SECONDS = 16, 0.01
"""After so many events at once the next come that much later, and what an answer grew by meanwhile comes as one piece:
to tell each of many listeners of every token would take a process all its time."""


class Posts:
    """The way from other threads into one event loop.

    A step brings every open answer a piece; to wake the loop for each of them takes longer than all the rest.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[Letterbox, Event]] = deque()
        self._is_coming = self._is_urgent = False
        """Whether the loop will look for what was sent; and that at once."""
        self._rests_until = 0.0

    def send(self, letterbox: Letterbox, event: Event) -> None:
        """Put an event into a letterbox of the loop; from any thread. Nothing where the loop is closed.

        What ends an answer, and all before it, waits for nothing.
        """
        self._sent.append((letterbox, event))
        is_last = event.delta is None
        if self._is_coming and (self._is_urgent or not is_last):
            return
        self._is_coming, self._is_urgent = True, is_last
        with suppress(RuntimeError):  # The loop is closed: nobody listens any more.
            self.loop.call_soon_threadsafe(self._come)

    def _come(self) -> None:
        if self._is_urgent or self.loop.time() >= self._rests_until:
            self._hand_out()
        else:
            self.loop.call_at(self._rests_until, self._hand_out)

    def _hand_out(self) -> None:
        self._is_coming = self._is_urgent = False  # First: whoever sends from now on wakes the loop once more.
        count = 0
        while self._sent:
            letterbox, event = self._sent.popleft()
            letterbox.put_nowait(event)
            count += 1
        if count >= MANY_EVENTS:
            self._rests_until = self.loop.time() + REST_SECONDS
