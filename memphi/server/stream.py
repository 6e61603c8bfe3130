"""Server-sent events: an answer piece by piece."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from memphi.errors import MemphiError
from memphi.server.answers import unless_left
from memphi.server.errors import ApiError

Chunk = Mapping[str, Any]
DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""For the OpenAPI document, of a route that answers whole or in pieces."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Proxies shall pass every piece on at once."""


async def event_stream(http: HttpRequest, chunks: AsyncGenerator[Chunk, None], end: bytes = DONE) -> StreamingResponse:
    """The response that sends chunks as they come, and the end; an error before the first has a status of its own."""
    first = await unless_left(http, anext(chunks))
    return EventStream(_events(first, chunks, end), headers=HEADERS, media_type="text/event-stream")


class EventStream(StreamingResponse):
    """A streaming response that ends what it streams as soon as its client leaves."""

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


async def _events(first: Chunk, chunks: AsyncGenerator[Chunk, None], end: bytes) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        yield event(first)
        try:
            async for chunk in chunks:
                yield event(chunk)
        except ApiError as error:
            yield event(error.body)
        except MemphiError as error:
            yield event(ApiError.of(error).body)
        else:
            yield end


def event(data: Chunk) -> bytes:
    """One event, with its name where it has one. ASCII, since half a surrogate pair has no bytes."""
    name = f"event: {data['type']}\n".encode() if "type" in data else b""
    return name + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def json_response(data: Chunk) -> Response:
    """A whole answer."""
    return Response(json.dumps(data, separators=(",", ":")).encode(), media_type="application/json")
