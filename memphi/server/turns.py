"""A turn of /v1/responses: the chunks of a chat completion as items that grow, told in events, the last with all items.

The events are OpenAI's; their order is what its clients insist on: an item is added, grows and is done before the next.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from memphi.server.errors import ApiError
from memphi.server.stream import Chunk

ERROR_CODES = {400: "invalid_prompt", 413: "invalid_prompt", 429: "rate_limit_exceeded"}
"""By status; any other is a server_error. OpenAI has no finer ones for text."""


class Turn:
    """One response, whole or in events."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None], model: str, echo: Chunk) -> None:
        """The chunks are of one choice, the last has the usage; echo is what the response repeats of its request."""
        self._chunks = chunks
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **echo,
        }
        self._items: list[dict[str, Any]] = []
        self._is_open = False
        """Whether the last item still grows."""
        self._blank = ""
        """Text that waits while it is white space alone: before a call and after one, that is nothing."""
        self._logprobs: list[Chunk] = []
        """Of that text."""
        self._told = 0

    async def whole(self) -> Chunk:
        """The response to who waits for all of it; raises ApiError where the answer fails."""
        last: Chunk = {}
        async with aclosing(self._tell()) as events:
            async for event in events:
                last = event
        response: Chunk = last["response"]
        return response

    async def events(self) -> AsyncGenerator[Chunk, None]:
        """The response in events; raises ApiError where the answer fails before it has begun."""
        async with aclosing(self._tell()) as events:
            try:
                async for event in events:
                    yield event
            except ApiError as error:
                if not self._told:
                    raise
                reason = {"code": ERROR_CODES.get(error.status, "server_error"), "message": error.message}
                yield self._state("failed", "failed", error=reason)

    async def _tell(self) -> AsyncGenerator[Chunk, None]:
        reason = ""
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                if not self._told:
                    yield self._state("created", "in_progress")
                    yield self._state("in_progress", "in_progress")
                for choice in chunk["choices"]:
                    for event in self._grow(choice["delta"], (choice["logprobs"] or {}).get("content", [])):
                        yield event
                    reason = choice["finish_reason"] or reason
        status = "incomplete" if reason == "length" else "completed"
        for event in self._finish(status):
            yield event
        usage, news = _usage(chunk["usage"]), chunk["memphi"]
        if status == "completed":
            yield self._state(status, status, completed_at=int(time.time()), usage=usage, memphi=news)
        else:
            details = {"reason": "max_output_tokens"}
            yield self._state(status, status, incomplete_details=details, usage=usage, memphi=news)

    def _grow(self, delta: Chunk, logprobs: list[Chunk]) -> Iterator[Chunk]:
        if text := delta.get("content"):
            yield from self._grow_text(text, logprobs)
        for call in delta.get("tool_calls", []):
            if "id" in call:
                self._blank, self._logprobs = "", []
                yield from self._begin(_call_item(call["id"], call["function"]["name"]))
            if more := call["function"]["arguments"]:
                self._items[-1]["arguments"] += more
                yield self._event("response.function_call_arguments.delta", self._place(), delta=more)

    def _grow_text(self, text: str, logprobs: list[Chunk]) -> Iterator[Chunk]:
        self._blank += text
        self._logprobs += logprobs
        is_message = self._is_open and self._items[-1]["type"] == "message"
        if is_message or self._blank.strip():
            if not is_message:
                yield from self._begin_message()
            yield from self._say()

    def _say(self) -> Iterator[Chunk]:
        """Tell what waited, in the message that is open."""
        text, logprobs = self._blank, self._logprobs
        self._blank, self._logprobs = "", []
        part = self._items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._event("response.output_text.delta", self._place(0), delta=text, logprobs=logprobs)

    def _begin_message(self) -> Iterator[Chunk]:
        yield from self._begin(_message_item())
        part: Chunk = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", self._place(0), part=part)
        self._items[-1]["content"] = [{**part, "logprobs": []}]

    def _begin(self, item: dict[str, Any]) -> Iterator[Chunk]:
        """Add an item, after the one before it is done."""
        yield from self._close("completed")
        self._items.append(item)
        self._is_open = True
        yield self._event("response.output_item.added", {"output_index": len(self._items) - 1}, item=item)

    def _close(self, status: str) -> Iterator[Chunk]:
        """The last item has what it gets."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._items[-1]
        if item["type"] == "message":
            part = item["content"][0]
            told = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", self._place(0), **told)
            yield self._event("response.content_part.done", self._place(0), part=part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", self._place(), **told)
        item["status"] = status
        yield self._event("response.output_item.done", {"output_index": len(self._items) - 1}, item=item)

    def _finish(self, status: str) -> Iterator[Chunk]:
        """The answer has ended; one without words is a message all the same."""
        if not self._items:
            yield from self._begin_message()
            yield from self._say()
        yield from self._close(status)

    def _place(self, content: int | None = None) -> Chunk:
        """What names the last item in an event, or a part of its content."""
        item = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return item if content is None else {**item, "content_index": content}

    def _state(self, name: str, status: str, **more: Any) -> Chunk:  # noqa: ANN401
        """The response as it stands, as an event."""
        response = {
            **self._head,
            "status": status,
            "output": self._items,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            **more,
        }
        return self._event(f"response.{name}", {}, response=response)

    def _event(self, kind: str, place: Chunk, /, **more: Any) -> Chunk:  # noqa: ANN401
        event = {"type": kind, "sequence_number": self._told, **place, **more}
        self._told += 1
        return event


def _message_item() -> dict[str, Any]:
    identity = f"msg_{uuid.uuid4().hex}"
    return {"id": identity, "type": "message", "status": "in_progress", "role": "assistant", "content": []}


def _call_item(call: str, name: str) -> dict[str, Any]:
    item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
    return {**item, "call_id": call, "name": name, "arguments": ""}


def _usage(usage: Chunk) -> Chunk:
    """As responses have it; nothing is written to a cache for a price, and there is no reasoning."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
