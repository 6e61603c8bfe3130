"""Events from an engine's thread to those who wait in an event loop: one wake-up brings all that are there."""

import asyncio
from collections import deque
from contextlib import suppress

from memphi.engine.messages import Event

Letterbox = asyncio.Queue[Event]


class Posts:
    """The way from other threads into one event loop.

    A step brings every open answer a piece; to wake the loop for each of them takes longer than all the rest.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[Letterbox, Event]] = deque()
        self._is_coming = False
        """Whether the loop will look for what was sent."""

    def send(self, letterbox: Letterbox, event: Event) -> None:
        """Put an event into a letterbox of the loop; from any thread. Nothing where the loop is closed."""
        self._sent.append((letterbox, event))
        if not self._is_coming:
            self._is_coming = True
            with suppress(RuntimeError):  # The loop is closed: nobody listens any more.
                self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_coming = False  # First: whoever sends from now on wakes the loop once more.
        while self._sent:
            letterbox, event = self._sent.popleft()
            letterbox.put_nowait(event)
