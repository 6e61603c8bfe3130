"""Tools: what the model is shown, what its answer is held to, and calls found in what it says."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.errors import RequestError
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import FinishReason
from memphi.sampling.grammar import Grammars
from memphi.server.tools import ArgumentsGrown, CallBegun, CallReader
from tests.server.conftest import ask, chunks_of, refused
from tests.server.fakes import said

WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"days": {"type": "integer"}},
    },
}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, TIME)]
NAMED = {"type": "function", "function": {"name": "get_time"}}
NONE = {"type": "no"}
CUT = '{"name": "get_we'
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NOW = '{"name": "get_time", "arguments": {}}'


def called(*calls):
    return f"<|tool_call|>[{', '.join(calls)}]<|/tool_call|>"


def taking(parameters):
    """A tool of these parameters."""
    return {"type": "function", "function": {"name": "get_time", "parameters": parameters}}


# --- what the model is shown -----------------------------------------------------------------------------------------


def test_the_model_is_shown_tools_in_its_own_format(client, fake):
    assert ask(client, tools=TOOLS).status_code == 200
    system, user = fake.requests[0].messages
    assert (system.role, system.content, user.content) == ("system", (), ("Hello",))
    assert json.loads(system.tools) == [
        WEATHER,
        {"name": "get_time", "description": "", "parameters": {"type": "object", "properties": {}}},
    ]


def test_tools_join_the_system_message_there_is(client, fake):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ask(client, messages=messages, tools=TOOLS)
    system, _ = fake.requests[0].messages
    assert (system.role, system.content) == ("system", ("Be brief.",))
    assert system.tools


def test_tools_that_may_not_be_called_are_not_shown(client, fake):
    fake.worker.say = lambda request: said(called(PARIS))
    answer = ask(client, tools=TOOLS, tool_choice="none").json()
    assert answer["choices"][0]["message"]["content"] == called(PARIS)
    (request,) = fake.requests
    assert [message.role for message in request.messages] == ["user"]
    assert request.sampling.grammar is None


def test_errors_count_the_clients_own_messages(client):
    messages = [{"role": "user", "content": "Hello"}, {"role": "system", "content": "x"}]
    assert "messages[1] is a system message" in refused(ask(client, messages=messages, tools=TOOLS), 400, "messages[1]")


def test_a_conversation_with_calls_and_results(client, fake):
    calls = [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "b", "type": "function", "function": {"name": "get_time", "arguments": ""}},
    ]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "a", "content": "Rain"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "Noon"}]},
    ]
    assert ask(client, messages=messages, tools=TOOLS).status_code == 200
    assistant, *results = fake.requests[0].messages[2:]
    assert json.loads(assistant.tool_calls) == [json.loads(PARIS), json.loads(NOW)]
    assert [(message.role, message.content) for message in results] == [("tool", ("Rain",)), ("tool", ("Noon",))]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function", "is missing"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}},
            "tool_choice.function.name",
            "none of the tools",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [TOOLS[1] | {"x": 1}]}, "tools[0].x", "no field"),
        ({"tools": [taking({"const": "x"})]}, "tools[0].function.parameters", 'give it "type": "object"'),
        ({"tools": [TOOLS[0], taking({"type": "string"})]}, "tools[1].function.parameters", "schema of an object"),
        (
            {"tools": [*TOOLS, taking({"type": "object", "properties": {"a": {"type": "no"}}})]},
            "tools[2].function.parameters",
            "tools[2].function.parameters cannot be used: Invalid type: no",
        ),
        (
            {"tools": [TOOLS[0], taking({"type": "object", "properties": 3})], "tool_choice": NAMED},
            "tools[1].function.parameters",
            "cannot be used: properties must be an object",
        ),
        (
            {"tools": [taking({"type": "object", "properties": {"a": {"const": "x" * 300_000}}})]},
            "tools",
            "tools make a grammar that has 3",
        ),
        (
            {"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NONE}}},
            "response_format",
            "response_format cannot be used: Invalid type: no",
        ),
        ({"tools": TOOLS, "memphi": {"grammar": {"regex": "a"}}}, "memphi.grammar", "neither tools"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
            "messages[1].tool_call_id",
            "belongs to no tool call",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}},
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "must be a JSON object",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(client, fake, fields, param, words):
    assert words in refused(ask(client, **fields), 400, param)
    assert not fake.requests


# --- what its answer is held to --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grammars():
    folder = locate("demo").folder
    return Grammars(Tokenizer.from_folder(folder), read_config(folder))


SPECIAL = ("<|tool_call|>", "<|/tool_call|>")


def ids_of(text, tokenizer):
    """Ids of an answer, in which tool tokens are written out."""
    for token in SPECIAL:
        text = text.replace(token, f"\x00{token}\x00")
    return [
        number
        for piece in text.split("\x00")
        for number in ([tokenizer.special(piece)] if piece in SPECIAL else tokenizer.encode_text(piece))
    ]


def holds(grammars, grammar, text):
    """Whether a grammar lets a whole answer pass, its end included."""
    tokenizer = grammars._tokenizer
    ids = [*ids_of(text, tokenizer), tokenizer.end_id]
    matcher = grammars.matcher(grammar)
    try:
        return all(matcher.allowed(ids[:place])[token // 32] >> (token % 32) & 1 for place, token in enumerate(ids))
    except RequestError:
        return False


BAD_CITY = '{"name": "get_weather", "arguments": {"city": 3}}'


@pytest.mark.parametrize(
    ("fields", "passes", "stopped"),
    [
        (
            {"tool_choice": "required"},
            [called(PARIS), called(NOW), called(PARIS, NOW), called(PARIS.replace("}}", ', "days": 3}}'))],
            ["", "Hello", f"x{called(NOW)}", called(), called(BAD_CITY), called(PARIS.replace("city", "town"))],
        ),
        ({"tool_choice": NAMED}, [called(NOW), called(NOW, NOW)], [called(PARIS), "Hello"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [called(NOW)], [called(NOW, NOW)]),
        (
            {},
            ["", "Hello\nyou", called(PARIS), f"Let me see. {called(PARIS, NOW)}"],
            [called(BAD_CITY), f"{called(NOW)} more", called(NOW.replace("time", "date"))],
        ),
        (
            {"response_format": {"type": "json_object"}},
            ["{}", '{"a": [1]}', called(NOW)],
            ["Hello", "[]", called(BAD_CITY)],
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object", "required": ["a"]}},
                }
            },
            ['{"a": 1}', called(NOW)],
            ["{}"],
        ),
    ],
    ids=["required", "named", "one", "auto", "json", "schema"],
)
def test_calls_are_held_to_the_schema_of_their_tool(client, fake, grammars, fields, passes, stopped):
    assert ask(client, tools=TOOLS, **fields).status_code == 200
    grammar = fake.requests[0].sampling.grammar
    assert [text for text in passes if not holds(grammars, grammar, text)] == []
    assert [text for text in stopped if holds(grammars, grammar, text)] == []


LOOSE = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}
TAGGED, MISSHAPEN = (f'{{"name": "get_time", "arguments": {{"tags": {tags}}}}}' for tags in ('["a", "a"]', '"a"'))


def test_what_of_a_schema_cannot_be_held_to_is_left_to_the_model_unless_it_is_strict(client, fake, grammars):
    assert ask(client, tools=[taking(LOOSE)], tool_choice="required").status_code == 200
    assert holds(grammars, fake.requests[0].sampling.grammar, called(TAGGED))
    assert not holds(grammars, fake.requests[0].sampling.grammar, called(MISSHAPEN))
    strict = taking(LOOSE)
    strict["function"]["strict"] = True
    words = refused(ask(client, tools=[strict]), 400, "tools[0].function.parameters")
    assert "uniqueItems" in words


def test_json_beside_tools_has_no_more_white_space_than_without_them(client, fake, grammars):
    for tools in ([], TOOLS):
        ask(client, tools=tools, response_format={"type": "json_object"})
        grammar = fake.requests[-1].sampling.grammar
        assert holds(grammars, grammar, '{\n  "a": 1\n}')
        assert not holds(grammars, grammar, '{\n\n\n"a": 1}')


# --- calls found in what it says -------------------------------------------------------------------------------------


def test_calls_in_an_answer(client, fake):
    fake.worker.say = lambda request: said(called(PARIS, NOW))
    (choice,) = ask(client, tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"name": "get_time", "arguments": "{}"},
    ]
    assert len({call["id"] for call in calls}) == 2


def test_calls_in_a_stream(client, fake):
    fake.worker.say = lambda request: said(f"Wait. {called(PARIS, NOW)}", pieces=40)
    chunks = chunks_of(ask(client, tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait. "
    grown = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [(call["index"], call["function"]["name"]) for call in grown if "id" in call] == [
        (0, "get_weather"),
        (1, "get_time"),
    ]
    texts = {index: "".join(c["function"]["arguments"] for c in grown if c["index"] == index) for index in (0, 1)}
    assert texts == {0: '{"city": "Paris"}', 1: "{}"}
    assert sum(call["index"] == 0 for call in grown) > 1, "arguments come as they grow"  # What is there comes at once.
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_that_are_cut_end_for_want_of_length(client, fake):
    fake.worker.say = lambda request: said(called(PARIS)[:60], FinishReason.LENGTH)
    (choice,) = ask(client, tools=TOOLS).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith('{"ci')


@pytest.mark.parametrize(
    ("choice", "content"),
    [("auto", CUT), ("required", ""), (NAMED, "")],
    ids=["auto", "required", "named"],
)
def test_a_call_whose_name_is_cut_is_text_only_where_text_was_allowed(client, fake, choice, content):
    fake.worker.say = lambda request: said(f"<|tool_call|>[{CUT}", FinishReason.LENGTH)
    (whole,) = ask(client, tools=TOOLS, tool_choice=choice).json()["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (content, "length")
    choices = [chunk["choices"][0] for chunk in chunks_of(ask(client, tools=TOOLS, tool_choice=choice, stream=True))]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == content
    assert choices[-1]["finish_reason"] == "length"


def read(text, cuts=()):
    """Text and calls of an answer that comes in pieces."""
    reader, found = CallReader(must_call=False), []
    places = [0, *sorted(cuts), len(text)]
    for start, end in pairwise(places):
        found += reader.feed(text[start:end])
    found += reader.flush()
    calls = [[item.name, ""] for item in found if isinstance(item, CallBegun)]
    for item in found:
        if isinstance(item, ArgumentsGrown):
            calls[item.place][1] += item.text
    return "".join(item for item in found if isinstance(item, str)), calls


@pytest.mark.parametrize(
    ("text", "plain", "calls"),
    [
        ("Hello", "Hello", []),
        ("<|tool", "<|tool", []),
        ("functions", "functions", []),
        (called(NOW), "", [["get_time", "{}"]]),
        (f"Wait. {called(NOW)} Done.", "Wait.  Done.", [["get_time", "{}"]]),
        (f" functools[{PARIS}, {NOW}] ok", "  ok", [["get_weather", '{"city": "Paris"}'], ["get_time", "{}"]]),
        (f"In functools[{NOW}]", f"In functools[{NOW}]", []),
        (f"<|tool_call|>{NOW}<|/tool_call|>", "", [["get_time", "{}"]]),
        ('<|tool_call|>[{"arguments": {"a": 1}, "name": "f"}]', "", [["f", '{"a": 1}']]),
        ('<|tool_call|>[{"name": "f", "parameters": {"a": 1}}]', "", [["f", '{"a": 1}']]),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": "}]\\"{"}}]', "", [["f", '{"a": "}]\\"{"}']]),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": {"b": [{}]}}}]', "", [["f", '{"a": {"b": [{}]}}']]),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": ', "", [["f", '{"a": ']]),
        ('<|tool_call|>[{"name": "f', '{"name": "f', []),
        ('<|tool_call|>[{"x": 1}]<|/tool_call|>', '{"x": 1}', []),
        ('<|tool_call|>[{"name": 1, "arguments": 2}]<|/tool_call|>', '{"name": 1, "arguments": 2}', []),
        ("<|tool_call|>Hello", "Hello", []),
    ],
)
@given(data=st.data())
def test_calls_are_found_however_the_answer_is_cut(text, plain, calls, data):
    cuts = data.draw(st.lists(st.integers(0, len(text))))
    assert read(text, cuts) == (plain, calls)


@given(text=st.text('<|tool_call/>[]{}":,\\ na', max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_any_text_is_read_alike_however_it_is_cut(text, cuts):
    text = called(text)
    assert read(text, [min(cut, len(text)) for cut in cuts]) == read(text)
