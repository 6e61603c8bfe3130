"""Which of several engines gets a request: the least busy, the one that knows its beginning, another where one ends."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.cli.options import parse_devices
from memphi.engine.messages import Event, Submission
from memphi.engine.pressure import Bounds, Part
from memphi.engine.spread import ANSWER_TOKENS, MOST_HOMES, Spread, _names, beginning_of
from memphi.errors import BusyError, LostError, WorkerError
from memphi.request import Delta, Footprint, InputMode, Media, Message, Request, SamplingParams

LOST, BUSY = LostError("gone"), BusyError("full")
PIECE, END = Delta("a", (1,)), Delta("", ())


class FakeWorker:
    """Keeps what it is given; a test says what becomes of it."""

    def __init__(self, tokens=10_000):
        self.bounds = Bounds(tokens, 100_000)
        self.state = "ready"
        self.mailboxes = {}
        self.given, self.cancelled, self.calls = [], [], []
        self.refuses = False

    def submit(self, submission, mailbox):
        if self.refuses:
            raise WorkerError("left alone")
        self.given.append(submission.id)
        self.mailboxes[submission.id] = mailbox

    def cancel(self, number):
        self.cancelled.append(number)

    def revive(self):
        self.calls.append("revive")

    def end(self):
        self.calls.append("end")

    def close(self):
        self.calls.append("close")

    def tell(self, number, **what):
        """One event of a request; any but a piece of its answer is its last."""
        mailbox = self.mailboxes[number] if "delta" in what else self.mailboxes.pop(number)
        mailbox(Event(number, **what))


class Scene:
    """A spread over some fakes, and what its callers hear."""

    def __init__(self, *workers):
        self.workers = workers
        self.spread = Spread(workers)
        self.heard = []
        self._next = 0

    def ask(self, text="Hello", tokens=100, max_tokens=None, request=None):
        """Submit a request; returns its number."""
        number, self._next = self._next, self._next + 1
        request = request or Request.ask(text, sampling=SamplingParams(max_tokens=max_tokens))
        part = Part(request, Footprint(InputMode.TEXT, tokens, (), ()))
        self.spread.submit(Submission(number, part), self.heard.append)
        return number

    def place(self, number):
        """Whose a request is now."""
        return next(place for place, worker in enumerate(self.workers) if number in worker.mailboxes)

    def end(self, number):
        self.workers[self.place(number)].tell(number)


@pytest.fixture
def scene():
    return Scene(FakeWorker(), FakeWorker(), FakeWorker())


def test_equal_requests_are_dealt_in_turn(scene):
    for number in range(9):
        scene.ask(f"question {number}")
    assert [len(worker.given) for worker in scene.workers] == [3, 3, 3]


def test_an_idle_spread_gives_each_its_turn(scene):
    """What one of them would keep of earlier requests is kept by all."""
    for number in range(6):
        scene.end(scene.ask(f"question {number}"))
    assert [worker.given for worker in scene.workers] == [[0, 3], [1, 4], [2, 5]]


def test_long_prompts_count_until_their_answer_begins(scene):
    long = scene.ask("a book", tokens=5 * ANSWER_TOKENS)
    others = [scene.ask(f"question {number}") for number in range(8)]
    assert {scene.place(number) for number in others} == {1, 2}
    scene.workers[0].tell(long, delta=PIECE)
    assert scene.place(scene.ask("one more")) == 0


def test_whoever_has_ended_a_request_gets_the_next(scene):
    numbers = [scene.ask(f"question {number}") for number in range(6)]
    scene.end(numbers[4])
    assert scene.place(scene.ask("one more")) == 1


def test_a_conversation_goes_back_to_where_it_was(scene):
    turns = (Message("system", ("Be brief.",)), Message("user", ("Hello",)))
    first = scene.ask(request=Request(turns))
    home = scene.place(first)
    scene.end(first)
    for number in range(4):
        scene.end(scene.ask(f"another question {number}"))
    turns = (*turns, Message("assistant", ("Hi",)), Message("user", ("And?",)))
    assert scene.place(scene.ask(request=Request(turns), tokens=300)) == home


@pytest.mark.parametrize(("more", "place"), [(-1, 1), (1, 0)])
def test_a_conversation_waits_no_longer_than_its_prompt_takes_elsewhere(more, place):
    scene = Scene(FakeWorker(20_000), FakeWorker(20_000))
    scene.end(scene.ask("Hello"))
    scene.workers[1].refuses = True
    for number in range(5):
        scene.ask(f"question {number}")
    scene.workers[1].refuses = False
    waiting_tokens = 5 * (ANSWER_TOKENS + 100)
    assert scene.place(scene.ask("Hello", tokens=waiting_tokens + more)) == place


def picture(name):
    return Media("image", name, b"", digest=name)


def test_what_begins_alike():
    circle, square = picture("circle"), picture("square")
    asked = Request.ask("What is it?", [circle])
    assert beginning_of(asked) == beginning_of(Request.ask("What colour is it?", [circle, square]))
    assert beginning_of(asked) != beginning_of(Request.ask("What is it?", [square]))
    assert beginning_of(asked) != beginning_of(Request.ask("What is it?", [replace(circle, detail="low")]))
    assert beginning_of(asked) != beginning_of(Request.ask("What is it?", [circle], system="Be brief."))
    hello = Request.ask("Hello", system="Be brief.")
    later = (*hello.messages, Message("assistant", ("Hi",)), Message("user", (circle, "And this?")))
    assert beginning_of(hello) == beginning_of(Request(later))
    assert beginning_of(hello) != beginning_of(Request.ask("Hello"))


def test_where_conversations_are_is_kept_of_so_many(scene):
    for number in range(MOST_HOMES + 10):
        scene.end(scene.ask(f"question {number}"))
    assert len(scene.spread._homes) == MOST_HOMES


def test_one_that_loads_again_is_asked_last(scene):
    scene.workers[0].state, scene.workers[1].state = "loading", "failed"
    assert {scene.place(scene.ask(f"question {number}")) for number in range(20)} == {2}
    scene.workers[2].state = "failed"
    assert scene.place(scene.ask()) == 0
    assert scene.workers[1].calls.count("revive") == 21, "whoever asks starts what may be started"


def test_one_that_takes_nothing_is_passed_over(scene):
    scene.workers[0].refuses = True
    assert [scene.place(scene.ask(f"question {number}")) for number in range(4)] == [1, 2, 1, 2]
    scene.workers[1].refuses = scene.workers[2].refuses = True
    with pytest.raises(WorkerError, match="left alone"):
        scene.ask()
    assert len(scene.spread._open) == sum(map(len, scene.spread._waiting)) == 4


def test_the_largest_requests_go_where_they_fit():
    scene = Scene(FakeWorker(1000), FakeWorker(5000))
    assert scene.spread.bounds.tokens == 5000
    numbers = [scene.ask(f"book {number}", tokens=2000) for number in range(3)]
    assert [scene.place(number) for number in numbers] == [1, 1, 1]
    assert scene.place(scene.ask("long answer", tokens=10, max_tokens=3000)) == 1
    assert scene.place(scene.ask("short")) == 0


@pytest.mark.parametrize("error", [LOST, BUSY])
def test_a_request_that_has_said_nothing_is_asked_of_another(scene, error):
    first = scene.ask()
    scene.workers[0].tell(first, error=error)
    assert scene.place(first) == 1
    assert scene.heard == []
    scene.workers[1].tell(first, delta=PIECE)
    scene.workers[1].tell(first)
    assert [event.delta for event in scene.heard] == [PIECE, None]
    assert not scene.spread._open


def test_it_is_so_only_once(scene):
    first = scene.ask()
    scene.workers[0].tell(first, error=LOST)
    scene.workers[1].tell(first, error=LOST)
    assert [event.error for event in scene.heard] == [LOST]
    assert not scene.spread._open


def test_who_may_not_wait_is_asked_of_each_engine_once():
    scene = Scene(*(FakeWorker() for _ in range(3)))
    first, places = scene.ask(), []
    for _ in range(3):
        assert scene.heard == []
        places.append(scene.place(first))
        scene.workers[places[-1]].tell(first, error=BUSY)
    assert sorted(places) == [0, 1, 2]
    assert [event.error for event in scene.heard] == [BUSY]
    assert not scene.spread._open


def test_what_was_lost_once_is_not_lost_again_by_way_of_one_that_is_full():
    scene = Scene(*(FakeWorker() for _ in range(4)))
    first = scene.ask()
    for error in (LOST, BUSY, LOST):
        scene.workers[scene.place(first)].tell(first, error=error)
    assert [event.error for event in scene.heard] == [LOST]
    assert [len(worker.given) for worker in scene.workers] == [1, 1, 1, 0]


def test_an_answer_that_has_begun_ends_with_its_engine(scene):
    first = scene.ask()
    scene.workers[0].tell(first, delta=PIECE)
    scene.workers[0].tell(first, error=LOST)
    assert [event.error for event in scene.heard] == [None, LOST]
    assert scene.workers[1].given == []


def test_other_errors_are_the_requests_own(scene):
    first, error = scene.ask(), WorkerError("this request failed")
    scene.workers[0].tell(first, error=error)
    assert [event.error for event in scene.heard] == [error]
    assert not scene.spread._open


def test_what_fits_nowhere_else_is_told_why_it_was_lost():
    scene = Scene(FakeWorker(1000), FakeWorker(5000))
    first = scene.ask(tokens=2000)
    scene.workers[1].tell(first, error=LOST)
    assert [event.error for event in scene.heard] == [LOST]
    assert scene.workers[0].given == []


def test_a_cancelled_request_is_cancelled_where_it_is(scene):
    first, second = scene.ask("one"), scene.ask("two")
    scene.workers[1].tell(second, error=LOST)
    scene.spread.cancel(first)
    scene.spread.cancel(second)
    assert [worker.cancelled for worker in scene.workers] == [[first], [], [second]]
    scene.end(first)
    scene.spread.cancel(first)
    assert scene.workers[0].cancelled == [first], "it had ended"


def test_a_cancelled_request_is_not_asked_again(scene):
    first = scene.ask()
    scene.spread.cancel(first)
    scene.workers[0].tell(first, error=LOST)
    assert [event.error for event in scene.heard] == [LOST]
    assert scene.workers[1].given == []


def test_one_that_is_cancelled_on_its_way_is_cancelled_there(scene):
    """The caller leaves from another thread, between the loss and the new place."""
    first = scene.ask()
    submit = scene.workers[1].submit

    def leave_and_submit(submission, mailbox):
        scene.spread.cancel(first)
        scene.workers[1].cancelled.clear()  # What came before the request is nothing to a worker.
        submit(submission, mailbox)

    scene.workers[1].submit = leave_and_submit
    scene.workers[0].tell(first, error=LOST)
    assert scene.workers[1].cancelled == [first]


def test_all_are_told_to_end_before_any_is_waited_for(scene):
    order = []
    for worker in scene.workers:
        worker.end, worker.close = lambda: order.append("end"), lambda: order.append("close")
    scene.spread.close()
    assert order == ["end"] * 3 + ["close"] * 3


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3000), st.sampled_from(["ask", "piece", "end", "lose"]))))
def test_whatever_happens_everybody_hears_one_end(moves):
    scene = Scene(FakeWorker(), FakeWorker())
    ends = Counter()
    for pick, tokens, move in moves:
        running = [(number, worker) for worker in scene.workers for number in sorted(worker.mailboxes)]
        if move == "ask":
            scene.ask(f"question {pick}", tokens)
        elif running:
            number, worker = running[pick % len(running)]
            worker.tell(number, **{"piece": {"delta": PIECE}, "end": {}, "lose": {"error": LOST}}[move])
    for worker in scene.workers * 2:
        for number in list(worker.mailboxes):
            worker.tell(number)
    ends.update(event.id for event in scene.heard if event.delta is None)
    asked = {number for worker in scene.workers for number in worker.given}
    assert ends == dict.fromkeys(asked, 1)
    assert not scene.spread._open
    assert scene.spread._waiting == [{}, {}]


def test_a_device_that_is_there_twice_has_two_names():
    assert list(_names(["cuda:0", "cuda:1"])) == ["cuda:0", "cuda:1"]
    assert list(_names(["cpu", "cuda:0", "cpu"])) == ["cpu", "cuda:0", "cpu #2"]


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", ("auto",)),
        ("all", ("all",)),
        ("toaster", ("toaster",)),
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        ("cuda:3, cuda", ("cuda:3", "cuda:0")),
    ],
)
def test_devices_as_they_are_typed(text, devices):
    assert parse_devices(text) == devices
