"""What stands before every route: who may ask, how much at once, how large; and one line about each request.

ASGI middlewares that pass every byte on as it comes. They know paths and headers, nothing of what routes do.
`app` puts them up; `bind` decides where the server may listen at all.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memphi.server.errors import ApiError, ClientLeftError
from memphi.server.service import Service

FULL_BODIES = 16
"""All open requests together may bring as many bytes as so many bodies of full size, other than recordings."""
UPLOAD_SECONDS, SLOWEST_BYTES_PER_SECOND = 30.0, 32 << 10
"""A body may take so long, and a second more for so many bytes of it that are here."""
LINGER_SECONDS = 2.0
"""Who is refused in the middle of an upload gets so long to notice, before the connection is closed."""
STUCK_SECONDS = 60.0
"""So long a client may take nothing of what is sent to it."""
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-fA-F:.]+)\]|(?P<name>[^:\[\]]+?)\.?)(?::[0-9]*)?")

logger = logging.getLogger("memphi.server")


def guard(app: FastAPI, service: Service) -> None:
    """Put the guards up before an app's routes; to be called once, after which the app has its first request."""
    app.add_middleware(Uploads, service=service)  # The innermost first.
    app.add_middleware(Door, service=service)
    app.add_middleware(Patience)
    app.add_middleware(Log, service=service)


class Log:
    """One line for each request: method, path, status, sizes and time, and nothing that it said."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, sizes = 499, {"in": 0, "out": 0}  # 499, as nginx calls it: the client left before there was a status.

        async def counted_receive() -> Message:
            message = await receive()
            sizes["in"] += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sizes["out"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.note_response(getattr(scope.get("route"), "path", "none"), status)
            # Who watches a server that loads asks again and again.
            is_told = scope["method"] == "POST" or (status >= 400 and status != 503)
            level = logging.INFO if is_told else logging.DEBUG
            path = scope.get("raw_path", b"").split(b"?")[0].decode("latin-1")  # Escaped, so that a line stays one.
            took = time.perf_counter() - began
            summary = "%s %s %d, %d bytes in, %d bytes out, %.3f s"
            logger.log(level, summary, scope["method"], path, status, sizes["in"], sizes["out"], took)


class Patience:
    """Hangs up on a client that takes nothing of what it asked for and would keep its place for ever."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        since: float | None = None
        is_stuck = False
        timer: asyncio.TimerHandle

        async def watched_send(message: Message) -> None:
            nonlocal since
            since = loop.time()  # One timer for all: one for each piece would cost more than the piece.
            await send(message)
            since = None

        def look() -> None:
            nonlocal is_stuck, timer
            is_stuck = since is not None and loop.time() - since >= STUCK_SECONDS
            if is_stuck:
                task.cancel()
            else:
                timer = loop.call_later(STUCK_SECONDS, look)

        timer = loop.call_later(STUCK_SECONDS, look)
        try:
            await self._app(scope, receive, watched_send)
        except asyncio.CancelledError:
            if not is_stuck:
                raise
            task.uncancel()
        finally:
            timer.cancel()


class Door:
    """Lets in who asks for this server by its name, from its own page or no page, with a key where there are keys."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._hosts = {name.lower() for name in service.settings.allowed_hosts}
        self._keys = [_digest(key.encode()) for key in service.settings.api_keys]
        self._open: Counter[int | None] = Counter()
        """Requests that are being answered, by the number of their key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # There is nothing here that speaks it.
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers, scope)
            self._check_origin(headers)
            with self._place(self._find_key(headers, scope), scope["method"]):
                await self._app(scope, receive, send)
        except ApiError as error:  # Raised here; those of routes have become responses further in.
            await refuse(error, receive, send)

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        """A page elsewhere may point its own name at this machine; its requests come with that name."""
        name = _host_name(headers.get("host", ""))
        if name is None or not (self._is_ours(name) or _is_address(name, scope)):
            advice = "start it with --allowed-host for every other name that it has"
            message = f"this server does not answer to the host {headers.get('host', '')!r}; {advice}"
            raise ApiError(421, message, None, "unknown_host")

    def _check_origin(self, headers: Headers) -> None:
        """Browsers send simple requests to anybody, and only keep the answers from pages that may not have them."""
        origin = headers.get("origin")
        if origin is None:
            return
        netloc = origin.rpartition("://")[2].lower()
        if netloc != headers["host"].lower() and _host_name(netloc) not in self._hosts:
            raise ApiError(403, "this server answers no requests from web pages elsewhere", None, "foreign_origin")

    def _is_ours(self, name: str) -> bool:
        return name == "localhost" or name in self._hosts

    def _find_key(self, headers: Headers, scope: Scope) -> int | None:
        """The number of a request's key, None where none is needed; raises ApiError for any other."""
        if not self._keys or _is_public(scope):
            return None
        scheme, _, given = ", ".join(headers.getlist("authorization")).partition(" ")
        digest = _digest(given.strip().encode("latin-1"))
        # All are compared, so that the time taken tells nothing of which.
        found = [number for number, key in enumerate(self._keys) if hmac.compare_digest(digest, key)]
        if scheme.lower() != "bearer" or not found:
            message = "this server wants one of its keys: Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return found[0]

    @contextmanager
    def _place(self, key: int | None, method: str) -> Iterator[None]:
        """One of the places that a key has, while the block runs; raises ApiError where there is none."""
        if method != "POST":  # What only looks needs none: a page watches while it works.
            yield
            return
        self._service.check_open()  # Before its body is read.
        if self._open[key] >= (most := self._most_open()):
            which = "the most that one key may have" if len(self._keys) > 1 else "as many as have places here (--queue)"
            message = f"{most} requests are open already, {which}; send this one again later"
            raise ApiError.later(429, message, "too_many_requests")
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1

    def _most_open(self) -> int:
        """Requests of one key at once, of several; else of all, of which each asks for one answer at least."""
        service = self._service
        return service.settings.limits.key_requests if len(self._keys) > 1 else service.most_answers


class Uploads:
    """Bounds the bodies of requests while they come: each and all together in bytes, each in time."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._limits = service.settings.limits
        self._held_bytes = 0
        """Of the bodies of all open requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most_bytes = self._limits.recording_bytes if _is_recording(scope) else self._limits.body_bytes
        if _declared_bytes(scope) > most_bytes:
            await refuse(_too_large(most_bytes), receive, send)
            return
        upload = Upload(receive, send, partial(self._hold, most_bytes))
        try:
            await self._app(scope, upload.receive, upload.send)
        except Exception:
            if upload.refusal is None:  # Else it is what an app says of a body that ends too soon.
                raise
        finally:
            self._held_bytes -= upload.size_bytes
        if upload.refusal is not None and not upload.answered:
            await refuse(upload.refusal, None if upload.complete else receive, send)

    def _hold(self, most_bytes: int, size_bytes: int, more_bytes: int) -> None:
        """So many more bytes of a body are here, which then has its size; raises ApiError where that is too much."""
        self._held_bytes += more_bytes
        if size_bytes > most_bytes:
            raise _too_large(most_bytes)
        if self._held_bytes > FULL_BODIES * self._limits.body_bytes:
            raise ApiError.later(503, "too much is being sent at once; send the request again later", "too_many_bytes")


class Upload:
    """One request's body as it comes; what is refused looks to the app like a client that has left."""

    def __init__(self, receive: Receive, send: Send, hold: Callable[[int, int], None]) -> None:
        self.size_bytes = 0
        self.refusal: ApiError | None = None
        self.answered = False
        self.complete = False
        self._receive = receive
        self._send = send
        self._hold = hold
        self._deadline = asyncio.get_running_loop().time() + UPLOAD_SECONDS

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # Now it comes when the client leaves.
        try:
            if self.refusal is None:
                return await self._more()
        except ApiError as error:
            self.refusal = error
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.refusal is None:
            self.answered = True
            await self._send(message)

    async def _more(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline + self.size_bytes / SLOWEST_BYTES_PER_SECOND):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body comes too slowly; send the request again", None, "too_slow") from None
        if message["type"] == "http.disconnect":
            raise ClientLeftError  # Else the app takes what there is for a body, and finds fault with it.
        more_bytes = len(message.get("body", b""))
        self.size_bytes += more_bytes
        self.complete = not message.get("more_body", False)
        self._hold(self.size_bytes, more_bytes)
        return message


async def refuse(error: ApiError, receive: Receive | None, send: Send) -> None:
    """Answer with an error and hang up, but not at once on a client that still sends and would miss the answer.

    receive is None where the whole request is here.
    """
    response = error.response
    response.headers["Connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while receive is not None and (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _is_public(scope: Scope) -> bool:
    """Whether a path is open to who has no key: the server's health, and the page, which then asks for one."""
    path: str = scope["path"]
    return path == "/health" or (scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/")))


def _host_name(host: str) -> str | None:
    """The name or address in a Host header, without its port; None where it is none."""
    match = _HOST.fullmatch(host.lower())
    return match and (match["address"] or match["name"])


def _is_address(name: str, scope: Scope) -> bool:
    """Whether a name is an address of this machine: a loopback one, or the one that the request came to."""
    try:
        return ip_address(name).is_loopback or name == (scope.get("server") or ("",))[0]
    except ValueError:
        return False


def _is_recording(scope: Scope) -> bool:
    """Whether a body is a form with a recording to transcribe, whose files are written to disk as they come."""
    form = Headers(scope=scope).get("content-type", "").startswith("multipart/form-data")
    return form and scope["path"].startswith("/v1/audio/")


def _too_large(most_bytes: int) -> ApiError:
    advice = "send fewer attachments or fewer minutes, or compress them: sound as FLAC, OGG or MP3, pictures as JPEG"
    message = f"the body has more than {most_bytes} bytes, the most that is taken here; {advice}"
    return ApiError(413, message, None, "body_too_large")


def _declared_bytes(scope: Scope) -> int:
    """How large a body is said to be; 0 where nothing is said."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def _digest(key: bytes) -> bytes:
    """A key as it is compared: all digests are of one length."""
    return hashlib.sha256(key).digest()
