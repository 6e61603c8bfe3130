"""The benchmark without a dial: a neighbour comes and goes, and what it must and must not do is judged."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from benchmarks.dials import parent
from benchmarks.dials.child import PoolSizes
from benchmarks.dials.meter import Seen
from benchmarks.dials.neighbour import LEFT_SHARE, SLICES, Orders, come_and_go, next_slice, take
from benchmarks.dials.options import read_options
from benchmarks.dials.parent import main, run_without_dial
from benchmarks.dials.process import Child
from benchmarks.dials.summary import summarize_dial
from benchmarks.dials.visits import compare_answers, find_visits, summarize_visited
from memphi.memory.sizing import reserve_bytes
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.scenes import GREEDY, Stage, lively_model, mixed_requests, tiny_tokenizer

MIB, GIB = 2**20, 2**30
TOTAL_BYTES = 80 * GIB
LEFT_BYTES = reserve_bytes(TOTAL_BYTES) // LEFT_SHARE


class CountingCard:
    """So much is free; others take some at every slice."""

    def __init__(self, free_bytes, others_bytes=0, real_bytes=None):
        self.free_bytes, self.others_bytes = free_bytes, others_bytes
        self.real_bytes = free_bytes if real_bytes is None else real_bytes
        self.held = []

    def memory(self):
        return self.free_bytes, TOTAL_BYTES

    def take(self, n_bytes):
        if n_bytes > self.real_bytes:
            return None
        self.free_bytes -= n_bytes + self.others_bytes
        self.real_bytes -= n_bytes + self.others_bytes
        self.held.append(n_bytes)
        return object()

    def tidy(self):
        self.free_bytes += sum(self.held)
        self.held.clear()


def told(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


# --- the neighbour -------------------------------------------------------------------------------------------------


def test_a_neighbour_takes_so_much_that_an_engine_makes_way(capsys):
    card = CountingCard(64 * GIB)
    slices = take(card)
    comes, holds = told(capsys)
    assert SLICES <= len(slices) <= SLICES + 1
    assert LEFT_BYTES <= card.free_bytes < LEFT_BYTES + 2 * MIB < reserve_bytes(TOTAL_BYTES) // 2
    assert (comes["event"], comes["free_bytes"], comes["goal_bytes"]) == ("takes", 64 * GIB, 64 * GIB - LEFT_BYTES)
    assert (holds["event"], holds["held_bytes"], holds["refused"]) == ("holds", sum(card.held), False)


def test_what_others_take_meanwhile_is_left_to_them(capsys):
    card = CountingCard(64 * GIB, others_bytes=GIB)
    take(card)
    assert LEFT_BYTES - GIB <= card.free_bytes < LEFT_BYTES + 2 * MIB
    assert sum(card.held) < 44 * GIB


def test_a_refusal_ends_the_taking_and_is_told(capsys):
    card = CountingCard(64 * GIB, real_bytes=5 * GIB)
    assert len(take(card)) == 2
    assert told(capsys)[-1]["refused"] is True


def test_nothing_is_taken_of_a_full_card(capsys):
    assert take(CountingCard(LEFT_BYTES // 2)) == []
    assert [event.get("held_bytes") for event in told(capsys)] == [None, 0]


@pytest.mark.parametrize(
    ("goal_mib", "held_mib", "spare_mib", "expected_mib"),
    [
        (6400, 0, 9999, 200),  # a share of the goal
        (6400, 6300, 9999, 100),  # what is left of it
        (6400, 0, 33, 32),  # what can be spared, in whole units
        (6400, 0, -5, 0),
        (6400, 6400, 9999, 0),
        (10, 0, 9999, 2),  # never less than a unit
    ],
)
def test_the_next_slice(goal_mib, held_mib, spare_mib, expected_mib):
    assert next_slice(goal_mib * MIB, held_mib * MIB, spare_mib * MIB) == expected_mib * MIB


class Words:
    """A pipe to one who waits for orders."""

    def __init__(self, seconds):
        self.reading, self.writing = os.pipe()
        self.orders = Orders(self.reading, time.monotonic() + seconds)

    def begin(self):
        os.write(self.writing, b"begin\n")

    def go(self):
        os.close(self.writing)


def test_a_neighbour_comes_and_goes_until_its_parent_is_gone(capsys):
    words, card = Words(30), CountingCard(64 * GIB)
    words.begin()
    assert words.orders.wait_to_begin()
    card.tidy, tidied = lambda: None, card.tidy

    def tidy():
        tidied()
        if rounds.append(card.free_bytes) or len(rounds) == 3:
            words.go()
            time.sleep(0.05)

    rounds, card.tidy = [], tidy
    come_and_go(card, 0.01, words.orders)
    assert rounds == [64 * GIB] * 3
    assert [event["event"] for event in told(capsys)] == ["takes", "holds", "leaves"] * 3


def test_a_parent_that_is_gone_before_never_lets_it_begin():
    words = Words(30)
    words.go()
    assert not words.orders.wait_to_begin()


def test_a_neighbour_ends_when_its_time_is_up(capsys):
    words = Words(0.1)
    assert not words.orders.wait_to_begin()
    started = time.monotonic()
    come_and_go(CountingCard(64 * GIB), 10.0, words.orders)
    assert time.monotonic() - started < 5
    assert not told(capsys)
    words.go()


def test_a_neighbour_does_not_outlive_its_parent():
    command = "['-m', 'benchmarks.dials', '--child=neighbour', '--device=cpu', '--seconds=60', '--turn=0.1']"
    start = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, *{command}], stdin=subprocess.PIPE)\n"
        "child.stdin.write(b'begin'); child.stdin.flush()\n"
        "time.sleep(60)"
    )
    dying = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True)
    assert json.loads(dying.stdout.readline())["event"] == "takes"
    dying.send_signal(signal.SIGKILL)
    rest = dying.stdout.read()  # ends when the last process that writes to it has
    assert json.loads(rest.splitlines()[-1])["event"] == "gone"
    dying.wait()


# --- what it does to the engine --------------------------------------------------------------------------------------


def test_every_change_of_the_pool_is_told(capsys):
    stage = Stage(lively_model(), tiny_tokenizer(), memory_bytes=2 * GIB)
    sizes, logger = PoolSizes(SimpleNamespace(loop=stage.loop)), logging.getLogger("memphi.engine.elastic")
    level = logger.level
    logger.addHandler(sizes)
    logger.setLevel(logging.INFO)
    try:
        stage.ids(mixed_requests(GREEDY))
        most = stage.scheduler.reservations.pages.capacity
        stage.loop._elastic.make_way(0, TOTAL_BYTES)
        stage.loop._elastic.make_way(TOTAL_BYTES, TOTAL_BYTES)
    finally:
        logger.removeHandler(sizes)
        logger.setLevel(level)
    shrinks, grows = told(capsys)
    assert (shrinks["event"], shrinks["before_pages"]) == ("pool", most)
    assert shrinks["after_pages"] < most
    assert (grows["before_pages"], grows["after_pages"]) == (shrinks["after_pages"], most)
    assert shrinks["mapped_bytes"] <= grows["mapped_bytes"]


def events(*rows):
    return [{"event": name, "at": at, **facts} for at, name, facts in rows]


def pool(at, before, after):
    return (at, "pool", {"before_pages": before, "after_pages": after, "mapped_bytes": after})


def visit(came, held, left):
    yield (came, "takes", {"free_bytes": 60, "goal_bytes": 59})
    yield (held, "holds", {"held_bytes": 59, "slices": 32, "refused": False, "free_bytes": 1})
    if left:
        yield (left, "leaves", {"free_bytes": 60})


LOADED = (10, "plan", {"plan": {"pages": 100}})
ENGINE = events(
    LOADED, pool(14.2, 100, 40), pool(15, 40, 30), pool(16, 30, 35), pool(18.1, 35, 100), pool(22.3, 100, 20),
    pool(26.2, 20, 100), (29, "closing", {}), pool(29.1, 100, 1), (31, "end", {}),
)  # fmt: skip
NEIGHBOUR = events(*visit(14, 14.5, 18), *visit(22, 22.5, 26), *visit(30, 30.5, 34), (35, "gone", {}))


def test_each_visit_is_found():
    first, second = find_visits(NEIGHBOUR, ENGINE)
    assert (first.came_seconds, first.held_seconds, first.left_seconds) == (14, 14.5, 18)
    assert (first.free_bytes_before, first.held_bytes, first.free_bytes_while_held) == (60, 59, 1)
    assert (first.pages_before, first.pages_least, first.pages_after) == (100, 30, 100)
    assert (first.pages_then, first.grew) == (35, True)
    assert (first.resizes, first.mapped_bytes_least, first.shrank) == (4, 30, True)
    assert (second.pages_before, second.pages_least, second.pages_after) == (100, 20, 100)


def test_a_visit_that_the_run_ends_is_not_judged():
    (cut,) = find_visits(events(*visit(14, 14.5, None)), events(LOADED, (15, "closing", {})))
    assert (cut.left_seconds, cut.shrank) == (None, None)
    (early,) = find_visits(events(*visit(14, 14.5, 18)), events(LOADED, (15, "closing", {})))
    assert (early.left_seconds, early.shrank) == (None, None)


def test_a_model_that_was_never_loaded_has_no_visits():
    assert find_visits([], events((3, "no plan", {}))) == []


def test_answers_are_compared_id_by_id():
    quiet = [{"index": 0, "ids": "1 2 3"}, {"index": 1, "ids": "4 5"}, {"index": 2}, {"index": 3, "ids": "6"}]
    other = [{"index": 0, "ids": "1 2 4"}, {"index": 1, "ids": "4 5"}, {"index": 2, "ids": "1"}, {"index": 3}]
    assert compare_answers(quiet, other) == {"compared": 2, "equal": 1, "differing": [{"index": 0, "equal_ids": 2}]}


ANSWERED = {"index": 0, "fits": True, "outcome": "answered", "sentence": None, "ids": "1 2"}


def run(ended=ANSWERED, engine=ENGINE):
    seen = Seen("a test", 0, 70, 5)
    return Child([*engine, {"event": "request", "at": 12, **ended}], 0, 9.0, seen)


def judged(quiet=ANSWERED, disturbed=ANSWERED, engine=ENGINE, neighbour=NEIGHBOUR, exit_code=0):
    child = run(disturbed, engine)
    summaries = [summarize_dial(None, 1, each) for each in (run(quiet), child)]
    return summarize_visited(*summaries, child, Child(neighbour, exit_code, 9.0, Seen(None)))


def test_a_good_run_holds():
    good = judged()
    assert good["holds"]
    assert good["complete"]
    assert set(good["checks"].values()) == {True}
    assert good["quiet"]["checks"]["the dial is never exceeded"] is None
    assert good["neighbour"]["visits"] == [asdict(visit) for visit in find_visits(NEIGHBOUR, ENGINE)]


@pytest.mark.parametrize(
    ("how", "failing"),
    [
        ({"quiet": ANSWERED | {"outcome": "failed"}}, "the run without a neighbour holds"),
        ({"disturbed": ANSWERED | {"outcome": "refused", "sentence": "it needs 9"}}, "the run with one holds"),
        ({"neighbour": NEIGHBOUR[:3] + NEIGHBOUR[-1:]}, "the neighbour comes and leaves several times"),
        ({"engine": [e for e in ENGINE if not 22 < e["at"] < 26]}, "the pool makes way at every visit"),
        ({"engine": [e for e in ENGINE if not 18 < e["at"] < 22]}, "the pool grows again after it"),
        ({"disturbed": ANSWERED | {"ids": "1 3"}}, "every answer equals the one without a neighbour"),
        ({"neighbour": NEIGHBOUR[:-1]}, "no error escapes in the neighbour"),
        ({"exit_code": 1}, "no error escapes in the neighbour"),
    ],
)
def test_each_requirement_can_fail(how, failing):
    failed = judged(**how)
    assert not failed["holds"]
    assert failed["checks"][failing] is False


def test_a_card_too_full_for_the_model_proves_nothing():
    child = Child(events((3, "no plan", {"sentence": "it needs 9 GiB"})), 0, 9.0, Seen(None))
    summary = summarize_dial(None, 1, child)
    found = summarize_visited(summary, summary, child, Child([], 0, 9.0, Seen(None)))
    assert not found["complete"]
    assert not found["holds"]


# --- the parent ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The parent with processes that only say what real ones would."""
    begun = []

    def alone(options, work, meter, seconds, dial_bytes, dtype):
        begun.append(("alone", dtype))
        return run()

    def beside(options, meter, seconds, dtype):
        begun.append(("beside", dtype))
        return run(), Child(NEIGHBOUR, 0, 9.0, Seen(None))

    monkeypatch.setattr(parent, "run_child", alone)
    monkeypatch.setattr(parent, "run_beside_neighbour", beside)
    return begun


def found(seconds, earlier=None, **others):
    arguments = {"out": "x.json", "commit": "abc", "requests": 1, "seconds": seconds} | others
    options = read_options([f"--{name}={value}" for name, value in arguments.items()])
    return [{"commit": "abc", **each} for each in run_without_dial(options, None, earlier)]


def test_both_runs_fit_into_one_time(runs):
    first, second = found(20)
    assert not first["complete"]
    assert second["complete"]
    assert second["holds"]
    assert runs == [("alone", "fp32"), ("beside", "fp32")]


def test_the_second_run_waits_for_another_time(runs):
    (first,) = found(5)  # The first one took 9 s.
    assert not first["complete"]
    (second,) = found(5, first)
    assert second["complete"]
    assert [name for name, _ in runs] == ["alone", "beside"]


@pytest.mark.parametrize("other", [{"commit": "def"}, {"seed": 1}, {"dtype": "bf16"}])
def test_a_first_run_of_something_else_is_not_kept(runs, other):
    (first,) = found(5)
    assert len(found(20, first, **other)) == 2
    assert [name for name, _ in runs] == ["alone", "alone", "beside"]


def test_a_first_run_that_is_not_complete_is_run_again(runs):
    (first,) = found(5)
    first["quiet"]["complete"] = False
    assert len(found(20, first)) == 2


def test_the_whole_runs_on_a_cpu(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", tiny_config(short_tokens=128, max_tokens=224), torch.float32)
    out = tmp_path / "out.json"
    command = ["--small", "--device=cpu", f"--model={model}", f"--out={out}", "--commit=abc"]
    assert main([*command, "--dial=none", "--requests=9", "--seconds=50", "--turn=0.05"]) == 0
    none = json.loads(out.read_text())["dials"]["none"]
    assert none["complete"]
    assert list(none["checks"].values()) == [True, True, True, None, None, True, True]
    assert none["answers"]["equal"] == none["answers"]["compared"] == none["quiet"]["outcomes"]["answered"] > 4
    assert all(visit["held_bytes"] > 0 for visit in none["neighbour"]["visits"][:-1])
    mix = {"model": "model", "dtype": "fp32", "requests": 9, "scheme": "bf16", "seed": 0, "small": True}
    assert none["mix"] == mix
