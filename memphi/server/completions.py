"""POST /v1/completions: text that the model goes on with, as it stands, without the turns of a conversation.

Text that looks like a special token stays text, so no prompt can write a conversation of its own.
"""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from memphi.errors import MemphiError
from memphi.request import Message, OnPressure, Request, TokenLogprob
from memphi.server.answers import Answer, Work, accept, unless_left
from memphi.server.bodies import JsonRoute
from memphi.server.errors import ApiError
from memphi.server.fields import SamplingFields, as_list
from memphi.server.logprobs import TextOffsets, plain_logprobs
from memphi.server.service import Service, service_of
from memphi.server.stream import STREAMED, Chunk, event_stream, json_response

USUAL_TOKENS = 16
"""How long an answer is that does not say; OpenAI's."""
MOST_LOGPROBS = 5

router = APIRouter(route_class=JsonRoute)


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[str], Field(min_length=1, max_length=128), BeforeValidator(as_list, json_schema_input_type=str | list[str])
    ]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: None = None

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.choices):
            raise ApiError.wrong("best_of", "is not supported beyond n: all answers are returned")
        if self.memphi.each:
            raise ApiError.wrong("memphi.each", "needs attachments, which only chat completions have")

    def requests(self, on_pressure: OnPressure) -> list[Request]:
        """What the engine is asked, one request for each prompt; on_pressure where the body does not say.

        Under a seed that the body gives each prompt is answered as it is alone, also one that comes twice.
        """
        sampling = self.sampling(self.max_tokens or USUAL_TOKENS, self.logprobs, self.own_grammar)
        pressure, apart = self.memphi.on_pressure or on_pressure, self.choices if self.seed is None else 0
        return [
            Request(
                (Message("user", (text,)),),
                replace(sampling, seed=(sampling.seed + place * apart) % 2**64),
                pressure,
                raw=True,
            )
            for place, text in enumerate(self.prompt)
        ]


@router.post("/v1/completions", responses=STREAMED)
async def create_completion(http: HttpRequest, body: CompletionRequest) -> Response:
    """Go on with one text or several."""
    service = service_of(http)
    service.check_room(len(body.prompt) * body.choices)
    work = await unless_left(http, begin(service, body))
    reply = Reply(body, work, service)
    if body.stream:
        return await event_stream(http, reply.chunks())
    return json_response(await unless_left(http, reply.whole()))


async def begin(service: Service, body: CompletionRequest) -> Work:
    """Measure what is asked; raises ApiError."""
    service.check_model(body.model)
    body.check()
    try:
        return await accept(service, body.requests(service.settings.on_pressure), body.choices)
    except MemphiError as error:
        raise ApiError.of(error, body.place_of(str(error)) or "prompt") from None


class Reply:
    """One response in the making, whole or in chunks."""

    def __init__(self, body: CompletionRequest, work: Work, service: Service) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model,
        }
        self._body = body
        self._work = work
        self._tokenizer = service.engine.tokenizer
        self._offsets = [TextOffsets(self._tokenizer) for _ in work.runs]

    async def whole(self) -> Chunk:
        """The response to who waits for all of it; raises ApiError where an answer fails."""
        try:
            answers = await self._work.collect()
        except MemphiError as error:
            raise ApiError.of(error) from None
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": self._work.usage, "memphi": self._news()}

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The response in pieces; raises ApiError where an answer fails."""
        left = len(self._work.runs)
        usage = {"usage": None} if self._body.include_usage else {}
        async with aclosing(self._work.pieces()) as pieces:
            async for number, piece in pieces:
                if isinstance(piece, MemphiError):
                    raise ApiError.of(piece)
                left -= piece.finish_reason is not None
                grown = Answer(piece.text, list(piece.logprobs), piece.finish_reason)
                news = {} if left or self._body.include_usage else {"memphi": self._news()}
                yield {**self._head, "choices": [self._choice(number, grown)], **usage, **news}
        if self._body.include_usage:
            yield {**self._head, "choices": [], "usage": self._work.usage, "memphi": self._news()}

    def _choice(self, number: int, answer: Answer) -> Chunk:
        """An answer, or what has come of it since the last time."""
        reason = answer.finish_reason
        return {
            "index": number,
            "text": answer.text,
            "logprobs": self._logprobs(number, answer.logprobs),
            "finish_reason": None if reason is None else reason.value,
        }

    def _logprobs(self, number: int, logprobs: list[TokenLogprob]) -> Chunk | None:
        if self._body.logprobs is None:
            return None
        return plain_logprobs(logprobs, self._tokenizer, self._offsets[number])

    def _news(self) -> Chunk:
        return self._work.news(self._body.ignored())
