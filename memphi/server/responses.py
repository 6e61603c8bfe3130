"""POST /v1/responses: its fields, said as a chat completion's, so that both ask the engine in one way.

Nothing is stored: a client sends the whole conversation each time. `items` reads the conversation, `turns` makes items
and events of the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from memphi.request import MOST_TOP_LOGPROBS
from memphi.server.answers import unless_left
from memphi.server.bodies import JsonRoute
from memphi.server.chat import ChatRequest, NamedSchema, ObjectFormat, ResponseFormat, SchemaFormat, TextFormat, begin
from memphi.server.content import kind_of
from memphi.server.errors import ApiError
from memphi.server.fields import IGNORED, Extensions, Fields
from memphi.server.items import AnyItem, Messages, form_of
from memphi.server.reply import Reply
from memphi.server.service import Service, service_of
from memphi.server.stream import STREAMED, event_stream, json_response
from memphi.server.tools import FunctionFields, FunctionType, NamedFunction, NamedTool, Tool, ToolChoice
from memphi.server.turns import Turn

router = APIRouter(route_class=JsonRoute)


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class TextFields(Fields):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[ObjectFormat, Tag("<json_object>")]
            | Annotated[FlatSchemaFormat, Tag("<json_schema>")],
            Discriminator(
                kind_of,
                custom_error_type="unknown_format",
                custom_error_message="type must be text, json_object or json_schema",
            ),
        ]
        | None
    ) = None
    verbosity: Annotated[str | None, IGNORED] = None


class FlatTool(FunctionFields, FunctionType):
    """Its type comes first, since a tool of another type has other fields."""


class FlatNamedTool(NamedFunction, FunctionType):
    """Likewise."""


class ResponseStreamOptions(Fields):
    include_obfuscation: Annotated[Literal[False] | None, IGNORED] = None


class ResponsesRequest(Fields):
    """The body of POST /v1/responses."""

    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[AnyItem], Field(min_length=1), Tag("<parts>")],
        Discriminator(form_of),
    ]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """There is no reasoning, so nothing of it either."""
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    text: TextFields = TextFields()
    tools: list[FlatTool] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[FlatNamedTool, Tag("<parts>")],
            Discriminator(form_of),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    memphi: Extensions = Extensions()
    max_tool_calls: Annotated[int | None, IGNORED] = None
    metadata: Annotated[dict[str, str] | None, IGNORED] = None
    prompt_cache_key: Annotated[str | None, IGNORED] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, IGNORED] = None
    prompt_cache_retention: Annotated[str | None, IGNORED] = None
    reasoning: Annotated[dict[str, Any] | None, IGNORED] = None
    safety_identifier: Annotated[str | None, IGNORED] = None
    service_tier: Annotated[Literal["auto", "default"] | None, IGNORED] = None
    store: Annotated[bool | None, IGNORED] = None
    """Nothing is stored, whatever is asked for."""
    truncation: Annotated[Literal["disabled"] | None, IGNORED] = None
    user: Annotated[str | None, IGNORED] = None
    access_programs: None = None
    background: Annotated[Literal[False] | None, IGNORED] = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    image: None = None
    moderation: None = None
    previous_response_id: None = None
    prompt: None = None

    @property
    def has_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError.wrong("stream_options", "needs stream: true")

    def chat(self, messages: Messages) -> ChatRequest:
        """The same, said as a chat completion."""
        return ChatRequest(
            messages=messages.messages,
            model=self.model,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.has_logprobs,
            top_logprobs=self.top_logprobs if self.has_logprobs else None,
            response_format=self._format,
            tools=[Tool(type="function", function=tool) for tool in self.tools or []],
            tool_choice=self._choice,
            parallel_tool_calls=self.parallel_tool_calls,
            memphi=self.memphi,
        )

    @property
    def _format(self) -> ResponseFormat | None:
        asked = self.text.format
        return SchemaFormat(type="json_schema", json_schema=asked) if isinstance(asked, FlatSchemaFormat) else asked

    @property
    def _choice(self) -> ToolChoice | None:
        choice = self.tool_choice
        return NamedTool(type="function", function=choice) if isinstance(choice, FlatNamedTool) else choice


NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "tool_choice.function.name": "tool_choice.name",
}
"""What fields are called here, by what chat completions call them."""


def _tool_names(tools: Sequence[FlatTool]) -> dict[str, str]:
    return {f"tools[{place}].function.parameters": f"tools[{place}].parameters" for place in range(len(tools))}


@router.post("/v1/responses", responses=STREAMED)
async def create_response(http: HttpRequest, body: ResponsesRequest) -> Response:
    """Answer a conversation; the client keeps it."""
    service = service_of(http)
    service.check_room(1)
    body.check()
    messages = Messages(body.instructions, body.input)
    with renamed({**NAMES, **messages.names, **_tool_names(body.tools or [])}):
        turn = await unless_left(http, start(service, body, messages))
        if body.stream:
            return await event_stream(http, turn.events(), end=b"")
        return json_response(await unless_left(http, turn.whole()))


async def start(service: Service, body: ResponsesRequest, messages: Messages) -> Turn:
    """Read and measure what is asked; raises ApiError in the words of chat completions."""
    chat = body.chat(messages)
    conversation, work = await begin(service, chat)
    places = {name: messages.names[place] for name, place in conversation.places.items()}
    reply = Reply(
        service.settings.model,
        replace(conversation, places=places),
        work,
        service.engine.tokenizer,
        body.ignored(),
        each=body.memphi.each,
        toolbox=chat.toolbox,
        has_logprobs=body.has_logprobs,
        include_usage=True,
    )
    return Turn(reply.chunks(), service.settings.model, echo(body))


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors raised inside name fields as they are called here."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from None


def echo(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    given = body.model_dump(include={"text", "tools", "tool_choice"}, by_alias=True, exclude_unset=True)
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": body.temperature or 0.0,
        "text": {"format": {"type": "text"}, **given.get("text", {})},
        "tool_choice": given.get("tool_choice") or "auto",
        "tools": given.get("tools") or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
