"""What the server's tests share: the demo model's engine, an engine without a model, and servers of both."""

import base64
import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest
import uvicorn
from starlette.testclient import TestClient

import memphi
from memphi.checkpoint.locate import locate
from memphi.server.app import make_app
from memphi.server.serving import Connection
from memphi.server.settings import ServerSettings
from tests.server.fakes import FakeEngine


@pytest.fixture(scope="session")
def engine():
    """The demo model in this process."""
    engine = memphi.load("demo", device="cpu", dtype="fp32")
    yield engine
    engine.close()


@pytest.fixture
def fake():
    """An engine without a model; set `fake.worker.say`."""
    return FakeEngine()


@pytest.fixture
def client(fake):
    """A client of a server over the fake engine."""
    with TestClient(make_app(fake, ServerSettings("demo")), base_url="http://localhost") as client:
        yield client


def ask(client, content="Hello", **fields):
    """POST one question to the chat endpoint."""
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body)


def chunks_of(response):
    """The chunks of a stream that is done."""
    assert response.status_code == 200, response.text
    *lines, last = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


def refused(response, status, param=None):
    """The sentence of a refusal, which has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"]) == (status, param), error
    return error["message"]


def wait_for(holds, seconds=30):
    """Until something holds, which another thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@contextmanager
def asked(url, path, **content):
    """The connection of a POST that has been sent whole; its client leaves at the end of the block."""
    request = httpx2.Request("POST", url + path, **content)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        yield connection


@contextmanager
def listening(app):
    """A real server on a free port, in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, http=Connection, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has ended before it began"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def url(engine):
    """The address of a real server over the demo model."""
    with listening(make_app(engine, ServerSettings("demo"))) as address:
        yield address


def sample(name):
    """One of the demo's sample files."""
    return (locate("demo").folder.parent / "media" / name).read_bytes()


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
