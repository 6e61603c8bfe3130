"""/v1/responses: what its fields become, the order of its events, and the official client."""

import asyncio
import json
from itertools import groupby
from typing import Literal

import openai
import pytest
from openai.types import responses as types
from pydantic import BaseModel

from memphi.errors import DoesNotFitError, RequestError, WorkerError
from memphi.request import Delta, FinishReason, TokenLogprob
from tests.server.conftest import data_uri, refused, sample
from tests.server.fakes import said

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TWO_CALLS = (
    '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}, '
    '{"name": "weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'
)


def ask(client, input="Hello", **fields):
    return client.post("/v1/responses", json={"model": "demo", "input": input, **fields})


def answer(client, input="Hello", **fields):
    response = ask(client, input, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def wrong(client, input="Hello", **fields):
    """The error of a request that is refused."""
    response = ask(client, input, **fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def events(client, **fields):
    """The events of a streamed response, each under its name."""
    told = []
    for block in ask(client, stream=True, **fields).text.strip().split("\n\n"):
        name, data = block.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def kinds(told):
    return [event["type"].removeprefix("response.") for event in told]


@pytest.mark.parametrize("cached", [0, 5])
def test_usage_tells_what_was_cached(client, fake, cached):
    fake.worker.say = lambda request: [Delta("It is.", (1,), FinishReason.STOP, cached_tokens=cached)]
    details = answer(client)["usage"]["input_tokens_details"]
    assert details == {"cached_tokens": cached, "cache_write_tokens": 0}


def test_a_text(client, fake):
    response = answer(client, instructions="Be brief.", temperature=0.5, max_output_tokens=9, metadata={"a": "b"})
    (item,) = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "It is a fake.", "annotations": [], "logprobs": []}]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert response["status"] == "completed"
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + 3
    assert response["memphi"]["ignored"] == ["metadata"]
    assert {
        name: response[name] for name in ("instructions", "temperature", "max_output_tokens", "metadata", "store")
    } == {
        "instructions": "Be brief.",
        "temperature": 0.5,
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "store": False,
    }
    (request,) = fake.requests
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", ("Be brief.",)),
        ("user", ("Hello",)),
    ]
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.5, 9)


def test_a_conversation_with_calls_and_their_results(client, fake):
    answer(
        client,
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"role": "user", "content": "Hi"},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [
                    {"type": "output_text", "text": "One", "annotations": [], "logprobs": []},
                    {"type": "refusal", "refusal": "Two"},
                ],
            },
            {
                "type": "function_call",
                "call_id": "c1",
                "id": "fc_1",
                "name": "weather",
                "arguments": '{"city": "Oslo"}',
            },
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "function_call", "call_id": "c3", "name": "weather", "arguments": "{}"},
            {"role": "assistant", "content": "so"},
            {"type": "function_call_output", "call_id": "c3", "output": ""},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": "now?"}],
            },
        ],
        tools=[WEATHER],
    )
    system, user, first, rain, sun, second, nothing, last = fake.requests[0].messages
    assert (system.role, user.content, last.content) == ("system", ("Hi",), ("And\nnow?",))
    assert json.loads(system.tools)[0]["name"] == "weather"
    assert first.content == ("One\nTwo",)
    assert json.loads(first.tool_calls) == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "weather", "arguments": {}},
    ]
    assert (second.content, json.loads(second.tool_calls)) == (("so",), [{"name": "weather", "arguments": {}}])
    assert [(message.role, message.content) for message in (rain, sun, nothing)] == [
        ("tool", ("rain",)),
        ("tool", ("sun",)),
        ("tool", ("",)),
    ]


def test_an_image_and_sound(client, fake):
    image = {"type": "input_image", "image_url": data_uri(sample("shapes.png")), "detail": "low"}
    sound = {
        "type": "input_audio",
        "input_audio": {"data": data_uri(sample("question.wav"), "audio/wav"), "format": "wav"},
    }
    response = answer(client, [{"role": "user", "content": [image, sound, {"type": "input_text", "text": "What?"}]}])
    picture, clip, text = fake.requests[0].messages[0].content
    assert (picture.kind, picture.detail, clip.kind, text) == ("image", "low", "audio", "What?")
    assert response["memphi"]["price"]["image_tokens"] > 0 < response["memphi"]["price"]["audio_tokens"]


@pytest.mark.parametrize(
    ("asked", "kind", "source"),
    [
        ({"type": "text"}, None, None),
        ({"type": "json_object"}, "json_object", ""),
        ({"type": "json_schema", "name": "x", "schema": {"type": "integer"}}, "json_schema", '{"type": "integer"}'),
    ],
)
def test_formats(client, fake, asked, kind, source):
    response = answer(client, text={"format": asked, "verbosity": "low"})
    grammar = fake.requests[0].sampling.grammar
    assert (grammar and grammar.kind, grammar and grammar.source) == (kind, source)
    assert response["text"]["format"] == asked
    assert "text.verbosity" in response["memphi"]["ignored"]


def test_tools_and_what_may_be_done_with_them(client, fake):
    answer(client, tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False)
    assert "call_0" in fake.requests[0].sampling.grammar.source
    assert '(", " call)*' not in fake.requests[0].sampling.grammar.source
    response = answer(client, tools=[WEATHER], tool_choice="none")
    assert fake.requests[1].sampling.grammar is None
    assert (response["tools"], response["tool_choice"]) == ([WEATHER], "none")


IGNORED = {
    "store": True,
    "user": "me",
    "metadata": {"a": "b"},
    "reasoning": {"effort": "high"},
    "service_tier": "auto",
    "truncation": "disabled",
    "background": False,
    "max_tool_calls": 3,
    "prompt_cache_key": "x",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "x",
    "stream_options": {"include_obfuscation": False},
}


def test_fields_that_change_nothing_are_listed(client):
    last = events(client, **IGNORED)[-1]["response"]
    assert last["memphi"]["ignored"] == sorted({*IGNORED, "stream_options.include_obfuscation"} - {"stream_options"})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_null_is_as_good_as_nothing(client, name):
    assert answer(client, **{name: None})["memphi"]["ignored"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"context_management": []}, "context_management"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{**WEATHER, "type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search", "filters": {}}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [WEATHER, {**WEATHER, "parameters": {"type": "string"}}]}, "tools[1].parameters"),
        ({"tools": [{**WEATHER, "parameters": {"type": "object", "required": 1}}]}, "tools[0].parameters"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"seed": 5}, "seed"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "shema": {}}}}, "text.format.shema"),
        ({"memphi": {"grammar": {}}}, "memphi.grammar"),
        ({"memphi": {"each": True}}, "memphi.each"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_are_refused_by_name(client, fake, fields, param, stream):
    assert wrong(client, **fields, stream=stream)["param"] == param
    assert not fake.requests


def test_advice_names_the_field_as_it_is_called_here(client):
    assert "(max_output_tokens " in refused(ask(client, max_output_tokens=10**6), 413, "max_output_tokens")


def test_stream_options_need_a_stream(client):
    assert wrong(client, stream_options={"include_obfuscation": False})["param"] == "stream_options"


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "input"),
        (5, "input"),
        ([{"role": "tool", "content": "x"}], "input[0]"),
        ([{"type": "reasoning", "summary": []}], "input[0]"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]"),
        ([{"role": "user", "content": "x", "name": "me"}], "input[0].name"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "output_text", "text": "x"}]}], "input[0].content[0]"),
        ([{"role": "system", "content": [IMAGE]}], "input[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], "input[0].content[0].image_url"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": [IMAGE]}], "input[1].content[0].image_url"),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "%"}}]}],
            "input[0].content[0].input_audio.data",
        ),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "input[0].call_id"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": " "}], "input[1]"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], None),
        ([{"type": "function_call", "call_id": "c", "name": "x", "arguments": "[]"}], "input[0].arguments"),
        (
            [{"role": "assistant", "content": "x"}]
            + [{"type": "function_call", "call_id": "c", "name": "x", "arguments": text} for text in ("{}", "{")],
            "input[2].arguments",
        ),
    ],
)
@pytest.mark.parametrize("instructions", [None, "Be brief."])
def test_items_that_are_refused_where_they_stand(client, fake, items, param, instructions):
    error = wrong(client, items, instructions=instructions)
    assert error["param"] == param
    assert "messages" not in error["message"]
    assert not fake.requests


def test_one_answer_for_each_attachment(client):
    images = [{"type": "input_image", "image_url": data_uri(sample("shapes.png"))} for _ in range(2)]
    response = answer(client, [{"role": "user", "content": images}], memphi={"each": True})
    assert response["output"][0]["content"][0]["text"] == "image 1: It is a fake.\nimage 2: It is a fake."
    assert [share["param"] for share in response["memphi"]["each"]] == [
        "input[0].content[0].image_url",
        "input[0].content[1].image_url",
    ]


def test_a_text_in_events(client):
    """In as many pieces as come: those that wait for their reader are one."""
    told = events(client)
    assert [kind for kind, _ in groupby(kinds(told))] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert told[0]["response"]["output"] == []
    assert told[0]["response"]["usage"] is None
    assert "".join(event.get("delta", "") for event in told) == told[-4]["text"] == "It is a fake."


def same(response):
    """A response without what differs each time."""
    text = json.dumps({name: value for name, value in response.items() if name not in ("created_at", "completed_at")})
    cleaned = json.loads(text)
    cleaned["memphi"].pop("timings")
    cleaned.pop("id")
    for item in cleaned["output"]:
        assert item.pop("id")
        item.pop("call_id", None)
    return cleaned


@pytest.mark.parametrize(
    "text",
    ["It is.", "", " \n", " A", "A ", TWO_CALLS, "Well. " + TWO_CALLS, "\n" + TWO_CALLS + "\n", TWO_CALLS + " After."],
)
@pytest.mark.parametrize("pieces", [1, 4, 1000])
@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_a_stream_tells_what_the_whole_holds(client, fake, text, pieces, reason):
    fake.worker.say = lambda request: said(text, reason, pieces)
    told = events(client, tools=[WEATHER])
    assert same(told[-1]["response"]) == same(answer(client, tools=[WEATHER]))
    grown = {}
    for event in told:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(grown)
            grown[event["item"]["id"]] = ""
        elif "item_id" in event:
            assert event["item_id"] == list(grown)[-1]
            grown[event["item_id"]] += event.get("delta", "")
    whole = {
        item["id"]: item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        for item in told[-1]["response"]["output"]
    }
    assert grown == whole
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == told[-1]["response"]["output"]
    assert kinds(told)[-1] == ("completed" if reason is FinishReason.STOP else "incomplete")


def test_calls_and_text_are_items_in_their_order(client, fake):
    fake.worker.say = lambda request: said("\nWell. " + TWO_CALLS + "\n")
    message, oslo, rome = answer(client, tools=[WEATHER])["output"]
    assert message["content"][0]["text"] == "\nWell. "
    assert [json.loads(call["arguments"])["city"] for call in (oslo, rome)] == ["Oslo", "Rome"]
    assert {call["type"] for call in (oslo, rome)} == {"function_call"}
    assert oslo["call_id"] != rome["call_id"]
    fake.worker.say = lambda request: said("\n" + TWO_CALLS + " After.")
    _, _, message = answer(client, tools=[WEATHER])["output"]
    assert message["content"][0]["text"] == " After."


def test_an_answer_that_is_cut_off(client, fake):
    fake.worker.say = lambda request: said("It is", FinishReason.LENGTH)
    response = answer(client)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (WorkerError("the engine has stopped"), 503, "server_error"),
        (RequestError("the prompt is odd"), 400, "invalid_prompt"),
        (DoesNotFitError("needs more"), 413, "invalid_prompt"),
    ],
)
def test_an_answer_that_fails(client, fake, error, status, code):
    fake.worker.say = lambda request: [error]
    for stream in (False, True):
        response = ask(client, stream=stream)
        assert (response.status_code, response.json()["error"]["message"]) == (status, str(error))
    fake.worker.say = lambda request: [Delta("Half", (1,)), error]
    assert ask(client).status_code == status
    told = events(client)
    assert kinds(told)[-2:] == ["output_text.delta", "failed"]
    last = told[-1]["response"]
    assert (last["status"], last["error"]) == ("failed", {"code": code, "message": str(error)})


def test_logprobs(client, fake):
    ids = fake.tokenizer.encode_text("Hi you")
    found = [TokenLogprob(token, -0.5, ((token, -0.5),)) for token in ids]
    text = [fake.tokenizer.token_bytes(token).decode() for token in ids]
    fake.worker.say = lambda request: [
        Delta(piece, (item.id,), FinishReason.STOP if item is found[-1] else None, logprobs=(item,))
        for piece, item in zip(text, found, strict=True)
    ]
    for fields in ({"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}):
        told = events(client, **fields)
        assert fake.requests[-1].sampling.top_logprobs == fields.get("top_logprobs", 0)
        streamed = [entry for event in told if "delta" in event for entry in event["logprobs"]]
        (item,) = told[-1]["response"]["output"]
        assert streamed == item["content"][0]["logprobs"]
        assert [entry["token"] for entry in streamed] == text
    assert answer(client)["output"][0]["content"][0]["logprobs"] == []
    assert fake.requests[-1].sampling.top_logprobs is None


class Shape(BaseModel):
    color: Literal["red", "green"]
    sides: Literal[3, 4]


@pytest.fixture(scope="module")
def official(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


SHAPES = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": "", "detail": "auto"},
            {"type": "input_text", "text": "What is in the picture?"},
        ],
    }
]


@pytest.fixture(scope="module")
def shapes():
    image = {**SHAPES[0]["content"][0], "image_url": data_uri(sample("shapes.png"))}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": "How many stars are there?"}]}]


def test_the_official_client(official, shapes):
    response = official.responses.create(model="demo", input=shapes, max_output_tokens=12)
    assert isinstance(response, types.Response)
    assert response.output_text == "5"
    with official.responses.stream(model="demo", input=shapes, max_output_tokens=12) as stream:
        told = list(stream)
    assert told[-1].response.output_text == response.output_text
    assert "".join(event.delta for event in told if event.type == "response.output_text.delta") == response.output_text
    raw = list(official.responses.create(model="demo", input=shapes, max_output_tokens=12, stream=True))
    assert [event.type for event in raw] == [event.type for event in told]
    assert response.usage.input_tokens == raw[-1].response.usage.input_tokens


def test_the_official_client_asynchronously(url, official, shapes):
    whole = official.responses.create(model="demo", input=shapes, max_output_tokens=12).output_text

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            response = await client.responses.create(model="demo", input=shapes, max_output_tokens=12)
            async with client.responses.stream(model="demo", input=shapes, max_output_tokens=12) as stream:
                text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            return response.output_text, text

    assert asyncio.run(run()) == (whole, whole)


def test_the_official_client_reads_a_schema(official):
    asked = {"model": "demo", "input": "A red square, please.", "max_output_tokens": 200, "text_format": Shape}
    response = official.responses.parse(**asked)
    assert isinstance(response.output_parsed, Shape)
    with official.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_the_official_client_calls_and_answers(official):
    asked = {"model": "demo", "tools": [WEATHER], "tool_choice": "required", "max_output_tokens": 200}
    conversation = [{"role": "user", "content": "How is the weather in Oslo?"}]
    with official.responses.stream(input=conversation, **asked) as stream:
        told = list(stream)
    output = told[-1].response.output
    call = next(item for item in output if item.type == "function_call")
    assert call.name == "weather"
    assert list(json.loads(call.arguments)) == ["city"]
    whole = [item for item in output if item.status == "completed"]  # The last call may be cut off by its length.
    conversation += whole
    conversation += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"}
        for item in whole
        if item.type == "function_call"
    ]
    again = official.responses.create(input=conversation, **{**asked, "tool_choice": "none", "max_output_tokens": 8})
    assert again.output_text is not None
    assert again.status in ("completed", "incomplete")


def test_the_official_client_is_told_what_is_wrong(official):
    with pytest.raises(openai.BadRequestError) as caught:
        official.responses.create(model="demo", input="Hello", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        official.responses.create(model="other", input="Hello")
    with pytest.raises(openai.BadRequestError) as caught:
        official.responses.create(model="demo", input=[{"role": "user", "content": [IMAGE]}])
    assert caught.value.param == "input[0].content[0].image_url"
