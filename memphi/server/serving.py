"""The port: bound before anything is loaded, and drained before the server ends."""

import asyncio
import signal
import socket
import time
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from memphi.errors import MemphiError
from memphi.server.service import Service

BACKLOG = 2048
CUT_SECONDS = 1
"""What is open still when the time to drain is over gets so long to notice that it is cut off."""
STANDSTILL_SECONDS = 60.0
"""A connection is ended that does not get any further between two looks at it, so far apart."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises MemphiError for an address that is not this machine's, or is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as wrong:
        what = wrong.strerror if isinstance(wrong, OSError) else str(wrong)
        raise MemphiError(f"cannot listen on {host} port {port}: {what}; choose another --host or --port") from None


def address_of(listener: socket.socket, encrypted: bool) -> str:
    """Where a browser on this machine finds it."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http{'s' if encrypted else ''}://{shown}:{port}"


class Connection(H11Protocol):
    """One connection; it ends where a request does not come, or where what is left to send at its end is not taken."""

    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        """Called again and again, with where it stood the last time."""
        now = self._waits_for()
        if now is not None and now == before:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(STANDSTILL_SECONDS, self._look, now)

    def _waits_for(self) -> object:
        """What the client has to do next, equal as long as it has done nothing of it; None: it is not its turn."""
        if self.transport.is_closing():
            return self.transport.get_write_buffer_size()
        return ("the request after", self.cycle) if self.conn.their_state is h11.IDLE else None


class Server(uvicorn.Server):
    """Ends when a signal comes, after what is open then has been answered; at once when a second one comes."""

    def __init__(self, app: FastAPI, drain_seconds: float, certificate: str | None, key: str | None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CUT_SECONDS,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._service: Service = app.state.service
        self._service.on_failure = self._end
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGINT and SIGTERM. They are not kept, so the process ends with exit code 0."""
        if self._service.draining:
            self.force_exit = sig == signal.SIGINT
            self._end()
        self._service.draining = True
        self._deadline = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to end."""
        if self._deadline is not None and (not self.server_state.tasks or time.monotonic() > self._deadline):
            self._end()
        return await super().on_tick(counter)

    def _end(self) -> None:
        self.should_exit = True
