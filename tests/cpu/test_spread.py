"""Engines on several devices as one: every answer as alone, requests on all, and one that ends takes no other along.

Both are on the CPU, which a program may ask for; on GPUs the same is tests/gpu/test_gpu_spread.py.
"""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from starlette.testclient import TestClient

import memphi
from memphi.config import EngineConfig
from memphi.demo.attachments import EXAMPLES, FOLDER
from memphi.engine import child, engine, process, spread
from memphi.engine.messages import Event, Loading
from memphi.engine.stats import Stats
from memphi.errors import CheckpointError, DeviceError, DoesNotFitError, RequestError, WorkerError
from memphi.inputs.media import open_media
from memphi.memory.devices import DeviceFacts
from memphi.request import FinishReason, Message, Request, SamplingParams
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings

BRIEF = SamplingParams(max_tokens=24)
CONFIG = EngineConfig(memory_bytes=2**30, rows=4)


@pytest.fixture(scope="module")
def local():
    return memphi.load("demo", device="cpu", dtype="fp32", config=CONFIG)


@pytest.fixture(scope="module")
def both():
    told = []
    made = memphi.load(
        "demo", device=["cpu", "cpu"], dtype="fp32", config=CONFIG, progress=lambda *pair: told.append(pair)
    )
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    yield made
    made.close()


def requests():
    return [
        Request.ask(example.question, [open_media(FOLDER / name) for name in example.files], example.system, BRIEF)
        for example in EXAMPLES[::3]
    ]


def endless(number):
    return Request.ask(f"Say {number}.", sampling=SamplingParams(max_tokens=20000, ignore_eos=True))


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def ended(pair):
    """Requests of each that have ended by themselves."""
    return [each.stats.ended["stop"] + each.stats.ended["length"] for each in pair.engines]


def test_every_answer_is_the_one_alone_and_both_have_worked(local, both):
    asked, before = requests(), ended(both)
    expected = local.generate(asked)
    assert [result.ids for result in both.generate(asked)] == [result.ids for result in expected]
    assert [result.footprint for result in both.generate(asked)] == [result.footprint for result in expected]
    assert len({result.footprint.mode for result in expected}) > 2
    wait_until(lambda: sum(ended(both)) == sum(before) + 2 * len(asked))
    assert min(now - past for now, past in zip(ended(both), before, strict=True)) >= len(asked) // 2


def test_tasks_of_asyncio_are_spread_too(local, both):
    async def whole(request):
        return "".join([delta.text async for delta in both.submit(request)])

    async def everything():
        return await asyncio.gather(*map(whole, requests()))

    assert asyncio.run(everything()) == [result.text for result in local.generate(requests())]


def test_a_conversation_meets_what_was_computed_for_it(both):
    """The next turn finds the first one's pages, whoever has been asked meanwhile."""
    turns = (Message("user", ("Tell me of the lion, the bear and the wolf. " * 4,)),)
    answer = both.generate(Request(turns, BRIEF)).text
    both.generate([Request.ask(f"What is {number} plus 1?", sampling=BRIEF) for number in range(5)])
    before = [each.stats.shared_tokens for each in both.engines]
    both.generate(Request((*turns, Message("assistant", (answer,)), Message("user", ("And then?",))), BRIEF))
    wait_until(lambda: [each.stats.open for each in both.engines] == [0, 0])
    assert sum(each.stats.shared_tokens for each in both.engines) - sum(before) >= 64


def test_leaving_frees_the_request_wherever_it_is(both):
    before = [each.stats.ended["cancelled"] for each in both.engines]
    streams = [both.stream(endless(number)) for number in range(4)]
    for stream in streams:
        next(stream)
    wait_until(lambda: [each.stats.open for each in both.engines] == [2, 2])
    for stream in streams:
        stream.close()
    wait_until(lambda: [each.stats.open for each in both.engines] == [0, 0])
    assert [each.stats.ended["cancelled"] for each in both.engines] == [number + 2 for number in before]
    assert [each.stats.accounts.get("promised pages", 0) for each in both.engines] == [0, 0]


def test_a_server_shows_every_engine(both):
    with TestClient(make_app(both, ServerSettings("demo")), base_url="http://localhost") as client:
        body = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "n": 4, "max_tokens": 8}
        assert len(client.post("/v1/chat/completions", json=body).json()["choices"]) == 4
        health = client.get("/health").json()
        assert health["ready"]
        assert health["engines"] == [{"device": "cpu", "state": "ready"}, {"device": "cpu #2", "state": "ready"}]
        told = client.get("/memory").json()["engines"]
        assert [each["plan"]["rows"] for each in told] == [4, 4]
        assert all(each["accounts"]["weights"] == each["plan"]["weights_bytes"] for each in told)
        assert client.get("/v1/models").json()["data"][0]["memphi"]["answers_at_once"] == 8
        metrics = client.get("/metrics").text
        assert 'memphi_steps_total{device="cpu"} ' in metrics
        assert 'memphi_memory_bytes{account="weights",device="cpu #2"} ' in metrics


def test_one_that_is_killed_takes_nothing_along_but_what_it_had_begun(local, both):
    """Requests that wait there go to the other; answers that have begun there end with one sentence."""
    asked = [Request.ask(f"What is {number} plus 3?", sampling=BRIEF) for number in range(8)]
    expected = [result.text for result in local.generate(asked)]
    begun = [both.stream(endless(number)) for number in range(8)]  # As many as there are rows.
    for stream in begun:
        next(stream)
    wait_until(lambda: [each.stats.open for each in both.engines] == [4, 4])
    answers = [None] * len(asked)

    def ask(place):
        answers[place] = both.generate(asked[place]).text

    waiting = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in waiting:
        thread.start()
    wait_until(lambda: [each.stats.waiting for each in both.engines] == [4, 4])
    first, second = both.engines
    os.kill(first.pid, signal.SIGKILL)
    outcomes = Counter()
    for stream in begun:
        try:
            for _ in range(200):
                next(stream)
            stream.close()
            outcomes["goes on"] += 1
        except WorkerError as error:
            outcomes[str(error)] += 1
    sentence = next(text for text in outcomes if text != "goes on")
    assert outcomes == {"goes on": 4, sentence: 4}
    assert sentence.startswith("the engine's process on cpu was killed by SIGKILL")
    for thread in waiting:
        thread.join(120)
    assert answers == expected
    assert second.stats.ended["stop"] >= 8
    wait_until(lambda: [each.state for each in both.engines] == ["ready", "ready"])
    before = ended(both)
    assert [result.text for result in both.generate(asked)] == expected
    wait_until(lambda: sum(ended(both)) == sum(before) + 8)
    assert all(now > past for now, past in zip(ended(both), before, strict=True))


def test_a_server_is_ready_as_long_as_one_engine_answers(monkeypatch):
    monkeypatch.setattr(process, "RESTARTS", 0)  # Whatever ends is left alone.
    pair = memphi.load("demo", device=["cpu", "cpu"], dtype="fp32", config=CONFIG)
    with TestClient(make_app(pair, ServerSettings("demo")), base_url="http://localhost") as client:
        body = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "max_tokens": 8}

        def kill(place):
            os.kill(pair.engines[place].pid, signal.SIGKILL)
            wait_until(lambda: pair.engines[place].state == "failed")

        kill(1)
        assert client.get("/health").json()["engines"][1] == {"device": "cpu #2", "state": "failed"}
        assert client.get("/health").status_code == 200
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        kill(0)
        health = client.get("/health")
        assert (health.status_code, health.json()["state"], health.json()["ready"]) == (503, "failed", False)
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert "left alone" in refused.json()["error"]["message"]
        monkeypatch.setattr(process, "RESTART_SECONDS", 0.0)
        assert client.get("/health").status_code == 200, "whoever asks now is answered"
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    pair.close()


def test_closing_tells_everybody_who_waits():
    pair = memphi.load("demo", device=["cpu", "cpu"], dtype="fp32", config=CONFIG)
    pids = [each.pid for each in pair.engines]
    heard = []
    threads = [threading.Thread(target=lambda n=n: heard.append(pair.generate(endless(n)))) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: [each.stats.open for each in pair.engines] == [2, 2])
    pair.close()
    for thread in threads:
        thread.join(60)
    assert [result.finish_reason for result in heard] == [FinishReason.CANCELLED] * 4
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(WorkerError, match="closed"):
        pair.generate(endless(0))


@pytest.mark.parametrize(
    ("devices", "settings", "error", "words"),
    [
        (["cpu", "toaster"], {}, DeviceError, "^'toaster' is no device; use auto"),
        (["cpu", "cuda:77"], {}, DeviceError, "cuda"),
        (["cpu", "cpu"], {"config": EngineConfig(memory_bytes=2**20)}, DoesNotFitError, "^cpu( #2)?: "),
        (["cpu", "cpu"], {"model": "/nowhere"}, CheckpointError, "^'/nowhere' is no folder"),
        ([], {}, RequestError, "the list of devices is empty"),
    ],
)
def test_what_keeps_one_from_loading_is_said_once_and_ends_the_others(devices, settings, error, words):
    before = multiprocessing.active_children()
    with pytest.raises(error, match=words):
        memphi.load(**{"model": "demo", "device": devices} | settings)
    assert not set(multiprocessing.active_children()) - set(before)


def test_several_devices_are_for_who_spreads():
    with pytest.raises(DeviceError, match="is several devices, and one is needed here"):
        memphi.load("demo", "cuda:0,cuda:1")


def test_loading_can_be_interrupted():
    class InterruptionError(BaseException):
        pass

    def interrupt(_done, _total):
        raise InterruptionError

    loading = Loading("demo", "cpu", "fp32", "auto", CONFIG, "default")
    before = multiprocessing.active_children()
    with pytest.raises(InterruptionError):
        spread.start([loading, loading], interrupt)
    assert not set(multiprocessing.active_children()) - set(before)


def test_the_host_is_shared(both, local, monkeypatch):
    """Decoded attachments of all engines together take no more than those of one."""
    assert [each.loading.engines for each in both.engines] == [2, 2]
    monkeypatch.setattr(engine, "this_machine", lambda: DeviceFacts("cpu", "", 2**40, 2**40))
    loops = [engine.make_loop(local.model, local.tokenizer, local.plan, CONFIG, lambda: None, n) for n in (1, 2)]
    assert loops[0]._preparation._host_bytes == 2 * loops[1]._preparation._host_bytes
    for loop in loops:
        loop.close()


def test_a_device_that_can_do_nothing_more_ends_its_process(monkeypatch):
    """CUDA fails at everything once a kernel has gone wrong: who asks next shall not meet it, nor all who come."""
    device, sent = torch.device("cuda"), []

    def fail(asked):
        assert asked == device
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it.")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    loop = SimpleNamespace(stats=Stats(), runner=SimpleNamespace(model=SimpleNamespace(device=device)))
    connection = SimpleNamespace(send=sent.append)
    child._tell(connection, loop, [Event(1), Event(2, error=RequestError("its own"))])
    with pytest.raises(RuntimeError, match=r"illegal memory access was encountered$"):
        child._tell(connection, loop, [Event(3, error=ValueError("a kernel"))])
    assert [[event.id for event in report.events] for report in sent] == [[1, 2], [3]]


def test_gpus_are_counted_as_torch_sees_them(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = lambda: 3\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert spread.find_gpus() == ("cuda:0", "cuda:1", "cuda:2")
    (tmp_path / "torch.py").write_text("class cuda:\n    device_count = lambda: 0\n")
    with pytest.raises(DeviceError, match="no cuda device"):
        spread.find_gpus()


def test_the_serving_process_imports_no_torch():
    code = "import sys; from memphi.engine import spread; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
