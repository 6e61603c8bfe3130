"""The server against its own OpenAPI document, against bodies and media that are nearly right, and against clients that
are slow, that leave, and that ask twice: no 500, nothing left over, nobody stuck."""

import base64
import json
import re
import socket
import threading
import time
from contextlib import closing, contextmanager

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.server.conftest import listening, sample
from tests.server.fakes import FakeEngine

READ = ["/health", "/memory", "/metrics", "/v1/models", "/v1/models/{model}"]
ASKED = [
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/tokenize",
]


def bounded(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


# --- the document ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    """A server over an engine without a model: its address, its document and its service."""
    app = make_app(FakeEngine(), ServerSettings("demo"))
    with listening(app) as url:
        yield url, schemathesis.openapi.from_url(f"{url}/openapi.json"), app.state.service


def test_the_document_has_every_route(served):
    assert sorted(served[1]) == sorted([*READ, *ASKED])


def check(served, operation, mode, examples):
    """Send what the document's schema allows, or what it does not, and hold the answers against the document."""
    url, _, service = served

    @bounded(examples)
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def send(case, named):
        if named and isinstance(case.body, dict):
            case.body["model"] = "demo"
        response = case.call(base_url=url)
        # A schema tells neither which fields go together nor what an attachment is.
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
        assert response.status_code < 500

    send()
    assert service.open_answers == 0


@pytest.mark.parametrize("path", READ)
def test_what_is_read_is_what_the_document_has(served, path):
    check(served, served[1][path]["get"], GenerationMode.POSITIVE, 10)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ASKED)
def test_what_is_asked_is_answered_as_the_document_has_it(served, path, mode):
    check(served, served[1][path]["post"], mode, 40)


# --- bodies that are nearly right ------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["", " ", "Hi", "\ud800", "<|end|>", "\0"])
URI = st.sampled_from(["x", "data:image/png;base64,", "data:,", "data:audio/wav;base64,AAAA", "https://x.test/a.png"])
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def odd(strategy):
    """Mostly this, at times anything."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
        max_leaves=3,
    )
    return st.integers(0, 40).flatmap(lambda dice: anything if dice == 33 else strategy)


def record(optional=None, **fields):
    return st.fixed_dictionaries({name: odd(value) for name, value in fields.items()}, optional=optional)


@st.composite
def image(draw):
    """A data URI of a sample, whole or cut off."""
    content = sample(draw(st.sampled_from(["shapes.png", "number.png"])))
    end = draw(st.sampled_from([None, 0, 8, 24, 60]))
    return "data:image/png;base64," + base64.b64encode(content[:end]).decode()


PARTS = st.lists(
    record(type=st.just("text"), text=TEXT)
    | record(type=st.just("image_url"), image_url=record(url=image() | URI))
    | record(type=st.just("input_audio"), input_audio=record(data=TEXT, format=st.just("wav"))),
    max_size=3,
)
ROLE = st.sampled_from(["user", "user", "user", "user", "system", "developer", "assistant", "tool"])
MESSAGE = record(
    role=ROLE,
    content=TEXT | PARTS | st.none(),
    optional={"tool_calls": st.just([CALL]), "tool_call_id": st.just("c1")},
)
QUESTION = st.fixed_dictionaries({"role": st.just("user"), "content": st.just("Well?")})
SETTINGS = {
    "max_tokens": st.integers(-1, 50),
    "temperature": st.floats(-1, 3),
    "stop": TEXT | st.lists(TEXT, max_size=2),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "x", "-1", "999999999"]), st.integers(-101, 101)),
    "seed": st.integers(),
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "memphi": st.fixed_dictionaries({}, optional={"each": st.booleans(), "detail": st.integers(-1, 3)}),
    "user": TEXT,
}


@st.composite
def chats(draw):
    """Some messages, often with a question at the end, and a few settings."""
    messages = draw(odd(st.lists(MESSAGE, max_size=3)))
    if isinstance(messages, list) and draw(st.integers(0, 4)):
        messages = [*messages, draw(QUESTION)]
    names = draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=2, unique=True))
    return {"messages": messages, **{name: draw(odd(SETTINGS[name])) for name in names}}


ITEM_PARTS = st.lists(
    record(type=st.sampled_from(["input_text", "output_text"]), text=TEXT)
    | record(type=st.just("input_image"), image_url=image() | URI)
    | record(type=st.just("input_audio"), input_audio=record(data=TEXT, format=st.just("wav"))),
    max_size=3,
)
ITEM = (
    record(role=ROLE, content=TEXT | ITEM_PARTS)
    | record(type=st.just("function_call"), call_id=st.just("c1"), name=TEXT, arguments=st.just("{}") | TEXT)
    | record(type=st.just("function_call_output"), call_id=st.just("c1"), output=TEXT)
)
RESPONSES = st.fixed_dictionaries(
    {"input": odd(TEXT | st.lists(ITEM, max_size=5))},
    optional={"instructions": odd(TEXT), "max_output_tokens": odd(st.integers(-1, 50)), "stream": odd(st.booleans())},
)


def place_in(body, path):
    """Follow a path through a body as far as it goes; returns the steps that are left."""
    steps = re.findall(r"[^.\[\]]+", path)
    while steps:
        try:
            body = body[int(steps[0]) if isinstance(body, list) else steps[0]]
        except (KeyError, IndexError, ValueError, TypeError):
            break
        steps.pop(0)
    return steps


@pytest.mark.parametrize(("path", "bodies"), [("/v1/chat/completions", chats()), ("/v1/responses", RESPONSES)])
def test_nearly_right_bodies_are_answered_or_refused_where_they_are_wrong(path, bodies):
    app = make_app(FakeEngine(), ServerSettings("demo"))
    statuses = set()
    with TestClient(app, base_url="http://localhost") as client:

        @bounded(250)
        @given(bodies)
        def send(body):
            # Python's JSON has NaN and halves of surrogate pairs, as some clients send them.
            response = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 413), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert error["message"]
                assert "\n" not in error["message"]
                assert "input tag" not in error["message"]
                # What is missing, or unknown, may be named too: one step that is not there.
                assert error["param"] is None or len(place_in(body, error["param"])) <= 1, error

        send()
    assert {200, 400} <= statuses
    assert app.state.service.open_answers == 0


NO_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"1",
    b'"x"',
    b"\xff\xfe",
    b"{}",
    b'{"model":1e999}',
    b'{"n":' + b"9" * 5000 + b"}",
]
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"]


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("content", [*NO_BODIES, *DEEP], ids=range(len(NO_BODIES) + len(DEEP)))
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data; boundary=x", ""])
def test_bodies_that_are_none(client, path, content, kind):
    response = client.post(path, content=content, headers={"Content-Type": kind} if kind else {})
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["message"]


# --- media that are damaged ------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, names):
    """A sample file, cut off, with other bytes in places, or longer."""
    content = bytearray(sample(draw(st.sampled_from(names))))
    for _ in range(draw(st.integers(0, 6))):
        # The headers are where it hurts.
        place = draw(st.integers(0, min(200, len(content) - 1)) | st.integers(0, len(content) - 1))
        content[place] = draw(st.integers(0, 255))
    end = draw(st.none() | st.integers(0, len(content)))
    return bytes(content[:end]) + draw(st.binary(max_size=8))


@pytest.fixture(scope="module")
def real(engine):
    """A client of a server over the demo model, with the service."""
    app = make_app(engine, ServerSettings("demo"))
    with TestClient(app, base_url="http://localhost") as client:
        yield client, app.state.service


def settled(engine, service):
    """Whether nothing is open any more, after a while at most."""
    deadline = time.monotonic() + 20
    while (engine.stats.open or service.open_answers) and time.monotonic() < deadline:
        time.sleep(0.01)
    return (engine.stats.open, service.open_answers) == (0, 0)


def test_damaged_pictures_are_seen_or_refused_with_their_place(engine, real):
    client, service = real

    @bounded(60)
    @given(damaged(["shapes.png", "number.png", "tall.png"]))
    def send(content):
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"max_tokens": 1, "messages": [{"role": "user", "content": parts}]}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code in (200, 400, 413), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "messages[0].content[1].image_url.url"

    send()
    assert settled(engine, service)


def test_damaged_sound_is_heard_or_refused_with_its_place(engine, real):
    client, service = real

    @bounded(40)
    @given(damaged(["question.wav"]))
    def send(content):
        item = {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}
        body = {"max_output_tokens": 1, "input": [{"role": "user", "content": [item]}]}
        response = client.post("/v1/responses", json=body)
        assert response.status_code in (200, 400, 413), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"] == "input[0].content[0].input_audio.data"
        response = client.post("/v1/audio/transcriptions", files={"file": content}, data={"model": "demo"})
        assert response.status_code in (200, 400, 413), response.text

    send()
    assert settled(engine, service)


# --- clients that are slow, that leave, that ask twice ---------------------------------------------------------------

LONG = {
    "messages": [{"role": "user", "content": "Go on."}],
    "max_tokens": 2000,
    "memphi": {"grammar": {"regex": "[a-z]{4000}"}},
}
SHORT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 1.0, "seed": 7}


@pytest.fixture(scope="module")
def port(engine):
    """A real server over the demo model that must be idle when the module is done: its port and its service."""
    app = make_app(engine, ServerSettings("demo"))
    with listening(app) as url:
        yield int(url.rpartition(":")[2]), app.state.service
        assert settled(engine, app.state.service)


def head(body, length=None):
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode()


@contextmanager
def connected(number):
    with closing(socket.create_connection(("127.0.0.1", number), timeout=30)) as connection:
        yield connection


def ask(number, body=SHORT):
    """A whole answer's text."""
    response = httpx2.post(f"http://127.0.0.1:{number}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def leave_before_the_body_is_whole(connection):
    connection.sendall(head(b"", 1000) + b'{"messages":')


def leave_after_the_head(connection):
    connection.sendall(head(b"", 10))


def leave_in_the_middle_of_the_head(connection):
    connection.sendall(b"POST /v1/chat/comp")


def leave_in_the_middle_of_a_stream(connection):
    body = json.dumps({**LONG, "stream": True}).encode()
    connection.sendall(head(body) + body)
    received = b""
    while b'"content":"' not in received:
        received += connection.recv(1000)


def leave_in_the_middle_of_several_answers(connection):
    body = json.dumps({**LONG, "stream": True, "n": 3}).encode()
    connection.sendall(head(body) + body)
    received = b""
    while not all(b'"index":%d' % choice in received for choice in range(3)):
        received += connection.recv(1000)


def leave_with_a_reset(connection):
    leave_in_the_middle_of_a_stream(connection)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def leave_by_saying_no_more(connection):
    leave_in_the_middle_of_a_stream(connection)
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(1 << 16):
        pass


@pytest.mark.parametrize(
    ("leave", "begun"),
    [
        (leave_in_the_middle_of_the_head, 0),
        (leave_after_the_head, 0),
        (leave_before_the_body_is_whole, 0),
        (leave_in_the_middle_of_a_stream, 4),
        (leave_in_the_middle_of_several_answers, 12),
        (leave_with_a_reset, 4),
        (leave_by_saying_no_more, 4),
    ],
)
def test_clients_that_leave_leave_nothing_behind(engine, port, leave, begun):
    number, service = port
    cancelled = engine.stats.ended["cancelled"]

    def come_and_go():
        with connected(number) as connection:
            leave(connection)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert settled(engine, service)
    assert engine.stats.ended["cancelled"] - cancelled == begun
    assert ask(number)


def test_a_client_that_leaves_while_it_waits_for_the_whole(engine, port):
    number, service = port
    cancelled = engine.stats.ended["cancelled"]
    body = json.dumps(LONG).encode()
    with connected(number) as connection:
        connection.sendall(head(body) + body)
        while not engine.stats.open:
            time.sleep(0.001)
    assert settled(engine, service)
    assert engine.stats.ended["cancelled"] == cancelled + 1


def test_a_client_that_sends_slowly_is_answered(port):
    number, _ = port
    body = json.dumps(SHORT).encode()
    with connected(number) as connection:
        for byte in head(body) + body:
            connection.sendall(bytes([byte]))
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_slowly_gets_everything(port):
    number, _ = port
    body = json.dumps({**SHORT, "stream": True}).encode()
    with connected(number) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(head(body) + body)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(7)
    assert b"data: [DONE]" in received
    text = "".join(
        json.loads(line)["choices"][0]["delta"].get("content", "")
        for line in re.findall(r"^data: (\{.*\})\r?$", received.decode(), re.MULTILINE)
    )
    assert text == ask(number)


def test_a_client_that_asks_again_and_again_gets_the_same(port):
    number, _ = port
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(number))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [ask(number)] * 6


def test_a_client_that_asks_again_before_it_is_answered(port):
    number, _ = port
    body = json.dumps(SHORT).encode()
    with connected(number) as connection:
        connection.sendall((head(body) + body) * 3)
        received = b""
        while received.count(b"HTTP/1.1 200") < 3 or not received.endswith(b"}"):
            received += connection.recv(1 << 16)
    contents = re.findall(r'"content":("(?:[^"\\]|\\.)*")', received.decode())
    assert [json.loads(content) for content in contents] == [ask(number)] * 3
