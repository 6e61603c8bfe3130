"""Chat completions over an engine without a model: every field is used, refused by name or listed as ignored."""

import asyncio
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from memphi.engine.pressure import not_now
from memphi.errors import BusyError, DoesNotFitError, MediaError, WorkerError
from memphi.request import Delta, FinishReason, Grammar, Message, TokenLogprob
from memphi.server.app import make_app
from memphi.server.settings import Limits, ServerSettings
from tests.server.conftest import ask, asked, chunks_of, data_uri, listening, refused, sample, wait_for
from tests.server.fakes import FakeEngine, said


def serving(engine, **fields):
    return TestClient(make_app(engine, ServerSettings("demo", **fields)), base_url="http://localhost")


def test_an_answer(client, fake):
    answer = ask(client).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "demo"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "It is a fake.", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert answer["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 3,
        "total_tokens": 11,
        "prompt_tokens_details": {"audio_tokens": 0, "image_tokens": 0, "text_tokens": 8, "cached_tokens": 0},
    }
    news = answer["memphi"]
    assert (news["ignored"], news["degraded"]) == ([], [])
    assert news["price"] == {"prompt_tokens": 8, "image_tokens": 0, "audio_tokens": 0, "crops": 0, "pages": 1}
    assert 0 < news["timings"]["first_token_seconds"] <= news["timings"]["seconds"]
    assert fake.requests[0].messages == (Message("user", ("Hello",)),)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, {"max_tokens": None, "temperature": 0.0, "top_p": 1.0, "stop": (), "top_logprobs": None}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 7, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": None, "stop": None, "seed": None, "n": None}, {"temperature": 0.0, "stop": ()}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"presence_penalty": 1, "frequency_penalty": -0.5}, {"presence_penalty": 1, "frequency_penalty": -0.5}),
        ({"logit_bias": {"42": -100, "7": 1.5}}, {"logit_bias": ((42, -100), (7, 1.5))}),
        ({"logprobs": True}, {"top_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"top_logprobs": 3}),
        ({"response_format": {"type": "text"}}, {"grammar": None}),
        ({"response_format": {"type": "json_object"}}, {"grammar": Grammar("json_object")}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}},
            {"grammar": Grammar("json_schema", '{"type": "integer"}')},
        ),
        ({"memphi": {"grammar": {"regex": "[0-9]"}}}, {"grammar": Grammar("regex", "[0-9]")}),
        ({"memphi": {"grammar": {"lark": 'start: "a"'}}}, {"grammar": Grammar("lark", 'start: "a"')}),
        (
            {"memphi": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}},
            {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
    ],
)
def test_fields_become_sampling_parameters(client, fake, fields, sampling):
    assert ask(client, **fields).status_code == 200
    got = fake.requests[0].sampling
    assert {name: getattr(got, name) for name in sampling} == sampling


def test_on_pressure_comes_from_the_request_or_the_server(fake):
    with serving(fake, on_pressure="refuse") as client:
        ask(client)
        ask(client, memphi={"on_pressure": "shrink-images"})
    assert [request.on_pressure for request in fake.requests] == ["refuse", "shrink-images"]


def test_the_servers_own_end_stays_within_the_room(fake):
    with serving(fake, max_tokens=10**6) as client:
        assert ask(client).status_code == 200
    with serving(fake, max_tokens=20) as client:
        ask(client)
        ask(client, max_tokens=30)
    room = fake.bounds.tokens + 1 - 8
    assert [request.sampling.max_tokens for request in fake.requests] == [room, 20, 30]


def test_a_question_without_a_seed_is_drawn_anew(client, fake):
    ask(client, temperature=1)
    ask(client, temperature=1)
    first, second = fake.requests
    assert first.sampling.seed != second.sampling.seed


@pytest.mark.parametrize("n", [1, 3])
def test_what_was_cached_is_counted_once_for_each_prompt(client, fake, n):
    fake.worker.say = lambda request: [*said("It is.")[:-1], Delta("", (), FinishReason.STOP, cached_tokens=5)]
    usage = ask(client, n=n).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 5 < usage["prompt_tokens"]


def test_choices_have_seeds_of_their_own(client, fake):
    fake.worker.say = lambda request: said(f"seed {request.sampling.seed}")
    answer = ask(client, n=3, seed=2**63 - 1).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [f"seed {2**63 - 1 + more}" for more in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 8
    assert answer["usage"]["completion_tokens"] == 9


IGNORED = {
    "user": "u",
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "safety_identifier": "s",
    "service_tier": "auto",
    "store": False,
    "verbosity": "low",
}


def test_what_changes_nothing_is_listed(client):
    answer = ask(client, **IGNORED)
    assert answer.json()["memphi"]["ignored"] == sorted(IGNORED)


def test_what_is_listed_has_its_path(client):
    messages = [{"role": "user", "name": "me", "content": "Hello"}]
    answer = ask(client, messages=messages, stream=True, stream_options={"include_obfuscation": False})
    assert chunks_of(answer)[-1]["memphi"]["ignored"] == ["messages[0].name", "stream_options.include_obfuscation"]


def test_nulls_are_as_if_they_were_not_there(client):
    answer = ask(client, **dict.fromkeys([*IGNORED, "audio", "functions", "tools", "response_format", "stream"]))
    assert answer.json()["memphi"]["ignored"] == []


TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"audio": {"voice": "v"}}, "audio", "is not supported"),
        ({"functions": []}, "functions", "is not supported"),
        ({"function_call": "auto"}, "function_call", "is not supported"),
        ({"moderation": {}}, "moderation", "is not supported"),
        ({"web_search_options": {}}, "web_search_options", "is not supported"),
        ({"foo": 1}, "foo", "no field that memphi knows"),
        ({"memphi": {"foo": 1}}, "memphi.foo", "no field that memphi knows"),
        ({"store": True}, "store", "should be False"),
        ({"service_tier": "flex"}, "service_tier", "'auto' or 'default'"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "should be 'text'"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": [1]}, "stop[0]", "valid string"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "ids are 0 to"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "role must be"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]", "messages[0] is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]", "type must be"),
        ({"messages": [{"role": "user", "content": [TEXT | {"a": 1}]}]}, "messages[0].content[0].a", "no field"),
        (
            {"messages": [{"role": "system", "content": [TEXT | {"type": "x"}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "must be the user's"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "messages[1]", "first"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio", "is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "type must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"memphi": {"detail": 0}}, "memphi.detail", "greater than"),
        ({"memphi": {"on_pressure": "panic"}}, "memphi.on_pressure", "'wait'"),
        ({"memphi": {"top_k": 0}}, "memphi.top_k", "at least 1"),
        ({"memphi": {"min_p": 2}}, "memphi.min_p", "between 0 and 1"),
        ({"memphi": {"grammar": {}}}, "memphi.grammar", "one of regex and lark"),
        ({"memphi": {"grammar": {"regex": "("}}}, "memphi.grammar", "regular expression"),
        ({"memphi": {"grammar": {"lark": "start"}}}, "memphi.grammar", "Lark grammar"),
        (
            {"memphi": {"grammar": {"regex": "a"}}, "response_format": {"type": "json_object"}},
            "memphi.grammar",
            "neither tools nor response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no"}}}},
            "response_format",
            "JSON schema",
        ),
        ({"memphi": {"each": True}}, "memphi.each", "needs attachments"),
        ({"memphi": {"each": True}, "n": 2}, "memphi.each", "neither n"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(client, fake, fields, param, words):
    assert words in refused(ask(client, **fields), 400, param)
    assert not fake.requests


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b"{", "not JSON"),
        (b'"\xff"', "body"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "body"),
    ],
    ids=["nothing", "a list", "half", "other bytes", "deep"],
)
def test_bodies_that_are_no_request(client, body, words):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert words in answer.json()["error"]["message"]
    assert answer.status_code == 400


def test_a_body_that_does_not_say_that_it_is_json_is_refused(client, fake):
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    assert "content-type" in refused(client.post("/v1/chat/completions", content=body), 400)
    assert not fake.requests


def test_unknown_models_routes_and_methods(client):
    assert "ask for 'demo'" in refused(ask(client, model="gpt-4o"), 404, "model")
    assert "no POST /v1/none" in refused(client.post("/v1/none", json={}), 404)
    assert "no PUT /v1/models" in refused(client.put("/v1/models", json={}), 405)


@pytest.mark.parametrize("fields", [{"content": "\ud800"}, {"content": "x", "role": "\ud800"}, {"\ud800": 1}])
def test_half_a_surrogate_pair_is_told_of(client, fields):
    body = json.dumps({"messages": [{"role": "user", **fields}]})  # Its escapes are ASCII.
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


FINITE = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | FINITE | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "messages",
        "tools",
        "tool_choice",
        "response_format",
        "memphi",
        "stop",
        "logit_bias",
        "stream_options",
        "n",
        "seed",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=FIELDS, value=VALUES)
def test_any_value_of_any_field_is_used_or_refused(client, field, value):
    assert ask(client, **{field: value}).status_code in (200, 400)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
            optional={
                "content": st.none() | st.text(max_size=3) | st.lists(st.just(TEXT) | VALUES, max_size=2),
                "tool_call_id": st.sampled_from(["a", "b"]),
                "tool_calls": st.lists(
                    st.fixed_dictionaries(
                        {
                            "id": st.sampled_from(["a", "b"]),
                            "type": st.just("function"),
                            "function": st.fixed_dictionaries(
                                {"name": st.just("f"), "arguments": st.sampled_from(["", "{}", "[", '{"a": 1}'])}
                            ),
                        }
                    ),
                    max_size=2,
                ),
            },
        ),
        max_size=4,
    )
)
def test_any_conversation_is_answered_or_refused(client, messages):
    assert ask(client, messages=messages).status_code in (200, 400)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream(client):
    chunks = chunks_of(ask(client, stream=True))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "It is a fake."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert ["memphi" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any("usage" in chunk for chunk in chunks)


def test_a_stream_with_usage_ends_with_it(client):
    *chunks, last = chunks_of(ask(client, stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None and "memphi" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["memphi"]["price"]["prompt_tokens"] == 8


def test_a_stream_of_choices(client, fake):
    fake.worker.say = lambda request: said(f"seed {request.sampling.seed}")
    texts = {0: "", 1: ""}
    for chunk in chunks_of(ask(client, stream=True, n=2, seed=1)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == {0: "seed 1", 1: "seed 2"}


def test_a_cut_answer_says_so(client, fake):
    fake.worker.say = lambda request: said("cut", FinishReason.LENGTH)
    assert ask(client).json()["choices"][0]["finish_reason"] == "length"
    assert chunks_of(ask(client, stream=True))[-1]["choices"][0]["finish_reason"] == "length"


def test_logprobs_leave_out_the_end_of_the_turn(client, fake):
    a, b, end = (*fake.tokenizer.encode_text("ab"), fake.tokenizer.end_id)
    deltas = [
        Delta("", (a,), logprobs=(TokenLogprob(a, -0.5, ((a, -0.5), (b, -1.0))),)),
        Delta("ab", (b, end), FinishReason.STOP, logprobs=(TokenLogprob(b, -0.1), TokenLogprob(end, -0.2))),
    ]
    fake.worker.say = lambda request: deltas
    told = ask(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [(one["token"], one["logprob"], one["bytes"]) for one in told] == [("a", -0.5, [97]), ("b", -0.1, [98])]
    assert [top["token"] for top in told[0]["top_logprobs"]] == ["a", "b"]
    streamed = [
        one
        for chunk in chunks_of(ask(client, logprobs=True, stream=True))
        for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [one["token"] for one in streamed] == ["a", "b"]


def test_what_was_degraded_is_told_once(client, fake):
    fake.worker.say = lambda request: [Delta("x", (1,), FinishReason.STOP, ("picture a is smaller",))]
    assert ask(client, n=2).json()["memphi"]["degraded"] == ["picture a is smaller"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DoesNotFitError("too large"), 413),
        (BusyError("later"), 429),
        (MediaError("image 1: is damaged"), 400),
        (WorkerError("it died"), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine_have_a_status(client, fake, error, status, stream):
    fake.worker.say = lambda request: [error]
    part = {"type": "image_url", "image_url": {"url": data_uri(sample("number.png"))}}
    answer = ask(client, [part], stream=stream)
    assert refused(answer, status, "messages[0].content[0].image_url.url" if status == 400 else None) == str(error)
    assert ("Retry-After" in answer.headers) == (status in (429, 503))


def test_an_error_in_the_middle_of_a_stream_ends_it(client, fake):
    fake.worker.say = lambda request: [Delta("It", (1,)), WorkerError("it died")]
    lines = ask(client, stream=True).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["message"] == "it died"
    assert "[DONE]" not in lines


def test_one_choice_that_fails_ends_the_others(client, fake):
    fake.worker.say = lambda request: [Delta("x", (1,))] if request.sampling.seed == 1 else [WorkerError("it died")]
    assert refused(ask(client, n=2, seed=1), 503) == "it died"
    wait_for(lambda: fake.worker.cancelled)


def test_a_prompt_that_never_fits_is_refused_with_numbers(client, fake):
    sentence = refused(ask(client, "word " * 40_000), 413)
    assert str(fake.bounds.context_tokens) in sentence or str(fake.bounds.tokens) in sentence


def test_advice_names_fields_and_no_options_of_the_command_line(client, fake):
    assert "(max_tokens " in refused(ask(client, max_tokens=10**6), 413, "max_tokens")
    assert "start the server with more --memory" in refused(ask(client, "word " * 10_000), 413)
    fake.worker.say = lambda request: [not_now(9, 1, 2, 2, 0)]
    assert "(memphi.on_pressure wait)" in refused(ask(client), 429)


def test_the_server_may_take_less_than_the_engine(fake):
    with serving(fake, limits=Limits(prompt_tokens=10)) as client:
        assert ask(client, "x").status_code == 200
        assert "this server takes 10" in refused(ask(client, "x" * 20), 413)


def test_the_queue_is_bounded(fake):
    fake.worker.say = lambda request: [Delta("It", (1,))]  # For ever.
    with serving(fake, limits=Limits(queue=0)) as client:
        rows = fake.plan.rows
        answer = ask(client, n=rows + 1)
        assert f"at most {rows} may be asked for: n" in refused(answer, 413)
        assert "Retry-After" not in answer.headers
        service = client.app.state.service
        with service.places(rows):
            answer = ask(client)
            assert "the queue is full" in refused(answer, 429)
            assert int(answer.headers["Retry-After"]) > 0
        assert service.open_answers == 0


def test_a_server_that_drains_takes_nothing_new(client):
    client.app.state.service.draining = True
    answer = ask(client)
    assert "shutting down" in refused(answer, 503)
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_leaves(fake, stream, n):
    fake.worker.say = lambda request: [Delta("It", (1,))]  # And no end.
    app = make_app(fake, ServerSettings("demo"))
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": stream, "n": n}
    with listening(app) as url:
        with asked(url, "/v1/chat/completions", json=body) as connection:
            wait_for(lambda: len(fake.requests) == n)
            if stream:
                assert connection.recv(1)
        wait_for(lambda: len(fake.worker.cancelled) == n)
        wait_for(lambda: app.state.service.open_answers == 0)


# --- each attachment alone -------------------------------------------------------------------------------------------


def parts(*names):
    return [{"type": "image_url", "image_url": {"url": data_uri(sample(name))}} for name in names]


def test_each_attachment_alone(client, fake):
    fake.worker.say = lambda request: said(f"{len(request.media)} of {request.messages[-1].content[-1]}")
    content = [*parts("first.png", "second.png"), {"type": "text", "text": "What is it?"}]
    answer = ask(client, content, memphi={"each": True}).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "image 1: 1 of What is it?\nimage 2: 1 of What is it?"
    assert [entry["content"] for entry in answer["memphi"]["each"]] == ["1 of What is it?"] * 2
    assert [entry["param"] for entry in answer["memphi"]["each"]] == [
        f"messages[0].content[{place}].image_url.url" for place in range(2)
    ]
    names = [[media.name for media in request.media] for request in fake.requests]
    assert sorted(names) == [["image 1"], ["image 2"]]
    alone = [ask(client, [part, content[-1]]).json()["usage"]["prompt_tokens"] for part in content[:2]]
    assert answer["usage"]["prompt_tokens"] == sum(alone)


def test_each_goes_on_where_one_fails(client, fake):
    def say(request):
        if request.media[0].name == "image 1":
            return [MediaError("image 1: is damaged")]
        return said("a number", FinishReason.LENGTH)

    fake.worker.say = say
    answer = ask(client, [*parts("first.png", "second.png"), TEXT], memphi={"each": True}).json()
    assert answer["choices"][0]["message"]["content"] == "image 2: a number"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["memphi"]["each"][0]["error"] == "image 1: is damaged"
    chunks = chunks_of(ask(client, [*parts("first.png", "second.png"), TEXT], stream=True, memphi={"each": True}))
    told = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert told == "image 2: a number"
    assert chunks[-1]["memphi"]["each"] == answer["memphi"]["each"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"%PDF-1.7", "image 1: "),
        (b"", "image 1: "),
        (sample("question.wav"), "image 1: holds no image but sound"),
    ],
    ids=["pdf", "empty", "sound"],
)
def test_each_goes_on_where_one_cannot_be_used(client, fake, bad, words):
    content = [{"type": "image_url", "image_url": {"url": data_uri(bad)}}, *parts("second.png"), TEXT]
    answer = ask(client, content, memphi={"each": True}).json()
    assert answer["choices"][0]["message"]["content"] == "image 2: It is a fake."
    (wrong, right) = answer["memphi"]["each"]
    assert wrong["error"].startswith(words)
    assert wrong["param"] == "messages[0].content[0].image_url.url"
    assert right["content"] == "It is a fake."
    assert [media.name for request in fake.requests for media in request.media] == ["image 2"]
    alone = ask(client, [content[0], TEXT], memphi={"each": True})
    assert refused(alone, 400, "messages[0].content[0].image_url.url").startswith(words)


def test_each_is_told_of_fields_and_no_options_of_the_command_line(client, fake):
    body = {"messages": [{"role": "user", "content": [*parts("first.png", "wide.png"), TEXT]}]}
    fields = {"memphi": {"each": True}, "max_tokens": fake.bounds.tokens - 100}
    priced = client.post("/v1/tokenize", json={**body, **fields}).json()
    (told,) = priced["errors"]
    assert "(max_tokens " in told
    assert [entry.get("error") for entry in ask(client, **body, **fields).json()["memphi"]["each"]] == [None, told]


@pytest.mark.parametrize("stream", [False, True])
def test_each_fails_where_all_do(client, fake, stream):
    fake.worker.say = lambda request: [MediaError(f"{request.media[0].name}: is damaged")]
    answer = ask(client, [*parts("first.png", "second.png"), TEXT], stream=stream, memphi={"each": True})
    assert refused(answer, 400, "messages[0].content[0].image_url.url") == "image 1: is damaged"


def test_each_is_told_in_turn_whoever_is_first():
    first = threading.Event()

    class Slow(FakeEngine):
        async def submit(self, request):
            if request[0].request.media[0].name == "image 2":
                for delta in said("second"):
                    yield delta
                first.set()
                return
            await asyncio.to_thread(first.wait)
            for delta in said("first"):
                yield delta

    with serving(Slow()) as client:
        answer = ask(client, [*parts("first.png", "second.png"), TEXT], memphi={"each": True})
    assert answer.json()["choices"][0]["message"]["content"] == "image 1: first\nimage 2: second"
