"""Conversations: messages to the pieces of a prompt, as the official chat template lays them out (spec 6.1).

Knows roles and their tokens; nothing of ids or of what media cost. Called by `prompt`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memphi.errors import RequestError
from memphi.request import Media, Message, Request

ASSISTANT = "<|assistant|>"
END = "<|end|>"
TOOL, TOOL_CLOSE = "<|tool|>", "<|/tool|>"
CALL, CALL_CLOSE = "<|tool_call|>", "<|/tool_call|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": ASSISTANT, "tool": TOOL}


@dataclass(frozen=True)
class Special:
    """A special token, by its text; a str beside it is always plain text."""

    token: str


Piece = str | Special | Media


def lay_out(request: Request) -> list[Piece]:
    """A request's prompt in pieces: its conversation, or its text as it is; raises what `render` raises."""
    if not request.raw:
        return render(request.messages)
    pieces = list(_join_texts([part for message in request.messages for part in message.content]))
    if not pieces:
        raise RequestError("the prompt is empty; give it text")
    return pieces


def render(messages: Sequence[Message]) -> list[Piece]:
    """Lay out a conversation up to the token after which the model answers.

    No two texts stand side by side: text between special tokens is encoded as one. Raises RequestError for a
    conversation that the model was not made for.
    """
    check_conversation(messages)
    pieces = [piece for message in messages for piece in _render_message(message)]
    return list(_join_texts([*pieces, Special(ASSISTANT)]))


def check_conversation(messages: Sequence[Message]) -> None:
    """Raise RequestError unless it is an optional system message, then turns of others, the assistant's never last.

    Results of tools follow an assistant's message that calls some.
    """
    if not messages:
        raise RequestError("the request has no messages; send at least one from the user")
    for position, message in enumerate(messages):
        _check_message(message, position)
        if message.role == "tool" and not _may_hear_tools(messages[:position]):
            raise RequestError(f"message {position + 1} is from a tool; it must follow an assistant's with tool calls")
    if messages[-1].role not in ("user", "tool"):
        raise RequestError(f"the last message is from the {messages[-1].role}; it must be the user's or a tool's")


def _may_hear_tools(before: Sequence[Message]) -> bool:
    """Whether a tool's result may come next."""
    return bool(before) and (before[-1].role == "tool" or before[-1].tool_calls is not None)


def _check_message(message: Message, position: int) -> None:
    where = f"message {position + 1}"
    if message.role not in ROLE_TOKENS:
        raise RequestError(f"{where} has the role {message.role!r}; roles are {', '.join(ROLE_TOKENS)}")
    for part in message.content:
        if not isinstance(part, str | Media):
            kind = type(part).__name__  # type: ignore[unreachable]  # callers may give anything
            raise RequestError(f"{where} holds a {kind}; it may hold text, and what open_media returns")
    if message.role == "system" and position > 0:
        raise RequestError(f"{where} is a system message; only the first may be one")
    if message.role != "user" and any(isinstance(part, Media) for part in message.content):
        raise RequestError(f"{where} is from the {message.role} and has attachments; only the user's may")
    if message.tools is not None:
        if message.role != "system":
            raise RequestError(f"{where} is from the {message.role} and has tools; they belong to the system message")
        _parse_list(message.tools, f"{where}: tools")
    elif message.role in ("system", "user") and all(isinstance(p, str) and not p.strip() for p in message.content):
        # An answer may be empty, a model can end its turn at once; so may what a tool has to say.
        raise RequestError(f"{where} is empty; give it text or an attachment")
    if message.tool_calls is not None:
        _check_calls(message, where)


def _check_calls(message: Message, where: str) -> None:
    if message.role != "assistant":
        raise RequestError(f"{where} is from the {message.role} and has tool calls; only the assistant's may")
    for call in _parse_list(message.tool_calls or "", f"{where}: tool_calls"):
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise RequestError(f"{where}: every tool call must be a JSON object with a name and arguments")


def _parse_list(text: str, what: str) -> list[Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        parsed = None
    if not isinstance(parsed, list):
        raise RequestError(f"{what} must be a JSON list, as text")
    return parsed


def _render_message(message: Message) -> Iterator[Piece]:
    yield Special(ROLE_TOKENS[message.role])
    yield from message.content
    if message.tools is not None:
        yield from (Special(TOOL), message.tools, Special(TOOL_CLOSE))
    if message.tool_calls is not None:
        yield from (Special(CALL), message.tool_calls, Special(CALL_CLOSE))
    yield Special(END)


def _join_texts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text
