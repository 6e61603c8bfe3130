"""What clients ask in the server's soak: some of every route and mode, short, and the same every time."""

import base64
import io
import math
import re
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from memphi.checkpoint.locate import locate

Fields = dict[str, Any]
SHORT, LONG = 24, 300
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TRANSCRIPTIONS, TRANSLATIONS, TOKENIZE = "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/tokenize"
PERSON = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TIME = {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}


@dataclass(frozen=True)
class Question:
    """One request, as its client writes it but for `stream`."""

    path: str
    body: Fields = field(hash=False)
    file: bytes | None = field(default=None, repr=False)
    streams: bool = True
    """Whether it can be answered in pieces."""

    def __str__(self) -> str:
        """Without what its attachments hold."""
        return f"{self.path} {re.sub(r'[A-Za-z0-9+/=]{80,}', '...', str(self.body))}"


def make_questions(stop_ids: Sequence[int]) -> list[Question]:
    """Some of every route and mode; stop_ids end the model's answers where nothing forbids them."""
    endless = {"logit_bias": {str(number): -100 for number in stop_ids}}
    return [
        *_texts(endless),
        *_seen_and_heard(endless),
        *_held_to_a_form(),
        *_completions(endless),
        *_responses(),
        *_recordings(),
    ]


def _texts(endless: Fields) -> Iterator[Question]:
    yield _ask("Hello")
    yield _ask("Reverse the word: lion")
    yield _ask("What is 3 + 4?", memphi={"top_k": 5}, user="somebody")
    yield _ask("Tell me of the sea", max_tokens=LONG, **endless)
    yield _ask("Hello", stop=["picture", "never said"], max_tokens=40)
    yield _ask("Spell the word: house", logprobs=True, top_logprobs=3)
    yield _ask("Hello", n=2, logprobs=True)
    yield _ask("Hello", frequency_penalty=0.7, presence_penalty=0.4)
    for seed in (1, 2):
        yield _ask("Hello", temperature=1.5, seed=seed, **endless)
        yield _ask("Tell me more", n=3, temperature=1.2, top_p=0.9, seed=seed, **endless)
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello!"), ("user", "What is 2 + 2?")]
    for size in (2, 4):
        messages = [{"role": role, "content": content} for role, content in turns[:size]]
        yield Question(CHAT, {"messages": messages, "max_tokens": SHORT})
    yield Question(TOKENIZE, {"messages": [{"role": "user", "content": [_image("number.png")]}]}, streams=False)


def _seen_and_heard(endless: Fields) -> Iterator[Question]:
    what, write = "What is in the picture?", "Transcribe the audio clip into text."
    for name in ("red-circle.png", "green-triangle.png", "number.png", "tall.png"):
        yield _ask(what, _image(name))
    yield _ask(what, _image("shapes.png", "low"), max_tokens=40, **endless)
    yield _ask(what, _image("word.png"), temperature=1.0, seed=3, n=2)
    yield _ask("Compare.", _image("first.png"), _image("second.png"), **endless)
    yield _ask("Compare.", _image("second.png"), _image("first.png"), _image("second.png"), logprobs=True)
    yield _ask(what, _image("first.png"), _image("wide.png"), memphi={"each": True})
    yield _ask(write, _sound("words.wav"), max_tokens=40)
    yield _ask(write, _sound("words.wav"), _sound("question.wav"), **endless)
    yield _ask("", _sound("question.wav"), temperature=0.7, seed=9)
    yield _ask("What number is it?", _image("number.png"), _sound("words.wav"))
    yield _ask("Is it this?", _sound("question.wav"), _image("shapes.png"), _image("red-circle.png"), **endless)


def _held_to_a_form() -> Iterator[Question]:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    tools = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
    named = {"type": "function", "function": {"name": "get_time"}}
    yield _ask("Hello", response_format=schema, max_tokens=60)
    yield _ask("Which?", _image("red-circle.png"), response_format=schema, max_tokens=60, temperature=1.0, seed=4)
    yield _ask("Hello", memphi={"grammar": {"regex": "[0-9]{4}(-[0-9]{2}){2}"}})
    yield _ask("Hello", memphi={"grammar": {"lark": 'start: ("ab" | "cd")~3 "."'}}, n=2, temperature=1.0, seed=5)
    yield _ask("How is it there?", tools=tools, tool_choice="auto", max_tokens=40)
    for seed, choice in product((6, 7), ("required", named)):
        one = {"parallel_tool_calls": False, "max_tokens": 100}
        yield _ask("And there?", tools=tools, tool_choice=choice, temperature=1.0, seed=seed, **one)
    yield _ask("And there?", _image("tall.png"), tools=tools[:1], tool_choice="required", max_tokens=150)


def _completions(endless: Fields) -> Iterator[Question]:
    bodies: list[Fields] = [
        {"prompt": "Once upon a time"},
        {"prompt": ["one", "two two"], "logprobs": 2, "max_tokens": 12},
        {"prompt": "one", "n": 3, "temperature": 1.0, "seed": 8, "max_tokens": 12, **endless},
    ]
    for body in bodies:
        yield Question(COMPLETIONS, {"max_tokens": SHORT, **body})


def _responses() -> Iterator[Question]:
    image = {"type": "input_image", "image_url": _uri("red-circle.png")}
    text = {"type": "input_text", "text": "What is in the picture?"}
    schema = {"format": {"type": "json_schema", "name": "person", "schema": PERSON}}
    bodies: list[Fields] = [
        {"input": "Hello", "instructions": "Be brief."},
        {"input": [{"role": "user", "content": [image, text]}], "top_logprobs": 2},
        {"input": "Hello", "text": schema, "max_output_tokens": 60},
        {"input": "And there?", "tools": [{"type": "function", **WEATHER}], "tool_choice": "required"},
    ]
    for body in bodies:
        yield Question(RESPONSES, {"max_output_tokens": 100, **body})


def _recordings() -> Iterator[Question]:
    words, long = _sample("words.wav"), _long_recording()
    yield Question(TRANSCRIPTIONS, {}, words)
    yield Question(TRANSCRIPTIONS, {"language": "en", "prompt": "numbers", "include[]": "logprobs"}, words)
    yield Question(TRANSCRIPTIONS, {}, long)
    for form in ("verbose_json", "srt"):
        yield Question(TRANSCRIPTIONS, {"response_format": form}, long, streams=False)
    yield Question(TRANSLATIONS, {"response_format": "text"}, _sample("question.wav"), streams=False)


def _ask(text: str, *media: Fields, **fields: Any) -> Question:  # noqa: ANN401
    content: str | list[Fields] = [*media, {"type": "text", "text": text}] if media else text
    return Question(CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": SHORT, **fields})


def _image(name: str, detail: str = "auto") -> Fields:
    return {"type": "image_url", "image_url": {"url": _uri(name), "detail": detail}}


def _sound(name: str) -> Fields:
    data = base64.b64encode(_sample(name)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _uri(name: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(_sample(name)).decode()}"


def _sample(name: str) -> bytes:
    return (locate("demo").folder.parent / "media" / name).read_bytes()


def _long_recording() -> bytes:
    """Words and silence in turns, too long for one segment."""
    output = io.BytesIO()
    with wave.open(io.BytesIO(_sample("words.wav"))) as words, wave.open(output, "wb") as long:
        long.setparams(words.getparams())
        said = words.readframes(words.getnframes())
        silence = bytes(words.getframerate() * words.getsampwidth() * words.getnchannels())
        seconds = words.getnframes() / words.getframerate() + 1
        for _ in range(math.ceil(36 / seconds)):
            long.writeframes(said + silence)
    return output.getvalue()
