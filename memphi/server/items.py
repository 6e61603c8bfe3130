"""The input items of /v1/responses, and what they are as messages of a chat completion.

Knows both forms and what each field is called in the other, so that an error about a message names the item.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from memphi.server.content import (
    AnyMessage,
    AssistantMessage,
    AudioPart,
    CalledFunction,
    ImagePart,
    ImageUrl,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
    kind_of,
)
from memphi.server.fields import IGNORED, Fields

Echoed = Annotated[Any, IGNORED]
"""What answers have and clients send back with them."""


class InputText(Fields):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Echoed = None


class InputImage(Fields):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["low", "auto", "high"] | None = None
    file_id: None = None
    prompt_cache_breakpoint: Echoed = None


class OutputText(Fields):
    type: Literal["output_text"]
    text: str
    annotations: Echoed = None
    logprobs: Echoed = None


def form_of(value: object) -> str:
    """Whether a field is text or anything else."""
    return "<text>" if isinstance(value, str) else "<parts>"


Read = Annotated[InputText, Tag("<input_text>")]
UserPart = Annotated[
    Read | Annotated[InputImage, Tag("<input_image>")] | Annotated[AudioPart, Tag("<input_audio>")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_part",
        custom_error_message="a part's type must be input_text, input_image or input_audio",
    ),
]
AssistantPart = Annotated[
    Read | Annotated[OutputText, Tag("<output_text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        kind_of, custom_error_type="unknown_part", custom_error_message="a part's type must be output_text or refusal"
    ),
]
PlainText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputText], Tag("<parts>")], Discriminator(form_of)
]


class Item(Fields):
    """What items have in common: how they came out of an earlier response, which changes nothing."""

    id: Annotated[str | None, IGNORED] = None
    status: Annotated[str | None, IGNORED] = None


class SystemItem(Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer"]
    content: PlainText
    phase: Annotated[str | None, IGNORED] = None


class UserItem(Item):
    type: Literal["message"] | None = None
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[UserPart], Tag("<parts>")], Discriminator(form_of)
    ]
    phase: Annotated[str | None, IGNORED] = None


class AssistantItem(Item):
    type: Literal["message"] | None = None
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[AssistantPart], Tag("<parts>")], Discriminator(form_of)
    ]
    phase: Annotated[str | None, IGNORED] = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """A JSON object, as text."""
    caller: Echoed = None
    namespace: None = None


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: PlainText
    caller: Echoed = None
    name: Annotated[str | None, IGNORED] = None
    namespace: None = None


def _kind_of_item(value: object) -> str | None:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    kind = given.get("type") or "message"
    return f"<{given.get('role')}>" if kind == "message" else f"<{kind}>"


AnyItem = Annotated[
    Annotated[SystemItem, Tag("<system>")]
    | Annotated[SystemItem, Tag("<developer>")]
    | Annotated[UserItem, Tag("<user>")]
    | Annotated[AssistantItem, Tag("<assistant>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="unknown_item",
        custom_error_message="an item is a message of a system, developer, user or assistant, a function_call or a "
        "function_call_output",
    ),
]


class Messages:
    """Items as messages, with the names that their fields have among the items."""

    def __init__(self, instructions: str | None, items: str | Sequence[AnyItem]) -> None:
        self.messages: list[AnyMessage] = []
        self.names: dict[str, str] = {}
        """Paths among the items by the paths among the messages, of all that may be wrong."""
        if instructions:
            self._add(SystemMessage(role="system", content=instructions), "instructions")
        if isinstance(items, str):
            self._add(UserMessage(role="user", content=items), "input")
            return
        for place, item in enumerate(items):
            self._read(item, f"input[{place}]")

    def _read(self, item: AnyItem, at: str) -> None:
        if isinstance(item, UserItem):
            self._add(UserMessage(role="user", content=self._read_content(item.content, at)), at)
        elif isinstance(item, SystemItem):
            self._add(SystemMessage(role="system", content=_read_text(item.content)), at)
        elif isinstance(item, CallOutputItem):
            self.names[f"{self._next}.tool_call_id"] = f"{at}.call_id"
            self._add(ToolMessage(role="tool", content=_read_text(item.output), tool_call_id=item.call_id), at)
        elif isinstance(item, CallItem):
            self._read_call(item, at)
        else:
            self._read_answer(item, at)

    @property
    def _next(self) -> str:
        """Where the next message will stand."""
        return f"messages[{len(self.messages)}]"

    def _add(self, message: AnyMessage, at: str) -> None:
        self.names[self._next] = at
        self.messages.append(message)

    def _read_answer(self, item: AssistantItem, at: str) -> None:
        """Text behind calls belongs to the answer that they stand in: what they gave comes after all of it."""
        parts = _answer_parts(item.content)
        if self.messages and isinstance(last := self.messages[-1], AssistantMessage) and last.tool_calls:
            last.content = [*_answer_parts(last.content or []), *parts]
        else:
            self._add(AssistantMessage(role="assistant", content=parts), at)

    def _read_call(self, item: CallItem, at: str) -> None:
        """A call belongs to the answer before it."""
        if not self.messages or not isinstance(self.messages[-1], AssistantMessage):
            self._add(AssistantMessage(role="assistant"), at)
        answer = self.messages[-1]
        assert isinstance(answer, AssistantMessage)
        calls = answer.tool_calls = answer.tool_calls or []
        to = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.names[f"{to}.function.arguments"] = f"{at}.arguments"
        function = CalledFunction(name=item.name, arguments=item.arguments)
        calls.append(ToolCall(id=item.call_id, type="function", function=function))

    def _read_content(self, content: str | list[UserPart], at: str) -> str | list[TextPart | ImagePart | AudioPart]:
        if isinstance(content, str):
            return content
        parts: list[TextPart | ImagePart | AudioPart] = []
        for place, part in enumerate(content):
            here, there = f"{at}.content[{place}]", f"{self._next}.content[{place}]"
            if isinstance(part, InputImage):
                self.names[f"{there}.image_url.url"] = f"{here}.image_url"
                image = ImageUrl(url=part.image_url, detail=part.detail)
                parts.append(ImagePart(type="image_url", image_url=image))
            elif isinstance(part, AudioPart):
                self.names[f"{there}.input_audio.data"] = f"{here}.input_audio.data"
                parts.append(part)
            else:
                parts.append(TextPart(type="text", text=part.text))
        return parts


def _read_text(content: str | list[InputText]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def _answer_parts(content: str | Sequence[AssistantPart | TextPart]) -> list[TextPart | RefusalPart]:
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    return [part if isinstance(part, RefusalPart) else TextPart(type="text", text=part.text) for part in content]
