"""A server of the page whose engine says what a test wants, when the test wants it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from memphi.request import Delta, FinishReason, Request
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.server.conftest import listening
from tests.server.fakes import FakeEngine, FakeWorker, said

MIB = 1 << 20
ACCOUNTS = {"weights": 300 * MIB, "context": 100 * MIB, "work space": 150 * MIB, "pages": 50 * MIB}


class Script:
    """What is answered: `answer` to everything; a test may set it, or hold answers back half-way."""

    def __init__(self) -> None:
        self.answer: list[Delta | Exception] | None = said("It is a fake.")
        """None: words without an end."""
        self.go_on = threading.Event()
        """Clear it to hold answers after their first piece."""
        self.left = threading.Event()
        """An answer was cancelled."""
        self.go_on.set()
        self.engine = FakeEngine(self._say)
        self.engine.stats.accounts = dict(ACCOUNTS)
        worker = self.engine.worker
        worker.cancel = lambda number: self.left.set()
        worker.submit = lambda submission, mailbox: threading.Thread(
            target=FakeWorker.submit, args=(worker, submission, mailbox), daemon=True
        ).start()

    @property
    def last(self) -> Request:
        """The request that came last."""
        return self.engine.requests[-1]

    def _say(self, request: Request) -> Iterator[Delta | Exception]:
        if self.answer is None:
            yield from self._endless()
            return
        for place, piece in enumerate(self.answer):
            if place:
                self.go_on.wait(timeout=20)
            yield piece

    def _endless(self) -> Iterator[Delta]:
        for number in range(2000):
            yield Delta(f"word{number} ", (number,))
            if self.left.wait(timeout=0.01):
                break
        yield Delta("", (), FinishReason.CANCELLED)


@contextmanager
def scripted(**settings) -> Iterator[tuple[str, Script]]:
    """The address of a server with these settings, and its script."""
    script = Script()
    with listening(make_app(script.engine, ServerSettings("scripted", **settings))) as address:
        yield address, script
