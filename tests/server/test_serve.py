"""`memphi serve`: the port that opens at once, the drain, and what is refused before anything is loaded."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest

from memphi.cli import app
from memphi.engine import spread
from memphi.errors import MemphiError
from memphi.request import Delta
from memphi.server.app import make_app
from memphi.server.serving import Server, address_of, bind
from memphi.server.settings import ServerSettings
from tests.server.conftest import refused
from tests.server.fakes import said

COMMAND = [sys.executable, "-c", "from memphi.cli import main; main()", "serve", "--port", "0"]
DEMO = ["--model", "demo", "--device", "cpu", "--dtype", "fp32"]
serve = importlib.import_module("memphi.cli.serve")  # memphi.cli.serve is the command.
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}


def failed(*options, environment=None):
    """The exit code and the last line of a server that does not even start."""
    ended = subprocess.run(
        [*COMMAND, *options], capture_output=True, text=True, timeout=60, env={**os.environ, **(environment or {})}
    )
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--host", "0.0.0.0"], 4, "--api-key"),
        (["--api-key", "a b"], 4, "API key"),
        (["--allowed-host", "http://x"], 4, "no host name"),
        (["--allow-urls", "http://x"], 4, "no host to fetch from"),
        (["--tls-cert", "x.pem"], 4, "go together"),
        (["--host", "192.0.2.1", "--insecure"], 1, "cannot listen on 192.0.2.1"),
        (["--model", "/no/such/folder"], 4, "/no/such/folder"),
        (["--model", "demo", "--device", "toaster"], 4, "'toaster' is no device"),
        (["--model", "demo", "--device", "cuda:98,cuda:99"], 4, "cuda"),
    ],
)
def test_what_is_refused_in_one_sentence(options, code, words):
    got, line = failed(*options)
    assert (got, line.startswith("memphi: ")) == (code, True), line
    assert words in line


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("cuda:0,cuda:1,cuda", "cuda:0 is there twice"),
        ("cpu,cpu", "'cpu' stands in a list"),
        ("cuda:0,toaster", "'toaster' stands in a list"),
        ("all,cuda:0", "'all' stands in a list"),
        ("cuda:0,", "'' stands in a list"),
    ],
)
def test_what_is_no_list_of_gpus(devices, words):
    ended = subprocess.run([*COMMAND, "--device", devices], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("option", "devices", "told"),
    [
        ([], ["auto"], "demo is ready\n"),
        (["--device", "cuda:1"], ["cuda:1"], "demo is ready\n"),
        (["--device", "cuda:1,cuda:0"], ["cuda:1", "cuda:0"], "demo is ready on cuda:1, cuda:0\n"),
        (["--device", "all"], ["cuda:0", "cuda:1", "cuda:2"], "demo is ready on cuda:0, cuda:1, cuda:2\n"),
    ],
)
def test_an_engine_is_loaded_on_each_device(option, devices, told, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(spread, "find_gpus", lambda: ("cuda:0", "cuda:1", "cuda:2"))
    monkeypatch.setattr(spread, "start", lambda loadings, progress: loaded.extend(loadings))
    monkeypatch.setattr(serve, "_run", lambda load, *_: load(lambda done, total: None))
    app(["serve", "--model", "demo", "--memory", "8GiB", *option], standalone_mode=False)
    assert [loading.device for loading in loaded] == devices
    assert {loading.config.memory_bytes for loading in loaded} == {8 << 30}
    assert capsys.readouterr().err.endswith(told)


def test_all_gpus_of_a_machine_without_any():
    code, line = failed("--model", "demo", "--device", "all", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert (code, "no cuda device" in line) == (4, True), line


def test_the_extra_that_is_missing_is_named(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'uvicorn' else find(name, *more)\n"
    )
    code, line = failed(environment={"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    assert (code, 'pip install ".[server]"' in line) == (1, True), line


def test_help_needs_nothing_of_the_server():
    code = (
        "import sys; from memphi.cli import main; sys.argv = ['memphi', 'serve', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print('IMPORTED', *sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = ended.stdout.partition("IMPORTED")[2].split()
    assert "memphi.cli.serve" in imported
    assert not {"fastapi", "uvicorn", "numpy", "torch", "prometheus_client"} & set(imported)


def test_a_server_from_its_start_to_its_end():
    process = subprocess.Popen([*COMMAND, *DEMO], stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        with httpx2.Client(base_url=url, timeout=60) as client:
            assert client.get("/health").status_code == 503, "the port is open before the model is loaded"
            assert "is being loaded" in refused(client.post("/v1/chat/completions", json=HELLO), 503)
            while client.get("/health").status_code == 503:
                time.sleep(0.05)
            answer = client.post("/v1/chat/completions", json={**HELLO, "max_tokens": 4})
            assert answer.json()["usage"]["completion_tokens"] == 4
            ledger = client.get("/memory").json()
            assert ledger["accounts"]["weights"] == ledger["plan"]["weights_bytes"]
            assert re.search(r"^memphi_answer_tokens_total [1-9]", client.get("/metrics").text, re.MULTILINE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        rest = process.stderr.read()
        process.stderr.close()
    assert "demo is ready" in rest
    assert "POST /v1/chat/completions 200" in rest
    assert "Hello" not in rest
    assert "Traceback" not in rest


def test_a_server_drains_though_its_processes_get_the_signal_too():
    """As systemd ends a service: SIGTERM to all that it has started."""
    command = [*COMMAND, *DEMO, "--drain-seconds", "600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    asked = {**HELLO, "stream": True, "max_tokens": 700, "memphi": {"grammar": {"regex": "a{600}"}}}
    try:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        with httpx2.Client(base_url=url, timeout=60) as client:
            while client.get("/health").status_code == 503:
                time.sleep(0.05)
            with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                lines = answer.iter_lines()
                told = [next(lines)]
                os.killpg(process.pid, signal.SIGTERM)
                told += lines
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        rest = process.stderr.read()
        process.stderr.close()
    assert [line for line in told if line][-1] == "data: [DONE]"
    assert "killed" not in rest


def test_a_server_may_be_ended_while_it_loads():
    process = subprocess.Popen([*COMMAND, *DEMO], stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        assert httpx2.get(f"{url}/health").json()["state"] == "loading"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        rest = process.stderr.read()
        process.stderr.close()
    assert "Traceback" not in rest


# --- the drain -------------------------------------------------------------------------------------------------------


@contextmanager
def running(engine, drain_seconds):
    """A server whose signals a test sends itself, and its address."""
    listener = bind("127.0.0.1", 0)
    server = Server(make_app(engine, ServerSettings("demo")), drain_seconds, None, None)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield server, thread, address_of(listener, False)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_open_requests_end_before_the_server_does(fake):
    go_on = threading.Event()

    def say(request):
        first, *rest = said("It is a fake.")
        yield first
        go_on.wait(10)
        yield from rest

    slow = fake.worker.submit
    fake.worker.say = say
    fake.worker.submit = lambda *arguments: threading.Thread(target=slow, args=arguments, daemon=True).start()
    with running(fake, 30) as (server, thread, url), httpx2.Client(base_url=url, timeout=20) as client:
        with client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            late = httpx2.post(f"{url}/v1/chat/completions", json=HELLO)
            assert "shutting down" in refused(late, 503)
            assert httpx2.get(f"{url}/health").json()["state"] == "draining"
            assert thread.is_alive()
            go_on.set()
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        thread.join(20)
        assert not thread.is_alive()
    assert fake.worker.cancelled == []


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_end_in_time_is_cut(fake, signals):
    fake.worker.say = lambda request: [Delta("It", (1,))]  # And no end.
    with running(fake, 0.1 if signals == 1 else 60) as (server, thread, url):
        with (
            httpx2.Client(base_url=url, timeout=20) as client,
            client.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            for _ in range(signals):
                server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(httpx2.RemoteProtocolError):
                list(lines)
        thread.join(20)
        assert not thread.is_alive()
    assert fake.worker.cancelled == [0]


def test_a_port_that_is_taken_is_told_of():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MemphiError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "encrypted", "shown"),
    [("127.0.0.1", False, "http://127.0.0.1"), ("0.0.0.0", True, "https://127.0.0.1"), ("::1", False, "http://[::1]")],
)
def test_the_address_that_is_shown_can_be_opened(host, encrypted, shown):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        listener = bind(host, 0)
    except MemphiError:
        assert ":" in host, "every machine has IPv4"
        pytest.skip("this machine has no IPv6")
    with listener:
        assert address_of(listener, encrypted) == f"{shown}:{listener.getsockname()[1]}"
