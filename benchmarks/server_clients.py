"""What clients hear in the server's soak: an answer, whole or streamed, is read to one form that can be compared.

Knows OpenAI's protocol from the client's side; called by `server_soak`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.server_questions import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    TOKENIZE,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    Fields,
    Question,
)

TOLERANCE = 1e-3
"""Of log-probabilities: sums of another order."""
CACHED = "cached_tokens"
"""What a usage tells that depends on what was asked before."""


@dataclass
class Told:
    """An answer, or what there is of it."""

    texts: dict[str, str] = field(default_factory=dict)
    """By choice, or attachment; calls of tools are part of it."""
    more: Fields = field(default_factory=dict)
    """Why choices ended, log-probabilities, usage."""
    failed: list[str] = field(default_factory=list)
    """Why attachments, each of which has an answer of its own, got none."""


class RefusedError(Exception):
    """The server gives no answer, or no more of it."""

    def __init__(self, status: int, error: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {error.get('message')}")
        self.status = status
        self.message = str(error["message"])


class LeftError(Exception):
    """The client has left."""


# --- asking ----------------------------------------------------------------------------------------------------------


class Hearing:
    """One question at one server, and what its client has heard."""

    def __init__(self, client: httpx2.AsyncClient, question: Question) -> None:
        self._client = client
        self._question = question
        self._events: list[Fields] = []
        self._whole: Fields | str | None = None

    @property
    def told(self) -> Told:
        if self._whole is not None:
            return _READERS[self._question.path](self._whole)
        return _STREAM_READERS[self._question.path](self._events) if self._events else Told()

    @property
    def begun(self) -> bool:
        return bool(self._events)

    async def whole(self) -> None:
        """Ask, and wait for all of it; raises RefusedError."""
        response = await self._client.post(self._question.path, **self._content(streams=False))
        if response.status_code != 200:
            raise RefusedError(response.status_code, response.json()["error"])
        is_json = response.headers["content-type"].startswith("application/json")
        self._whole = response.json() if is_json else response.text

    async def stream(self, most_events: int | None = None) -> None:
        """Ask, and read piece by piece; leaves after so many. Raises RefusedError and LeftError."""
        async with self._client.stream("POST", self._question.path, **self._content(streams=True)) as response:
            if response.status_code != 200:
                raise RefusedError(response.status_code, json.loads(await response.aread())["error"])
            ended = False
            async for line in response.aiter_lines():
                ended = self._read(line) or ended
                if len(self._events) == most_events and not ended:
                    raise LeftError
        assert ended, f"the stream breaks off: {self._events[-2:]}"

    def _content(self, streams: bool) -> Fields:
        question = self._question
        usage = {"stream_options": {"include_usage": True}} if question.path in (CHAT, COMPLETIONS) else {}
        if question.file is not None:
            more = {"stream": "true"} if streams else {}
            return {"data": {**question.body, **more}, "files": {"file": ("talk.wav", question.file)}}
        return {"json": {**question.body, **({"stream": True, **usage} if streams else {})}}

    def _read(self, line: str) -> bool:
        """Take a line of the stream; whether it is the last that says something."""
        if not line.startswith("data: "):
            return False
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return True
        event = json.loads(data)
        if "error" in event:
            raise RefusedError(200, event["error"])
        if event.get("type") == "response.failed":
            raise RefusedError(200, event["response"]["error"])
        self._events.append(event)
        return event.get("type") in ("response.completed", "response.incomplete")


# --- what was heard, in one form ---------------------------------------------------------------------------------


def check(question: Question, expected: Told, told: Told, whole: bool) -> None:
    """Raise AssertionError unless this is what the question is answered alone, or, where not whole, a beginning."""
    if whole and not told.failed:
        assert told.texts == expected.texts, f"{question} is answered {told.texts}, alone {expected.texts}"
        assert _alike(told.more, expected.more), f"{question} is answered with {told.more}, alone {expected.more}"
        return
    for place, text in told.texts.items():
        assert expected.texts[place].startswith(text), f"{question}: {text!r} does not begin {expected.texts[place]!r}"


def _alike(one: object, other: object) -> bool:
    """Whether two answers are the same, log-probabilities but for the order of sums, and whatever was cached."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(key == CACHED or _alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_alike(*pair) for pair in zip(one, other, strict=True))
    return one == other


def _chat(answer: Fields) -> Told:
    told = Told(more={"usage": answer["usage"]})
    for choice in answer["choices"]:
        message = choice["message"]
        calls = "".join(_call(call["function"]) for call in message.get("tool_calls", []))
        _add_choice(told, choice["index"], message["content"] or "", calls)
        told.more[f"end {choice['index']}"] = choice["finish_reason"]
        told.more[f"logprobs {choice['index']}"] = _likely((choice["logprobs"] or {}).get("content", []))
    _add_shares(told, answer["memphi"])
    return told


def _chat_stream(chunks: Sequence[Fields]) -> Told:
    """The chunks of a chat as if it had come whole."""
    told, news = Told(), Fields()
    contents, calls = dict[int, str](), dict[int, str]()
    for chunk in chunks:
        for choice in chunk["choices"]:
            place, delta = choice["index"], choice["delta"]
            contents[place] = contents.get(place, "") + delta.get("content", "")
            calls[place] = calls.get(place, "") + "".join(
                _call(call["function"]) for call in delta.get("tool_calls", [])
            )
            told.more[f"end {place}"] = choice["finish_reason"]
            likely = told.more.setdefault(f"logprobs {place}", [])
            likely += _likely((choice["logprobs"] or {}).get("content", []))
        if chunk.get("usage"):
            told.more["usage"] = chunk["usage"]
        news = chunk.get("memphi", {})
    for place, content in contents.items():
        _add_choice(told, place, content, calls[place])
    _add_shares(told, news)
    return told


def _add_choice(told: Told, place: int, content: str, calls: str) -> None:
    """White space alone before a call is told or not."""
    told.texts[f"choice {place}"] = content if content.strip() else ""
    told.texts[f"calls {place}"] = calls


def _add_shares(told: Told, news: Fields) -> None:
    """What was answered about each attachment alone; without all of them the whole is another."""
    for place, share in enumerate(news.get("each", [])):
        if "error" in share:
            told.failed.append(share["error"])
        else:
            told.texts[f"attachment {place}"] = share["content"]
    if told.failed:
        told.texts.pop("choice 0", None)


def _call(function: Fields) -> str:
    return f"{function.get('name', '')}{function['arguments']}"


def _likely(logprobs: Sequence[Fields]) -> list[Fields]:
    """Likeliest tokens by name: two of the same likelihood have no order."""
    return [
        {**each, "top_logprobs": {top["token"]: top["logprob"] for top in each["top_logprobs"]}} for each in logprobs
    ]


def _completion(answer: Fields) -> Told:
    return _completion_stream([answer])


def _completion_stream(chunks: Sequence[Fields]) -> Told:
    told = Told()
    for chunk in chunks:
        for choice in chunk["choices"]:
            place, logprobs = choice["index"], choice["logprobs"] or {}
            told.texts[f"choice {place}"] = told.texts.get(f"choice {place}", "") + choice["text"]
            told.more[f"end {place}"] = choice["finish_reason"]
            for name, values in logprobs.items():
                told.more.setdefault(f"{name} {place}", []).extend(values)
        if chunk.get("usage"):
            told.more["usage"] = chunk["usage"]
    return told


def _response(answer: Fields) -> Told:
    texts = [
        item["content"][0]["text"] if item["type"] == "message" else item["name"] + item["arguments"]
        for item in answer["output"]
    ]
    likely = [_likely(item["content"][0]["logprobs"]) for item in answer["output"] if item["type"] == "message"]
    more = {"status": answer["status"], "usage": answer["usage"], "logprobs": likely}
    return Told({"response": "".join(texts)}, more)


def _response_stream(events: Sequence[Fields]) -> Told:
    """The last event has all; what grew until then must be the same."""
    grown = "".join(_grown(event) for event in events)
    if not events or events[-1]["type"] not in ("response.completed", "response.incomplete"):
        return Told({"response": grown})
    told = _response(events[-1]["response"])
    assert told.texts["response"] == grown, f"the events tell {grown!r}, the last one {told.texts['response']!r}"
    return told


def _grown(event: Fields) -> str:
    kind = event["type"]
    if kind == "response.output_item.added" and event["item"]["type"] == "function_call":
        return str(event["item"]["name"])
    is_delta = kind in ("response.output_text.delta", "response.function_call_arguments.delta")
    return str(event["delta"]) if is_delta else ""


def _transcript(answer: Fields | str) -> Told:
    if isinstance(answer, str):
        return Told({"transcript": answer})
    more: Fields = {name: answer[name] for name in ("usage", "segments", "logprobs") if name in answer}
    return Told({"transcript": answer["text"]}, more)


def _transcript_stream(events: Sequence[Fields]) -> Told:
    grown = "".join(event["delta"] for event in events if event["type"] == "transcript.text.delta")
    if not events or events[-1]["type"] != "transcript.text.done":
        return Told({"transcript": grown})
    told = _transcript(events[-1])
    assert told.texts["transcript"] == grown, f"the events tell {grown!r}, the last one {told.texts['transcript']!r}"
    return told


_READERS: Mapping[str, Callable[[Any], Told]] = {
    CHAT: _chat,
    COMPLETIONS: _completion,
    RESPONSES: _response,
    TRANSCRIPTIONS: _transcript,
    TRANSLATIONS: _transcript,
    TOKENIZE: lambda answer: Told(more=answer),
}
_STREAM_READERS: Mapping[str, Callable[[Any], Told]] = {
    CHAT: _chat_stream,
    COMPLETIONS: _completion_stream,
    RESPONSES: _response_stream,
    TRANSCRIPTIONS: _transcript_stream,
}
