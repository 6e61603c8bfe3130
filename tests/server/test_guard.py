"""What stands before every route: names, pages elsewhere, keys, sizes, how much at once, and the log."""

import asyncio
import hmac
import logging
import socket
import threading
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from uvicorn.server import ServerState

from memphi.server import guard as guards
from memphi.server import serving
from memphi.server.guard import guard
from memphi.server.service import Service
from memphi.server.settings import Limits, ServerSettings
from memphi.server.stream import EventStream
from tests.server.conftest import listening

HOME = "http://localhost:8000"
BODY = 1000


def make_app(key_requests=128, queue=256, **settings):
    """A guarded app with a few routes; `app.state.gate` lets /wait go on."""
    app = FastAPI()
    service = Service(
        SimpleNamespace(engines=()),
        ServerSettings("demo", limits=Limits(body_bytes=BODY, key_requests=key_requests, queue=queue), **settings),
    )
    app.state.service, app.state.gate, app.state.entered = service, threading.Event(), threading.Semaphore(0)

    @app.get("/")
    @app.get("/page/app.js")
    @app.get("/health")
    @app.get("/metrics")
    @app.post("/health")
    def show():
        return "shown"

    @app.post("/echo/{name}")
    async def echo(http: HttpRequest, name: str):
        return {"name": name, "bytes": len(await http.body())}

    @app.post("/json")
    async def take(body: dict):
        return body

    @app.post("/wait")
    def wait():
        app.state.entered.release()
        assert app.state.gate.wait(30)
        return "waited"

    @app.post("/fail")
    def fail():
        raise RuntimeError("a bug")

    @app.post("/early")
    async def early(http: HttpRequest):
        async def pieces():
            yield b"before"
            async for _ in http.stream():
                yield b"more"

        return StreamingResponse(pieces())

    guard(app, service)
    return app


def client_of(app, **settings):
    return TestClient(app, base_url=HOME, **settings)


def sentence(response, status, code):
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


@pytest.fixture
def locked():
    return client_of(make_app(api_keys=("first", "second", "third")))


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", ["first", "second", "third"])
def test_every_key_opens(locked, key):
    assert locked.post("/echo/a", headers=bearer(key)).json() == {"name": "a", "bytes": 0}
    assert locked.post("/echo/a", headers={"authorization": f"bearer  {key} "}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("fourth"),
        bearer(""),
        bearer("firs"),
        bearer("first second"),
        {"Authorization": "first"},
        {"Authorization": "Basic first"},
        {"X-Api-Key": "first"},
        {"Cookie": "key=first"},
        [("Authorization", "Bearer first"), ("Authorization", "Bearer second")],
    ],
)
def test_nothing_else_opens(locked, headers):
    response = locked.post("/echo/a", headers=headers)
    assert "Authorization: Bearer" in sentence(response, 401, "invalid_api_key")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("GET", "/healthy"),
        ("GET", "/health/"),
        ("GET", "/page"),
        ("GET", "/Page/app.js"),
        ("GET", "//page/app.js"),
        ("POST", "/page/app.js"),
        ("POST", "/"),
        ("OPTIONS", "/echo/a"),
        ("DELETE", "/nowhere"),
    ],
)
def test_without_a_key_every_other_path_is_closed_known_or_not(locked, method, path):
    sentence(locked.request(method, path), 401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/health"])
def test_the_page_and_health_need_no_key(locked, path):
    assert locked.get(path).json() == "shown"
    assert locked.head(path).status_code in (200, 405)


def test_all_keys_are_compared_and_each_at_full_length(locked, monkeypatch):
    compared = []

    def compare(given, key):
        compared.append((len(given), len(key)))
        return hmac.compare_digest(given, key)

    monkeypatch.setattr(guards, "hmac", SimpleNamespace(compare_digest=compare))
    for key in ("first", "third", "none", "x" * 500):
        locked.post("/echo/a", headers=bearer(key))
    assert compared == [(32, 32)] * 12


def test_no_keys_no_questions():
    assert client_of(make_app()).post("/echo/a").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:9", "localhost.", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "chat.lan", "Chat.LAN:1"],
)
def test_names_that_are_answered_to(host):
    client = client_of(make_app(allowed_hosts=("Chat.lan",)))
    assert client.post("/echo/a", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:localhost",
        "localhost@evil.example",
        "192.168.1.4",
        "0.0.0.0",
        "[::ffff:10.0.0.1]",
        "[localhost]",
        "sub.chat.lan",
        "localhost:80:80",
        "localhost,evil.example",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/echo/a"])
def test_names_that_are_not(host, path):
    client = client_of(make_app(allowed_hosts=("chat.lan",)))
    assert "--allowed-host" in sentence(client.post(path, headers={"Host": host}), 421, "unknown_host")


def test_an_address_is_answered_to_where_the_request_came_to_it():
    app = make_app()
    messages = asyncio.run(call(app, server=("192.168.1.4", 8000), headers=[(b"host", b"192.168.1.4:8000")]))
    assert messages[0]["status"] == 200
    messages = asyncio.run(call(app, server=("192.168.1.5", 8000), headers=[(b"host", b"192.168.1.4:8000")]))
    assert messages[0]["status"] == 421
    messages = asyncio.run(call(app, server=("evil.example", 8000), headers=[(b"host", b"evil.example")]))
    assert messages[0]["status"] == 421
    assert asyncio.run(call(app, headers=[]))[0]["status"] == 421


@pytest.mark.parametrize("origin", [HOME, "HTTP://LOCALHOST:8000", "https://chat.lan", "https://chat.lan:444"])
def test_pages_of_its_own(origin):
    client = client_of(make_app(allowed_hosts=("chat.lan",)))
    assert client.post("/echo/a", headers={"Origin": origin}).status_code == 200


@pytest.mark.parametrize("origin", ["null", "", "https://evil.example", "http://localhost:3000", "http://localhost"])
@pytest.mark.parametrize("kind", ["text/plain", "application/json"])
def test_pages_elsewhere_get_no_answer_and_start_no_work(origin, kind):
    client = client_of(make_app(allowed_hosts=("chat.lan",)))
    response = client.post("/echo/a", headers={"Origin": origin, "Content-Type": kind})
    sentence(response, 403, "foreign_origin")
    assert not any(name.startswith("access-control") for name in response.headers)


def test_no_preflight_is_answered():
    asked = {"Origin": HOME, "Access-Control-Request-Method": "POST"}
    response = client_of(make_app()).options("/echo/a", headers=asked)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


def test_no_cookies(locked):
    for response in (locked.post("/echo/a", headers=bearer("first")), locked.get("/"), locked.post("/")):
        assert "set-cookie" not in response.headers


@contextmanager
def waiting(app, client, headers, number=1):
    """So many requests to /wait that are open while the block runs."""
    threads = [
        threading.Thread(target=client.post, args=("/wait",), kwargs={"headers": headers}) for _ in range(number)
    ]
    with ExitStack() as stack:
        stack.callback(lambda: [thread.join() for thread in threads])
        stack.callback(app.state.gate.set)
        for thread in threads:
            thread.start()
        for _ in threads:
            assert app.state.entered.acquire(timeout=30)
        yield


def test_each_key_has_its_own_places():
    app = make_app(key_requests=2, api_keys=("first", "second"))
    with client_of(app) as client, waiting(app, client, bearer("first"), 2):
        response = client.post("/echo/a", headers=bearer("first"))
        assert "2 requests are open" in sentence(response, 429, "too_many_requests")
        assert int(response.headers["Retry-After"]) > 0
        assert client.post("/echo/a", headers=bearer("second")).status_code == 200
        assert client.get("/metrics", headers=bearer("first")).status_code == 200
    assert client.post("/echo/a", headers=bearer("first")).status_code == 200


@pytest.mark.parametrize("keys", [(), ("only",)])
def test_who_shares_them_with_nobody_has_all_places(keys):
    app, headers = make_app(key_requests=1, queue=2, api_keys=keys), bearer("only")
    with client_of(app) as client, waiting(app, client, headers, 2):
        response = client.post("/echo/a", headers=headers)
        assert "2 requests are open already, as many as have places here (--queue)" in sentence(
            response, 429, "too_many_requests"
        )


def test_places_are_given_back_whatever_happened():
    client = client_of(make_app(queue=1), raise_server_exceptions=False)
    for path in ("/fail", "/nowhere", "/echo/a"):
        client.post(path)
    client.post("/echo/a", content=b"x" * (BODY + 1))
    assert client.post("/echo/a").status_code == 200


def test_a_server_that_shuts_down_takes_no_work_and_still_tells_how_it_is():
    app = make_app()
    app.state.service.draining = True
    client = client_of(app)
    response = client.post("/echo/a", content=bytes(100))
    assert "shutting down" in sentence(response, 503, "server_draining")
    assert int(response.headers["Retry-After"]) > 0
    assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/echo/a", "/json"])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large(path, chunked):
    client = client_of(make_app())
    content = b'"%s"' % (b"x" * (BODY - 1))
    assert len(content) == BODY + 1
    assert str(BODY) in sentence(
        client.post(path, content=iter([content[:500], content[500:]]) if chunked else content), 413, "body_too_large"
    )
    assert client.post("/echo/a", content=content[1:]).json()["bytes"] == BODY


def by_hand(**fields):
    """The scope of a POST to /echo/a."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/echo/a",
        "raw_path": b"/echo/a",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        **fields,
    }


class Hurried(asyncio.SelectorEventLoop):
    """A loop that waits for nothing: where it would, it is later at once."""

    def __init__(self):
        self._now = 0.0
        super().__init__()
        select = self._selector.select

        def skip(timeout):
            self._now += timeout or 0
            return select(0)

        self._selector.select = skip

    def time(self):
        return self._now


def hurry(work):
    with asyncio.Runner(loop_factory=Hurried) as runner:
        return runner.run(work)


async def call(app, messages=None, stays=False, **fields):
    """What an app sends for one request; after its messages the client leaves, or stays and says nothing.

    A number among the messages is a time to wait.
    """
    left, sent = iter(messages or [piece(0, more=False)]), []

    async def receive():
        await asyncio.sleep(0)
        while (message := next(left, None)) is not None:
            if isinstance(message, dict):
                return message
            await asyncio.sleep(message)
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(by_hand(**fields), receive, send)
    return sent


def piece(size, more=True):
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def test_a_length_that_lies_is_found_out():
    headers = [(b"host", b"localhost"), (b"content-length", b"10")]
    sent = asyncio.run(call(make_app(), [piece(BODY), piece(1, more=False)], headers=headers))
    assert sent[0]["status"] == 413
    assert [message["type"] for message in sent].count("http.response.start") == 1


def test_who_has_sent_everything_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guards, "LINGER_SECONDS", 1000.0)
    refused = call(make_app(), [piece(BODY), piece(1, more=False)], stays=True)
    sent = asyncio.run(asyncio.wait_for(refused, 20))
    assert (sent[0]["status"], sent[-1]["more_body"]) == (413, False)


@pytest.mark.parametrize("length", [b"9" * 19, b"9" * 5000, b"-1", b"\xb2", b"1e3", b""])
def test_a_length_that_is_none(length):
    headers = [(b"host", b"localhost"), (b"content-length", length)]
    assert asyncio.run(call(make_app(), [piece(5, more=False)], headers=headers))[0]["status"] in (200, 413)


def test_a_body_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr(guards, "LINGER_SECONDS", 0.05)
    came = count()
    sent = asyncio.run(call(make_app(), (piece(100) for _ in came)))
    assert sent[0]["status"] == 413
    assert next(came) > 2 * BODY / 100, "who is still sending has no time to notice"
    assert (b"connection", b"close") in sent[0]["headers"]
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize(("bytes_per_second", "status"), [(1, 200), (1 << 20, 408)])
def test_a_body_has_as_much_time_as_it_brings_bytes(monkeypatch, bytes_per_second, status):
    monkeypatch.setattr(guards, "UPLOAD_SECONDS", 0.3)
    monkeypatch.setattr(guards, "SLOWEST_BYTES_PER_SECOND", bytes_per_second)
    sent = asyncio.run(call(make_app(), [piece(100), 0.5, piece(1, more=False)]))
    assert sent[0]["status"] == status


def test_bodies_of_all_requests_together_are_bounded(monkeypatch):
    monkeypatch.setattr(guards, "FULL_BODIES", 2)
    app = make_app()

    async def several():
        held = [asyncio.create_task(call(app, [piece(BODY)], stays=True)) for _ in range(2)]
        await asyncio.sleep(0.1)  # Until all else has been done.
        refused = await call(app, [piece(1)])
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return refused, await call(app, [piece(BODY, more=False)])

    refused, later = hurry(several())
    assert refused[0]["status"] == 503
    assert b"retry-after" in dict(refused[0]["headers"])
    assert later[0]["status"] == 200


def test_a_response_that_has_begun_is_not_begun_again():
    sent = asyncio.run(call(make_app(), [piece(BODY), piece(BODY), piece(1, more=False)], path="/early"))
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[0]["status"] == 200
    assert sent[-1].get("more_body")


def test_a_stream_is_passed_on_piece_by_piece():
    app = FastAPI()
    seen, step = [], asyncio.Event()

    @app.post("/stream")
    async def stream():
        async def pieces():
            for number in range(3):
                yield b"%d" % number
                await step.wait()  # Until the piece has arrived.
                step.clear()

        return StreamingResponse(pieces())

    guard(app, Service(SimpleNamespace(engines=()), ServerSettings("demo")))

    async def receive():
        return next(received, None) or await asyncio.Event().wait()

    async def send(message):
        if message.get("body"):
            seen.append(message["body"])
            step.set()

    received = iter([piece(0, more=False)])
    asyncio.run(asyncio.wait_for(app(by_hand(path="/stream"), receive, send), 30))
    assert seen == [b"0", b"1", b"2"]


@pytest.fixture
def flood():
    """The address of a server that sends without end, and what tells that it has stopped."""
    app, stopped = FastAPI(), threading.Event()

    @app.get("/flood")
    async def send_for_ever():
        async def pieces():
            try:
                while True:
                    yield bytes(1 << 20)
                    await asyncio.sleep(0)
            finally:
                stopped.set()

        return EventStream(pieces())

    guard(app, Service(SimpleNamespace(engines=()), ServerSettings("demo")))
    with listening(app) as url:
        yield int(url.rpartition(":")[2]), stopped


def test_a_client_that_takes_nothing_is_hung_up_on(flood, monkeypatch):
    """Its request ends, and its connection, though what was sent is never taken."""
    monkeypatch.setattr(guards, "STUCK_SECONDS", 0.2)
    monkeypatch.setattr(serving, "STANDSTILL_SECONDS", 2)
    ended = note_ends(monkeypatch)
    port, stopped = flood
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stopped.wait(20)
        assert ended.wait(20)
        with suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass


def note_ends(monkeypatch):
    """An event that is set once a connection of a real server has ended."""
    ended, end = threading.Event(), serving.Connection.connection_lost

    def note(connection, error):
        end(connection, error)
        ended.set()

    monkeypatch.setattr(serving.Connection, "connection_lost", note)
    return ended


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local"], ids=["nothing", "half a head"])
def test_a_client_whose_request_does_not_come_is_hung_up_on(monkeypatch, earlier, sent):
    monkeypatch.setattr(serving, "STANDSTILL_SECONDS", 0.1)
    with (
        listening(make_app()) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection,
        suppress(ConnectionError),
    ):
        for _ in range(earlier):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(1 << 16)
        connection.sendall(sent)
        while connection.recv(1 << 16):
            pass


def send_slowly(seconds, pause=0.0):
    """What of three pieces arrives at a client that takes so long for each, from an app that pauses between them."""
    taken = []

    async def app(scope, receive, send):
        for number in range(3):
            await send(number)
            await asyncio.sleep(pause)

    async def send(piece):
        await asyncio.sleep(seconds)
        taken.append(piece)

    hurry(guards.Patience(app)({"type": "http"}, None, send))
    return taken


def test_patience_is_for_who_takes_something_and_who_has_to_wait():
    assert send_slowly(2.1 * guards.STUCK_SECONDS) == []
    assert send_slowly(0.9 * guards.STUCK_SECONDS) == [0, 1, 2]
    assert send_slowly(0, pause=5 * guards.STUCK_SECONDS) == [0, 1, 2]


def test_a_connection_stays_while_it_is_worked_for():
    """However long an answer takes, it is the server's turn."""
    transport = MagicMock()
    transport.is_closing.return_value = False

    async def app(scope, receive, send):
        await asyncio.sleep(10 * serving.STANDSTILL_SECONDS)
        assert not transport.abort.called
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def ask():
        state = ServerState()
        connection = serving.Connection(uvicorn.Config(app, log_config=None), state, {})
        connection.connection_made(transport)
        connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.gather(*state.tasks)
        assert b"done" in transport.write.call_args_list[-2].args[0] + transport.write.call_args_list[-1].args[0]
        connection.connection_lost(None)

    hurry(ask())


def test_sockets_of_the_web_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "websocket", "path": "/echo/a", "headers": [(b"host", b"localhost")]}
    asyncio.run(make_app()(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_log_says_sizes_and_times_and_nothing_else(caplog):
    caplog.set_level(logging.DEBUG, "memphi.server")
    client = client_of(make_app(api_keys=("the-secret-key",)), raise_server_exceptions=False)
    secret = "the-secret-word"
    headers = {**bearer("the-secret-key"), "User-Agent": secret}
    client.post(f"/echo/a?q={secret}", content=secret.encode(), headers=headers)
    client.post("/fail", headers=headers)
    client.get("/no%0Awhere%1b", headers=bearer("x"))
    lines = [record.getMessage() for record in caplog.records if record.name == "memphi.server"]
    assert [line.rpartition(", ")[0] for line in lines] == [
        "POST /echo/a 200, 15 bytes in, 23 bytes out",
        "POST /fail 500, 0 bytes in, 0 bytes out",
        f"GET /no%0Awhere%1b 401, 0 bytes in, {lines[2].split(', ')[2]}",
    ]
    assert not any("secret" in line for line in lines)


def test_responses_are_counted_by_route():
    app = make_app()
    client = client_of(app)
    client.post("/echo/a")
    client.post("/echo/b")
    client.get("/nowhere")
    client.post("/", headers={"Host": "evil.example"})
    text = app.state.service.metrics.text().decode()
    assert 'memphi_http_requests_total{route="/echo/{name}",status="200"} 2.0' in text
    assert 'memphi_http_requests_total{route="none",status="404"} 1.0' in text
    assert 'memphi_http_requests_total{route="none",status="421"} 1.0' in text


def test_who_leaves_in_the_middle_of_a_body_is_counted_as_gone():
    app = make_app()
    headers = [(b"host", b"localhost"), (b"content-length", b"100"), (b"content-type", b"application/json")]
    asyncio.run(call(app, [piece(1), {"type": "http.disconnect"}], headers=headers, path="/json"))
    assert 'status="499"} 1.0' in app.state.service.metrics.text().decode()


def exchange(address, request, content=b""):
    """Send bytes to a real server, however many it takes, and read what comes back until it hangs up."""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(request)
            connection.sendall(content)
        except OSError:
            pass  # It has hung up; what it said before is still to be read.
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def test_a_real_client_in_the_middle_of_a_large_upload_reads_why():
    with listening(make_app()) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST /echo/a HTTP/1.1\r\nHost: localhost\r\n"
        declared = exchange(address, head + b"Content-Length: 8000000\r\n\r\n", bytes(8_000_000))
        assert declared.startswith(b"HTTP/1.1 413")
        chunks = (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 8 + b"0\r\n\r\n"
        chunked = exchange(address, head + b"Transfer-Encoding: chunked\r\n\r\n", chunks)
        assert chunked.startswith(b"HTTP/1.1 413")
        assert chunked.count(b"HTTP/1.1") == 1
        truncated = head + b"Content-Length: 10\r\nConnection: close\r\n\r\n"
        assert exchange(address, truncated, bytes(500)).startswith(b"HTTP/1.1 200")
