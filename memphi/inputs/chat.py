"""Conversations: messages to the pieces of a prompt, as the official chat template lays them out (spec 6.1).

Knows roles and their tokens; nothing of ids or of what media cost. Called by `prompt`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memphi.errors import RequestError
from memphi.request import Media, Message

ASSISTANT = "<|assistant|>"
END = "<|end|>"
TOOL, TOOL_CLOSE = "<|tool|>", "<|/tool|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": ASSISTANT}


@dataclass(frozen=True)
class Special:
    """A special token, by its text; a str beside it is always plain text."""

    token: str


Piece = str | Special | Media


def render(messages: Sequence[Message]) -> list[Piece]:
    """Lay out a conversation up to the token after which the model answers.

    No two texts stand side by side: text between special tokens is encoded as one. Raises RequestError for a
    conversation that the model was not made for.
    """
    check_conversation(messages)
    pieces = [piece for message in messages for piece in _render_message(message)]
    return list(_join_texts([*pieces, Special(ASSISTANT)]))


def check_conversation(messages: Sequence[Message]) -> None:
    """Raise RequestError unless it is an optional system message, then user and assistant, a user's turn last."""
    if not messages:
        raise RequestError("the request has no messages; send at least one from the user")
    for position, message in enumerate(messages):
        _check_message(message, position)
    if messages[-1].role != "user":
        raise RequestError(f"the last message is from the {messages[-1].role}; it must be the user's")


def _check_message(message: Message, position: int) -> None:
    where = f"message {position + 1}"
    if message.role not in ROLE_TOKENS:
        raise RequestError(f"{where} has the role {message.role!r}; roles are {', '.join(ROLE_TOKENS)}")
    if message.role == "system" and position > 0:
        raise RequestError(f"{where} is a system message; only the first may be one")
    if message.role != "user" and any(isinstance(part, Media) for part in message.content):
        raise RequestError(f"{where} is from the {message.role} and has attachments; only the user's may")
    if message.tools is not None:
        _check_tools(message, where)
    elif message.role != "assistant" and all(isinstance(part, str) and not part.strip() for part in message.content):
        # An answer may be empty: a model can end its turn at once.
        raise RequestError(f"{where} is empty; give it text or an attachment")


def _check_tools(message: Message, where: str) -> None:
    if message.role != "system":
        raise RequestError(f"{where} is from the {message.role} and has tools; they belong to the system message")
    try:
        tools = json.loads(message.tools or "")
    except ValueError:
        tools = None
    if not isinstance(tools, list):
        raise RequestError(f"{where}: tools must be a JSON list")


def _render_message(message: Message) -> Iterator[Piece]:
    yield Special(ROLE_TOKENS[message.role])
    yield from message.content
    if message.tools is not None:
        yield from (Special(TOOL), message.tools, Special(TOOL_CLOSE))
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
