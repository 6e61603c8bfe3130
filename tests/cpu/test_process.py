"""The engine in a process of its own: the same answers, and no caller left hanging, whatever becomes of the process."""

import asyncio
import gc
import io
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker

import numpy as np
import pytest
from PIL import Image

import memphi
from memphi import errors
from memphi.config import EngineConfig
from memphi.demo.attachments import EXAMPLES, FOLDER
from memphi.engine import process, worker
from memphi.engine.child import _portable
from memphi.engine.messages import Event, Loading, Mailboxes, Submission
from memphi.engine.pressure import Bounds, Part
from memphi.errors import CheckpointError, DeviceError, DoesNotFitError, MediaError, RequestError, WorkerError
from memphi.inputs.media import image_media, open_media
from memphi.request import FinishReason, Request, SamplingParams

BRIEF = SamplingParams(max_tokens=24)
ENDLESS = Request.ask("Say it again.", sampling=SamplingParams(max_tokens=20000, ignore_eos=True))
SHORT = Request.ask("What is 2 plus 3?", sampling=BRIEF)
CONFIG = EngineConfig(memory_bytes=2**30, rows=8)


@pytest.fixture(scope="module")
def local():
    return memphi.load("demo", device="cpu", dtype="fp32", config=CONFIG)


@pytest.fixture(scope="module")
def service():
    told = []
    engine = process.start("demo", "cpu", "fp32", config=CONFIG, progress=lambda *done_total: told.append(done_total))
    assert told[-1][0] == told[-1][1] > 0
    yield engine
    engine.close()


def requests():
    return [
        Request.ask(example.question, [open_media(FOLDER / name) for name in example.files], example.system, BRIEF)
        for example in EXAMPLES[::3]
    ]


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def kill(engine):
    """End the process, and wait until its successor is there or there is none."""
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: engine.pid != pid)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_answers_equal_those_of_an_engine_in_this_process(local, service):
    expected = local.generate(requests())
    assert [result.ids for result in service.generate(requests())] == [result.ids for result in expected]
    assert [service.generate(request).text for request in requests()] == [result.text for result in expected]
    assert [service.measure(request) for request in requests()] == [result.footprint for result in expected]
    assert len({result.footprint.mode for result in expected}) > 2


def test_what_is_held_is_known_before_anything_is_asked(local):
    engine = process.start("demo", "cpu", "fp32", config=CONFIG)
    wait_until(lambda: engine.stats.accounts)
    assert engine.stats.accounts["weights"] == engine.plan.weights_bytes == local.stats.accounts["weights"]
    assert engine.stats.steps == 0
    engine.close()


def test_several_threads_are_answered_at_once(local, service):
    expected = [result.text for result in local.generate(requests())]
    with ThreadPoolExecutor(8) as threads:
        assert [result.text for result in threads.map(service.generate, requests())] == expected


def test_a_stream_brings_the_whole_answer_in_pieces(service):
    request = Request.ask("Say it.", sampling=SamplingParams(max_tokens=20, ignore_eos=True))
    pieces = list(service.stream(request))
    result = service.generate(request)
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == result.text
    assert pieces[-1].finish_reason is result.finish_reason is FinishReason.LENGTH
    assert 0 < result.first_token_seconds < result.seconds


def test_closing_a_stream_ends_the_request_there(service):
    cancelled = service.stats.ended["cancelled"]
    stream = service.stream(ENDLESS)
    next(stream)
    assert service.stats.open == 1
    stream.close()
    wait_until(lambda: service.stats.ended["cancelled"] == cancelled + 1)
    assert service.stats.open == 0


def test_tasks_of_asyncio_share_the_engine_and_may_leave(local, service):
    async def first_pieces(request, most):
        text = ""
        async for delta in service.submit(request):
            text += delta.text
            most -= 1
            if not most:
                break
        return text

    async def everything():
        answers = asyncio.gather(*(first_pieces(request, -1) for request in requests()))
        left = asyncio.create_task(first_pieces(ENDLESS, 3))
        dropped = asyncio.create_task(first_pieces(ENDLESS, -1))
        whole = await answers
        assert await left
        dropped.cancel()
        return whole

    assert asyncio.run(everything()) == [result.text for result in local.generate(requests())]
    assert service.generate(SHORT).text == local.generate(SHORT).text
    wait_until(lambda: service.generate(SHORT) and service.stats.open == 0)


def test_what_is_wrong_with_a_request_is_said_and_the_next_one_works(service):
    with pytest.raises(RequestError, match="no messages"):
        service.generate(Request(()))
    steps, room = service.stats.steps, service.plan.context_tokens
    with pytest.raises(DoesNotFitError, match=f"has memory for {room}; ask for an answer of at most"):
        service.generate(Request.ask("Hello", sampling=SamplingParams(max_tokens=room)))
    assert service.stats.steps == steps
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(file, "png")
    damaged = file.getvalue()[:-9000]
    with pytest.raises(MediaError):  # Found only when it is decoded, which happens in the other process.
        service.generate(Request.ask("What is it?", [open_media(damaged)], sampling=BRIEF))
    assert service.generate(SHORT).text
    assert service.stats.open == 0


def test_a_request_that_cannot_be_sent_fails_alone(service):
    class Odd(str):
        """Of a class that the other process cannot find."""

    with pytest.raises(WorkerError, match="cannot be sent"):
        service.generate(Request.ask(Odd("Hello"), sampling=BRIEF))
    assert service.generate(SHORT).text


def test_large_attachments_do_not_hold_up_other_callers(service):
    picture = image_media(np.zeros((4000, 4000, 3), np.uint8), "large")
    large = Request.ask("What is it?", [picture], sampling=BRIEF)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(service.generate, large)
        assert service.generate(SHORT).text
        assert waiting.result().footprint.crops > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_does_not_end_the_process(number, service):
    """As a terminal's Ctrl-C, and as systemd ends a service."""
    pid = service.pid
    os.kill(pid, number)
    assert service.generate(SHORT).text
    assert service.pid == pid


def test_a_killed_process_fails_what_was_asked_and_is_started_again(service, local):
    pid, failures, states = service.pid, [], []

    def ask(stream):
        try:
            list(service.stream(ENDLESS)) if stream else service.generate(ENDLESS)
        except WorkerError as error:
            failures.append(str(error))

    # Told first, in the thread that hands out what the process says and then waits for the new one to load.
    service.hand_over(service.accept(ENDLESS)[0], lambda event: states.append(service._process.state))
    threads = [threading.Thread(target=ask, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.stats.open == 5)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert states[-1] == "loading", "all are told before a new process has loaded anything"
    assert len(set(failures)) == 1
    assert len(failures) == 4
    assert "killed by SIGKILL" in failures[0]
    assert "started again: send the request once more" in failures[0]
    assert service.pid not in (pid, None)
    assert service.generate(SHORT).text == local.generate(SHORT).text
    assert service.stats.ended == {"stop": 1}


def test_one_that_keeps_dying_is_left_alone_for_a_while(monkeypatch):
    engine = process.start("demo", device="cpu")
    for _ in range(process.RESTARTS + 1):
        kill(engine)
    assert engine.pid is None
    with pytest.raises(WorkerError, match=r"ended 4 times within 60 seconds.*left alone"):
        engine.generate(SHORT)
    monkeypatch.setattr(process, "RESTART_SECONDS", 0.0)
    assert engine.generate(SHORT).text
    engine.close()


def test_a_system_without_room_for_a_thread_leaves_nobody_waiting(monkeypatch):
    engine = process.start("demo", device="cpu")
    before, start = multiprocessing.active_children(), threading.Thread.start
    full, heard = ["memphi-outbox", "memphi-process"], queue.SimpleQueue()

    def start_unless_full(thread):
        if thread.name in full:
            full.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    def ask():
        engine.hand_over(engine.accept(ENDLESS)[0], heard.put)

    monkeypatch.setattr(threading.Thread, "start", start_unless_full)
    ask()
    os.kill(engine.pid, signal.SIGKILL)
    while (event := heard.get(timeout=60)).delta:
        pass
    assert "killed by SIGKILL" in str(event.error)
    assert "no room for another process now" in str(event.error)
    with pytest.raises(WorkerError, match="no room for another process now"):  # There is none to follow it.
        ask()
    assert not full
    assert engine.pid is None
    assert not set(multiprocessing.active_children()) - set(before)
    assert engine.generate(SHORT).text
    engine.close()


def test_who_waits_is_told_whatever_goes_wrong_with_the_successor(monkeypatch):
    engine, heard = process.start("demo", device="cpu"), queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._process, "_start_again", lambda: 1 / 0)
    engine.hand_over(engine.accept(ENDLESS)[0], heard.put)
    os.kill(engine.pid, signal.SIGKILL)
    while (event := heard.get(timeout=60)).delta:
        pass
    assert "killed by SIGKILL" in str(event.error)
    engine.close()


def test_closing_tells_everybody_who_waits():
    engine = process.start("demo", device="cpu")
    pid = engine.pid
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(engine.generate, ENDLESS)
        pieces = threads.submit(lambda: list(engine.stream(ENDLESS)))
        wait_until(lambda: engine.stats.open == 2)
        engine.close()
        assert whole.result(60).finish_reason is FinishReason.CANCELLED
        assert whole.result().text
        assert pieces.result(60)
    assert not is_alive(pid)
    with pytest.raises(WorkerError, match="closed"):
        engine.generate(SHORT)
    engine.close()


def test_closing_that_is_interrupted_still_ends_the_process(monkeypatch):
    def interrupt(timeout=None):
        raise KeyboardInterrupt

    engine = process.start("demo", device="cpu")
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)  # It does not read that it shall end.
    monkeypatch.setattr(engine._process._thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    monkeypatch.undo()
    wait_until(lambda: not is_alive(pid))


def test_an_engine_that_is_dropped_ends_its_process():
    engine = process.start("demo", device="cpu")
    pid = engine.pid
    del engine
    assert not is_alive(pid)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"device": "cuda:77"}, DeviceError),
        ({"config": EngineConfig(memory_bytes=2**20)}, DoesNotFitError),
        ({"model": "/nowhere"}, CheckpointError),
    ],
)
def test_what_keeps_a_model_from_loading_is_said_as_in_this_process(settings, error):
    with pytest.raises(error) as here:
        memphi.load(**{"model": "demo", "device": "cpu"} | settings)
    with pytest.raises(error) as there:
        process.start(**{"model": "demo", "device": "cpu"} | settings)
    assert str(there.value) == str(here.value)


def test_a_load_that_fails_leaves_nothing_behind():
    def held():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sum(each.name == "memphi-outbox" for each in threading.enumerate())

    def is_gone():
        return all(now <= before for now, before in zip(held(), held_before, strict=True))

    resource_tracker.ensure_running()  # Which the first child of all leaves.
    held_before = held()
    with pytest.raises(DeviceError):
        process.start("demo", device="cuda:77")
    wait_until(is_gone)


def test_loading_can_be_interrupted():
    before = multiprocessing.active_children()

    class InterruptionError(BaseException):
        pass

    def interrupt(_done, _total):
        raise InterruptionError

    with pytest.raises(InterruptionError):
        process.start("demo", device="cpu", progress=interrupt)
    assert not set(multiprocessing.active_children()) - set(before)


def test_one_thread_at_a_time_reaps_a_process(monkeypatch):
    """multiprocessing tells the other that there is nobody to reap, and how the process ended is unknown to it."""
    child = process._Child(Loading("/nowhere", "cpu", "fp32", "auto", CONFIG, "default"))
    join, inside, ends = child._process.join, threading.Semaphore(), []

    def join_alone(timeout=None):
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        join(timeout)
        inside.release()

    def wait():
        child.wait()
        ends.append(child._process.exitcode)

    monkeypatch.setattr(child._process, "join", join_alone)
    child.kill()
    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [-signal.SIGKILL] * 4


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "os.killpg(0, 15)", "raise KeyboardInterrupt"])
def test_the_process_ends_with_its_parent(ending, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom memphi.engine.process import start\n"
        "if __name__ == '__main__':\n"
        "    engine = start('demo', device='cpu')\n    print(engine.pid, 'torch' in sys.modules, flush=True)\n"
        f"    {ending}\n"
    )
    finished = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, start_new_session=True
    )
    pid, has_torch = finished.stdout.split()
    assert has_torch == "False"
    assert "again" not in finished.stderr
    wait_until(lambda: not is_alive(int(pid)))


def test_the_parent_imports_no_torch():
    code = (
        "import sys; from memphi.engine import process; from memphi.inputs.tokenizer import Tokenizer; "
        "from memphi.checkpoint.locate import locate; Tokenizer.from_folder(locate('demo').folder); "
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def subclasses(kind):
    return [kind, *(below for each in kind.__subclasses__() for below in subclasses(each))]


SHARED = [kind for kind in subclasses(errors.MemphiError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", SHARED, ids=lambda kind: kind.__name__)
def test_every_error_of_memphis_crosses_as_it_is(kind):
    event = pickle.loads(pickle.dumps(_portable(Event(3, error=kind("this is wrong; do that")))))
    assert type(event.error) is kind
    assert str(event.error) == "this is wrong; do that"
    assert kind.__module__ == "memphi.errors"


def test_any_other_error_crosses_as_one_sentence():
    event = pickle.loads(pickle.dumps(_portable(Event(3, error=ZeroDivisionError("by zero")))))
    assert type(event.error) is WorkerError
    assert str(event.error) == "this request failed in the engine's process: ZeroDivisionError: by zero"


def test_a_request_that_was_accepted_under_a_larger_plan_is_refused_by_the_loop(local):
    submission = Submission(0, Part(SHORT, local.measure(SHORT)))
    (event,) = worker._obey(submission, local.loop, Bounds(8, 100))
    assert isinstance(event.error, DoesNotFitError)
    assert local.stats.open == 0


def test_mailboxes_that_are_shut_leave_nobody_waiting():
    mailboxes, heard = Mailboxes(), []
    mailboxes.add(1, heard.append)
    mailboxes.add(2, heard.append)
    mailboxes.deliver([Event(2, error=RequestError("wrong"))])
    mailboxes.shut(WorkerError("gone"))
    assert [(event.id, str(event.error)) for event in heard] == [(2, "wrong"), (1, "gone")]
    with pytest.raises(WorkerError, match="gone"):
        mailboxes.add(3, heard.append)
