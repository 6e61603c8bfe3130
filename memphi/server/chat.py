"""POST /v1/chat/completions: its fields, and what is asked of the engine for them."""

import asyncio
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from memphi.errors import MemphiError
from memphi.request import MOST_TOP_LOGPROBS, Grammar, Message, OnPressure, Request
from memphi.server.answers import Work, accept, unless_left
from memphi.server.bodies import JsonRoute
from memphi.server.content import AnyMessage, Conversation, kind_of, read_messages, urls_of
from memphi.server.errors import ApiError
from memphi.server.fields import IGNORED, Fields, SamplingFields
from memphi.server.reply import Reply
from memphi.server.service import Service, service_of
from memphi.server.stream import STREAMED, event_stream, json_response
from memphi.server.tools import Tool, Toolbox, ToolChoice

router = APIRouter(route_class=JsonRoute)


class TextFormat(Fields):
    type: Literal["text"]


class ObjectFormat(Fields):
    type: Literal["json_object"]


class NamedSchema(Fields):
    name: Annotated[str, IGNORED]
    description: Annotated[str | None, IGNORED] = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """The answer is held to the schema in any case."""


class SchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_format",
        custom_error_message="type must be text, json_object or json_schema",
    ),
]


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str] | None, IGNORED] = None
    modalities: Annotated[list[Literal["text"]] | None, IGNORED] = None
    prediction: Annotated[dict[str, Any] | None, IGNORED] = None
    prompt_cache_key: Annotated[str | None, IGNORED] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, IGNORED] = None
    prompt_cache_retention: Annotated[str | None, IGNORED] = None
    reasoning_effort: Annotated[str | None, IGNORED] = None
    safety_identifier: Annotated[str | None, IGNORED] = None
    service_tier: Annotated[Literal["auto", "default"] | None, IGNORED] = None
    store: Annotated[Literal[False] | None, IGNORED] = None
    verbosity: Annotated[str | None, IGNORED] = None
    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    web_search_options: None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError.wrong("top_logprobs", "needs logprobs: true")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise ApiError.wrong("max_tokens", "and max_completion_tokens differ; send one of them")
        if self.own_grammar is not None and (self.tools or self._format_grammar is not None):
            raise ApiError.wrong("memphi.grammar", "goes with neither tools nor response_format")
        if self.memphi.each and (self.choices > 1 or self.tools or self.logprobs):
            raise ApiError.wrong("memphi.each", "goes with neither n, tools nor logprobs")

    @property
    def toolbox(self) -> Toolbox:
        return Toolbox(self.tools or [], self.tool_choice, self.parallel_tool_calls is not False)

    @property
    def grammar_place(self) -> str:
        return super().grammar_place if self._format_grammar is None else "response_format"

    @property
    def _format_grammar(self) -> Grammar | None:
        """The response format's."""
        if isinstance(self.response_format, ObjectFormat):
            return Grammar("json_object")
        if not isinstance(self.response_format, SchemaFormat):
            return None
        schema = self.response_format.json_schema.json_schema
        return Grammar("json_object") if schema is None else Grammar("json_schema", json.dumps(schema))

    def request(self, messages: tuple[Message, ...], on_pressure: OnPressure) -> Request:
        """What the engine is asked about a conversation; on_pressure where the body does not say."""
        grammar = self.toolbox.grammar(self._format_grammar or self.own_grammar)
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self.sampling(self.max_completion_tokens or self.max_tokens, top_logprobs, grammar)
        return Request(messages, sampling, self.memphi.on_pressure or on_pressure)


@router.post("/v1/chat/completions", responses=STREAMED)
async def create_chat_completion(http: HttpRequest, body: ChatRequest) -> Response:
    """Answer a conversation."""
    service = service_of(http)
    service.check_room(body.choices)
    conversation, work = await unless_left(http, begin(service, body))
    reply = Reply(
        service.settings.model,
        conversation,
        work,
        service.engine.tokenizer,
        body.ignored(),
        each=body.memphi.each,
        toolbox=body.toolbox,
        has_logprobs=bool(body.logprobs),
        include_usage=body.include_usage,
    )
    if body.stream:
        return await event_stream(http, reply.chunks())
    return json_response(await unless_left(http, reply.whole()))


async def begin(service: Service, body: ChatRequest) -> tuple[Conversation, Work]:
    """Read and measure what is asked; raises ApiError."""
    service.check_model(body.model)
    body.check()
    detail = body.memphi.detail or "auto"
    fetched = await service.fetch(urls_of(body.messages))
    limits, each = service.settings.limits, body.memphi.each
    conversation = await asyncio.to_thread(read_messages, body.messages, detail, limits, fetched, tolerant=each)
    if listed := body.toolbox.listed:
        conversation = conversation.with_tools(listed)
    if each and not conversation.media:
        raise ApiError.wrong("memphi.each", "needs attachments")
    with conversation.located(body.place_of), body.toolbox.blamed():
        requests = [
            asked if isinstance(asked, MemphiError) else body.request(asked, service.settings.on_pressure)
            for asked in (conversation.shares if each else [conversation.messages])
        ]
        return conversation, await accept(service, requests, body.choices, tolerant=each)
