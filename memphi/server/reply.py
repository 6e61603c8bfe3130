"""A chat completion in the making: answers to OpenAI's objects, whole or in chunks, with memphi's own news beside."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from memphi.errors import MemphiError
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Delta, FinishReason, TokenLogprob
from memphi.server.answers import Answer, Work
from memphi.server.content import Conversation
from memphi.server.logprobs import chat_logprobs
from memphi.server.shares import Shares
from memphi.server.stream import Chunk
from memphi.server.tools import ArgumentsGrown, CallBegun, CallReader, Found, Toolbox


class Reply:
    """One response, and what it needs to know of its request."""

    def __init__(
        self,
        model: str,
        conversation: Conversation,
        work: Work,
        tokenizer: Tokenizer,
        ignored: list[str],
        *,
        each: bool,
        toolbox: Toolbox,
        has_logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._conversation = conversation
        self._work = work
        self._tokenizer = tokenizer
        self._ignored = ignored
        self._shares = Shares([media.name for media in conversation.media]) if each else None
        self._choices = 1 if each else len(work.runs)
        self._toolbox = toolbox
        self._has_logprobs = has_logprobs
        self._include_usage = include_usage

    async def whole(self) -> Chunk:
        """The response to who waits for all of it; raises ApiError where an answer fails."""
        answers = [Answer() for _ in range(self._choices)]
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                answers[number].add(delta)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(place, answer) for place, answer in enumerate(answers)],
            "usage": self._work.usage,
            "memphi": self._news(),
        }

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The response in pieces; raises ApiError where an answer fails."""
        strands = [_Strand(self._toolbox.reader()) for _ in range(self._choices)]
        left = self._choices
        async with aclosing(self._deltas()) as deltas:
            async for number, delta in deltas:
                left -= delta.finish_reason is not None
                for grown, logprobs, reason in strands[number].grow(delta):
                    is_last = reason is not None and not left and not self._include_usage
                    yield self._chunk(number, grown, logprobs, reason, {"memphi": self._news()} if is_last else {})
        if self._include_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            yield {**head, "choices": [], "usage": self._work.usage, "memphi": self._news()}

    async def _deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """More of the choices, by their numbers."""
        async with aclosing(self._work.pieces()) as pieces:
            async for number, piece in pieces:
                if self._shares is not None:
                    for delta in self._shares.add(number, piece):
                        yield 0, delta
                elif isinstance(piece, MemphiError):
                    raise self._conversation.locate(piece)
                else:
                    yield number, piece
        if self._shares is not None and len(self._shares.errors) == len(self._work.runs):
            raise self._conversation.locate(self._shares.errors[0])

    def _choice(self, place: int, answer: Answer) -> Chunk:
        reader = self._toolbox.reader()
        found: list[Found] = [*reader.feed(answer.text), *reader.flush()] if reader else [answer.text]
        text = "".join(item for item in found if isinstance(item, str))
        calls = list(_calls(found))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text if text.strip() else None, "tool_calls": calls}
        return {
            "index": place,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": _reason(answer.finish_reason, reader),
        }

    def _chunk(self, number: int, grown: Chunk, logprobs: list[TokenLogprob], reason: str | None, more: Chunk) -> Chunk:
        choice = {"index": number, "delta": grown, "logprobs": self._logprobs(logprobs), "finish_reason": reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, **more}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Chunk | None:
        return chat_logprobs(logprobs, self._tokenizer) if self._has_logprobs else None

    def _news(self) -> Chunk:
        news = self._work.news(self._ignored)
        return news if self._shares is None else {**news, "each": self._shares.listed(self._conversation.places)}


class _Strand:
    """One choice of a stream."""

    def __init__(self, reader: CallReader | None) -> None:
        self._reader = reader
        self._begun = False
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is held back."""

    def grow(self, delta: Delta) -> Iterator[tuple[Chunk, list[TokenLogprob], str | None]]:
        """The deltas that a piece makes, as OpenAI writes them, with their logprobs, at last with why it ended."""
        if not self._begun:
            self._begun = True
            yield {"role": "assistant", "content": ""}, [], None
        self._logprobs += delta.logprobs
        for found in self._find(delta):
            yield _grown(found), self._take_logprobs(), None
        if delta.finish_reason is not None:
            yield {}, self._take_logprobs(), _reason(delta.finish_reason, self._reader)

    def _find(self, delta: Delta) -> list[Found]:
        if self._reader is None:
            return [delta.text] if delta.text else []
        return [*self._reader.feed(delta.text), *(self._reader.flush() if delta.finish_reason else [])]

    def _take_logprobs(self) -> list[TokenLogprob]:
        taken, self._logprobs = self._logprobs, []
        return taken


def _grown(found: Found) -> Chunk:
    """What was found, as a delta."""
    if isinstance(found, str):
        return {"content": found}
    if isinstance(found, CallBegun):
        function = {"name": found.name, "arguments": ""}
        return {"tool_calls": [{"index": found.place, "id": found.id, "type": "function", "function": function}]}
    return {"tool_calls": [{"index": found.place, "function": {"arguments": found.text}}]}


def _calls(found: list[Found]) -> Iterator[Chunk]:
    """The calls among what was found, whole."""
    for begun in found:
        if isinstance(begun, CallBegun):
            grown = [g.text for g in found if isinstance(g, ArgumentsGrown) and g.place == begun.place]
            yield {"id": begun.id, "type": "function", "function": {"name": begun.name, "arguments": "".join(grown)}}


def _reason(reason: FinishReason | None, reader: CallReader | None) -> str:
    assert reason is not None
    return "tool_calls" if reason is FinishReason.STOP and reader is not None and reader.calls else reason.value
