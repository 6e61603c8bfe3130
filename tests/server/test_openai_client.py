"""OpenAI's own client, as it comes, against the demo model behind a real server: every answer is the engine's own."""

import asyncio
import base64
import json
from functools import partial
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from memphi.inputs.media import open_media
from memphi.request import Message, Request, SamplingParams
from memphi.server.app import make_app
from memphi.server.settings import Limits, ServerSettings
from tests.server.conftest import data_uri, listening, sample

SHORT = {"max_tokens": 24}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def run(url, work):
    """Do something with the asynchronous client."""

    async def with_client():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=30) as client:
            return await work(client)

    return asyncio.run(with_client())


@pytest.fixture(scope="module")
def own(engine):
    """What the engine answers to a text and attachments."""

    def answer(text="Hello", *names, **sampling):
        media = [open_media(sample(name), "x") for name in names]
        params = SamplingParams(**{"max_tokens": 24, **sampling})
        return engine.generate(Request((Message("user", (*media, text)),), params))

    return answer


def image(name):
    return {"type": "image_url", "image_url": {"url": data_uri(sample(name)), "detail": "auto"}}


def audio(name):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sample(name)).decode(), "format": "wav"}}


def text(words):
    return {"type": "text", "text": words}


def test_chat(client, own):
    answer = client.chat.completions.create(model="demo", messages=HELLO, **SHORT)
    assert answer.choices[0].message.content == own().text
    assert answer.choices[0].finish_reason == own().finish_reason.value
    assert answer.usage.completion_tokens == len(own().ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["memphi"]["degraded"] == []


def test_chat_in_asyncio_many_at_once(url, own):
    async def work(client):
        questions = [f"Hello {number}" for number in range(8)]
        asked = [
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": question}], **SHORT)
            for question in questions
        ]
        return questions, [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    questions, answers = run(url, work)
    assert answers == [own(question).text for question in questions]


def test_a_stream(client, own):
    options = {"include_usage": True}
    stream = client.chat.completions.create(model="demo", messages=HELLO, stream=True, stream_options=options, **SHORT)
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own().text
    assert last.usage.completion_tokens == len(own().ids)


def test_a_stream_in_asyncio(url, own):
    async def work(client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True, **SHORT)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert run(url, work) == own().text


def test_the_clients_own_stream_helper(client, own):
    whole = own(max_tokens=200)
    assert whole.finish_reason.value == "stop"
    with client.chat.completions.stream(model="demo", messages=HELLO, max_tokens=200) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.text


def test_an_image(client, own):
    messages = [{"role": "user", "content": [image("number.png"), text("What number is it?")]}]
    answer = client.chat.completions.create(model="demo", messages=messages, **SHORT)
    expected = own("What number is it?", "number.png")
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.footprint.prompt_tokens


def test_sound(client, own):
    messages = [{"role": "user", "content": [audio("words.wav"), text("Transcribe the audio clip into text.")]}]
    answer = client.chat.completions.create(model="demo", messages=messages, **SHORT)
    expected = own("Transcribe the audio clip into text.", "words.wav")
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens_details.audio_tokens == expected.footprint.audio_tokens > 0


def test_images_and_sound_together_in_a_stream(client, own):
    content = [image("first.png"), image("second.png"), audio("question.wav"), text("Which?")]
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], stream=True, **SHORT
    )
    told = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert told == own("Which?", "first.png", "second.png", "question.wav").text


def test_choices_and_seeds(client):
    def draw():
        answer = client.chat.completions.create(
            model="demo", messages=HELLO, n=3, seed=7, temperature=2.0, max_tokens=24
        )
        return [choice.message.content for choice in answer.choices]

    first = draw()
    assert first == draw()
    assert len(set(first)) > 1


def test_stop(client, own):
    end = own().text[4:6]
    answer = client.chat.completions.create(model="demo", messages=HELLO, stop=[end], **SHORT)
    assert answer.choices[0].message.content == own().text.partition(end)[0]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client, own):
    answer = client.chat.completions.create(model="demo", messages=HELLO, logprobs=True, top_logprobs=2, **SHORT)
    told = answer.choices[0].logprobs.content
    assert "".join(one.token for one in told) == own().text
    assert all(one.logprob == max(top.logprob for top in one.top_logprobs) for one in told)
    assert all(len(one.top_logprobs) == 2 for one in told)


def test_logit_bias(client, engine, own):
    first = engine.tokenizer.encode_text(own().text[0])[0]
    answer = client.chat.completions.create(model="demo", messages=HELLO, logit_bias={str(first): -100}, max_tokens=1)
    assert answer.choices[0].message.content != own().text[0]


class Answer(BaseModel):
    colour: Literal["red", "blue"]
    sure: bool


def test_a_schema(client):
    answer = client.chat.completions.parse(model="demo", messages=HELLO, response_format=Answer, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_json_and_a_grammar_of_ones_own(client):
    form = {"type": "json_object"}
    answer = client.chat.completions.create(model="demo", messages=HELLO, response_format=form, **SHORT)
    assert answer.choices[0].message.content.startswith("{")
    extra = {"memphi": {"grammar": {"regex": "[0-9]{3}-[a-f]{2}"}}}
    answer = client.chat.completions.create(model="demo", messages=HELLO, extra_body=extra)
    digits, letters = answer.choices[0].message.content.split("-")
    assert (len(digits), digits.isdigit(), len(letters)) == (3, True, 2)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}, "colour": {"enum": ["red", "blue"]}},
                "required": ["on", "colour"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]


def check_call(call):
    assert call.function.name == "set_light"
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["on"], bool)
    assert arguments["colour"] in ("red", "blue")


NAMED = {"type": "function", "function": {"name": "set_light"}}


def test_tools(client):
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, max_tokens=120
    )
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    check_call(call)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"}]
    messages = [*HELLO, choice.message, *results]
    after = client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, tool_choice="none", **SHORT)
    assert after.choices[0].message.tool_calls is None


class Light(BaseModel):
    on: bool


def test_what_the_clients_own_helpers_add_to_messages_may_be_sent_back(client):
    parse = partial(client.chat.completions.parse, model="demo", messages=HELLO, max_tokens=120)
    told = parse(response_format=Light).choices[0].message
    assert isinstance(told.parsed, Light)
    tools = [openai.pydantic_function_tool(Light)]
    calling = parse(tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = calling.tool_calls
    assert isinstance(call.function.parsed_arguments, Light)
    grown = {**call.model_dump(), "index": 0}  # As pieces of a stream have it.
    result = {"role": "tool", "tool_call_id": call.id, "content": "done", "name": "Light"}
    for messages in ([told], [calling, result], [{"role": "assistant", "tool_calls": [grown]}, result]):
        after = client.chat.completions.create(model="demo", messages=[*HELLO, *messages, *HELLO], **SHORT)
        assert after.model_extra["memphi"]["ignored"]


def test_tools_in_a_stream(url):
    async def work(client):
        stream = await client.chat.completions.create(
            model="demo",
            messages=HELLO,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=120,
            stream=True,
        )
        return [chunk.choices[0] async for chunk in stream]

    choices = run(url, work)
    grown = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert grown[0].function.name in ("set_light", "wait")
    assert isinstance(json.loads("".join(call.function.arguments for call in grown)), dict)
    assert choices[-1].finish_reason == "tool_calls"


def test_tools_where_the_model_may_also_talk(client):
    answer = client.chat.completions.create(model="demo", messages=HELLO, tools=TOOLS, **SHORT)
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_completions(client, engine):
    answer = client.completions.create(model="demo", prompt=["Hello", "One"], max_tokens=8, logprobs=1)
    assert len(answer.choices) == 2
    raw = Request((Message("user", ("Hello",)),), SamplingParams(max_tokens=8), raw=True)
    assert answer.choices[0].text == engine.generate(raw).text
    stream = client.completions.create(model="demo", prompt="Hello", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_completions_in_asyncio(url, engine):
    async def work(client):
        return await client.completions.create(model="demo", prompt="Hello", max_tokens=8)

    raw = Request((Message("user", ("Hello",)),), SamplingParams(max_tokens=8), raw=True)
    assert run(url, work).choices[0].text == engine.generate(raw).text


def test_models(client, url):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").model_extra["memphi"]["input_modes"] == [
        "text",
        "image",
        "audio",
        "image+audio",
    ]

    async def work(client):
        return [model.id async for model in client.models.list()]

    assert run(url, work) == ["demo"]


def test_each(client, own):
    content = [image("first.png"), image("second.png"), text("What number is it?")]
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, extra_body={"memphi": {"each": True}}, **SHORT
    )
    alone = [own("What number is it?", name).text for name in ("first.png", "second.png")]
    assert answer.choices[0].message.content == f"image 1: {alone[0]}\nimage 2: {alone[1]}"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="demo", messages=HELLO, top_p=7)
    assert error.value.param == "top_p"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=HELLO)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x" * 50_000}])
    assert (error.value.status_code, error.value.code) == (413, "does_not_fit")


def test_errors_of_a_stream_are_the_clients_own(url):
    async def work(client):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": [image("number.png") | {"x": 1}]}], stream=True
            )

    run(url, work)


def test_keys_and_limits_are_the_clients_own(engine):
    settings = ServerSettings("demo", api_keys=("secret",), limits=Limits(queue=0))
    app = make_app(engine, settings)
    with listening(app) as url:
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert right.models.list().data
        with app.state.service.places(engine.plan.rows), pytest.raises(openai.RateLimitError):
            right.chat.completions.create(model="demo", messages=HELLO)
