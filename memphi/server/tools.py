"""Tools: OpenAI's description of them to the model's own, a choice to a grammar, and an answer to text and calls.

The model is shown a JSON list in its system message and answers <|tool_call|>[{"name": ..., "arguments": {...}}, ...]
<|/tool_call|> (spec 6.1); `functools[...]`, which prompts may ask it for, is understood too.
"""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from memphi.errors import RequestError
from memphi.request import Grammar
from memphi.sampling.grammar import JSON_SPACE
from memphi.sampling.stop import overlap
from memphi.server.errors import ApiError
from memphi.server.fields import Fields

OPEN, CLOSE, PLAIN_OPEN = "<|tool_call|>", "<|/tool_call|>", "functools["
WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How the model writes JSON; a small model that may choose its white space can write that for ever."""
_FIRST_SCHEMA_LINE = 5
"""Of the grammar of calls: the arguments of the first tool; those of the next are two lines further each."""
_FAULT = re.compile(
    r"the Lark grammar (?P<what>.*?(?:: at (?P<line>\d+)\(\d+\): (?:failed to compile JSON schema: )?(?P<reason>.*))?)"
)
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    if schema and schema.get("type") != "object":
        raise ValueError('must be the JSON schema of an object; give it "type": "object"')
    return schema


class FunctionFields(Fields):
    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    strict: bool | None = None
    """The arguments are held to their schema in any case; what of it cannot be held to token by token is refused where
    this is true, and else left to the model, which is shown all of it."""


class FunctionType(Fields):
    """What every tool is: the server has none of its own."""

    type: Literal["function"]


class Tool(FunctionType):
    function: FunctionFields


class NamedFunction(Fields):
    name: FunctionName


class NamedTool(FunctionType):
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<tool>"),
]


class Toolbox:
    """The tools that one request offers, and what the model may do with them."""

    def __init__(self, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool) -> None:
        """Raises ApiError for a choice that is not among the tools."""
        self.offered = [] if choice == "none" else [tool.function for tool in tools]
        self._callable = self.offered
        self._must_call = choice == "required"
        self._parallel = parallel
        if not tools and choice not in (None, "none", "auto"):
            raise ApiError.wrong("tool_choice", "needs tools")
        if isinstance(choice, NamedTool):
            self._callable = [tool for tool in self.offered if tool.name == choice.function.name]
            self._must_call = True
            if not self._callable:
                raise ApiError.wrong("tool_choice.function.name", "is none of the tools")

    @property
    def listed(self) -> str:
        """What the model is shown; empty where no tools are offered."""
        described = [_describe(function) for function in self.offered]
        return json.dumps(described, ensure_ascii=False) if described else ""

    def reader(self) -> "CallReader | None":
        """What takes an answer apart; None where it is text as it stands."""
        return CallReader(self._must_call) if self.offered else None

    def grammar(self, otherwise: Grammar | None) -> Grammar | None:
        """What holds the answer: calls, and, unless there must be one, text or what else it has to look like."""
        if not self._callable:
            return otherwise
        calls = "calls" if self._must_call else _text_or_calls(otherwise)
        more = '(", " call)*' if self._parallel else ""
        rules = [
            f"start: {calls}",
            f'calls: {OPEN} "[" call {more} "]" {CLOSE}',
            "call: " + " | ".join(f"call_{place}" for place in range(len(self._callable))),
        ]
        for place, function in enumerate(self._callable):
            rules += _call_rules(place, function)
        return Grammar("lark", "\n".join(rules))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Turn what the engine says of the grammar, which no client has sent, into errors about what it is made of."""
        try:
            yield
        except RequestError as error:
            fault = _FAULT.fullmatch(str(error))
            if fault is None or not self._callable:
                raise
            if fault["line"] is None:
                raise ApiError.wrong("tools", f"make a grammar that {fault['what']}") from None
            raise ApiError.wrong(self._part(int(fault["line"])), f"cannot be used: {fault['reason']}") from None

    def _part(self, line: int) -> str:
        """The field that a line of the grammar was made of."""
        if line < _FIRST_SCHEMA_LINE:
            return "response_format"
        function = self._callable[(line - _FIRST_SCHEMA_LINE) // 2]
        return f"tools[{self.offered.index(function)}].function.parameters"


def _describe(function: FunctionFields) -> dict[str, Any]:
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": _schema(function),
    }


def _schema(function: FunctionFields) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def _text_or_calls(otherwise: Grammar | None) -> str:
    """Any text and then, perhaps, calls; or JSON, where that is asked for, or calls."""
    if otherwise is None:
        return r"/(.|\n)*/ calls?"
    schema = {"type": "object"} if otherwise.kind == "json_object" else json.loads(otherwise.source)
    held = {**schema, "x-guidance": {"whitespace_pattern": JSON_SPACE}}
    return f"%json {json.dumps(held)} | calls"


def _call_rules(place: int, function: FunctionFields) -> Iterator[str]:
    head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
    yield f'call_{place}: {head} arguments_{place} "}}"'
    guidance = {**WRITING, "lenient": not function.strict}
    yield f"arguments_{place}: %json " + json.dumps({**_schema(function), "x-guidance": guidance})


# --- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallBegun:
    """A call whose name is known; its arguments follow."""

    place: int
    """Among the answer's calls."""
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsGrown:
    """More of a call's arguments, which are JSON as text."""

    place: int
    text: str


_BETWEEN = "[, \n\t\r"
"""What stands before and between calls."""
Found = str | CallBegun | ArgumentsGrown
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


class CallReader:
    """Takes an answer apart while it comes: text as it is, calls with their arguments as they grow."""

    def __init__(self, must_call: bool) -> None:
        """must_call: the answer had to be calls, so that the beginning of one is no text."""
        self.calls = 0
        self._must_call = must_call
        self._rest = ""
        self._close: str | None = None
        """What ends the list of calls that is being read; None: text is."""
        self._call: _CallText | None = None
        self._begun = False
        """Whether there was anything but white space."""

    def feed(self, text: str) -> list[Found]:
        """What more of the answer brings; what may be the beginning of a list of calls is held back."""
        self._rest += text
        return list(self._read())

    def flush(self) -> list[Found]:
        """What was held back, now that nothing more comes."""
        rest, self._rest = self._rest, ""
        if self._call is not None:
            rest = "" if self._call.begun or self._must_call else self._call.text
        return [rest] if rest else []

    def _read(self) -> Iterator[Found]:
        state: object = None
        while state != (state := (self._rest, self._close, self._call)):
            if self._call is not None:
                yield from self._read_call(self._call)
            elif self._close is not None:
                self._go_on(self._close)
            else:
                yield from self._read_text()

    def _read_text(self) -> Iterator[Found]:
        opening, close = OPEN, CLOSE
        start = self._rest.lstrip()
        if not self._begun and start and PLAIN_OPEN.startswith(start[: len(PLAIN_OPEN)]):
            opening, close = PLAIN_OPEN, "]"
        text, found, after = self._rest.partition(opening)
        if found:
            self._rest, self._close = after, close
        else:
            kept = len(text) - overlap(text, opening)
            text, self._rest = text[:kept], text[kept:]
        self._begun = self._begun or bool(text.strip() or found)
        if text:
            yield text

    def _go_on(self, close: str) -> None:
        """To the next call, or behind the end of the list."""
        self._rest = self._rest.lstrip(_BETWEEN)
        if self._rest.startswith("{"):
            self._call = _CallText(self.calls)
        elif self._rest.startswith(close):
            self._rest, self._close = self._rest[len(close) :], None
        elif self._rest.startswith("]"):
            self._rest = self._rest[1:]
        elif not close.startswith(self._rest):
            self._close = None  # This is no list of calls.

    def _read_call(self, call: "_CallText") -> Iterator[Found]:
        self._rest = call.grow(self._rest)
        yield from call.news()
        if call.whole:
            self.calls += call.begun
            self._call = None


class _CallText:
    """One call's JSON object as it grows."""

    def __init__(self, place: int) -> None:
        self.text = ""
        self.begun = False
        self.whole = False
        self._place = place
        self._depth = 0
        self._in_string = self._escaped = False
        self._told = 0
        """How much of the text was told of, up to the arguments' end."""
        self._inner_end: int | None = None
        """Where the first object inside ends: the arguments, where the name came before them."""

    def grow(self, text: str) -> str:
        """Take the text up to the object's end; returns the rest."""
        for place, character in enumerate(text, 1):
            depth = self._depth
            self._follow(character)
            if self._depth == 1 < depth and self._inner_end is None:
                self._inner_end = len(self.text) + place
            if self._depth == 0:
                self.whole = True
                self.text += text[:place]
                return text[place:]
        self.text += text
        return ""

    def news(self) -> Iterator[Found]:
        """What was not told of yet."""
        if not self.begun and (head := _HEAD.match(self.text)):
            self.begun, self._told = True, head.end()
            yield self._begin(head[1])
        if self.begun:
            end = self._inner_end or len(self.text)
            if end > self._told:
                yield ArgumentsGrown(self._place, self.text[self._told : end])
                self._told = end
        elif self.whole:
            yield from self._read_whole()

    def _read_whole(self) -> Iterator[Found]:
        """An object that is written in some other way."""
        try:
            call = json.loads(self.text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, RecursionError):
            name = arguments = None
        if isinstance(name, str) and isinstance(arguments, dict):
            self.begun = True
            yield self._begin(name)
            yield ArgumentsGrown(self._place, json.dumps(arguments, ensure_ascii=False))
        else:
            yield self.text

    def _begin(self, name: str) -> CallBegun:
        return CallBegun(self._place, f"call_{uuid.uuid4().hex}", name)

    def _follow(self, character: str) -> None:
        """Count brackets outside strings."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
