"""Structured output through the engine: answers keep to their grammars, and nobody else's answer changes."""

import json
import re
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from memphi.cli import app
from memphi.engine import process
from memphi.engine.engine import Engine
from memphi.errors import RequestError
from memphi.request import FinishReason, Grammar, Request, SamplingParams
from tests.checkpoints import FIRST_SPECIAL, STOP_TOKEN_IDS, VOCAB_SIZE, tiny_checkpoint, tiny_config
from tests.faults import KINDS
from tests.scenes import GREEDY, Stage, alone, lively_model, mixed_requests

REGEXES = [r"[0-9]{3}-[a-z]{1,5}", r"(yes|no)(, (yes|no)){0,3}", r"(?i)the answer is .{2,9}\.", r"[а-яё]{1,4}\n🙂?"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CALLS = """start: <|tool_call|> calls <|/tool_call|>
calls: %json {"type": "array", "maxItems": 2, "items": {"enum": [1, "two"]}}"""


def held(grammar, text="What is it?", **sampling):
    params = replace(SamplingParams(max_tokens=300), grammar=grammar, **sampling)
    return Request.ask(text, sampling=params)


def regex(source, **sampling):
    return held(Grammar("regex", source), **sampling)


def schema(source, **sampling):
    return held(Grammar("json_schema", json.dumps(source)), **sampling)


def held_requests():
    return [
        regex(REGEXES[0]),
        schema(PERSON, temperature=1.0, seed=3),
        regex(REGEXES[2], temperature=2.0, repetition_penalty=1.2, top_logprobs=1),
        held(Grammar("lark", CALLS), temperature=1.0),
        regex(r"(ab|c){20}", ignore_eos=True),
    ]


@pytest.mark.parametrize("source", REGEXES)
def test_an_answer_matches_as_a_whole(stage, source):
    requests = [regex(source, temperature=t, seed=seed) for t, seed in [(0.0, 0), *((1.5, seed) for seed in range(6))]]
    results = stage().answer(requests)
    for result in results:
        assert re.fullmatch(source, result.text)
        assert result.finish_reason is FinishReason.STOP
        assert result.ids[-1] in STOP_TOKEN_IDS
        assert not set(result.ids[:-1]) & set(range(FIRST_SPECIAL, VOCAB_SIZE))
    assert len({result.text for result in results}) > 1


SIMPLE = st.one_of(
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, *[st.integers(0, 300)] * 2),
    st.builds(
        lambda values: {"enum": values},
        st.lists(
            st.none() | st.booleans() | st.integers(-9, 9) | st.text('aé"\\\n{', max_size=3), min_size=1, max_size=3
        ),
    ),
    st.just({"type": "boolean"}),
)
SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: (
        st.builds(
            lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
            inner,
            *[st.integers(0, 2)] * 2,
        )
        | st.builds(
            lambda properties, optional: {
                "type": "object",
                "properties": properties,
                "required": [name for name in properties if name not in optional],
                "additionalProperties": False,
            },
            st.dictionaries(st.text('ab "é', max_size=3), inner, max_size=3),
            st.sets(st.text("ab", max_size=1)),
        )
    ),
    max_leaves=4,
)


def validate(value, schema):
    """Raise AssertionError unless a value keeps to one of these schemas."""
    if "enum" in schema:
        assert any(value == allowed and type(value) is type(allowed) for allowed in schema["enum"])
    elif schema["type"] == "object":
        assert set(schema["required"]) <= set(value) <= set(schema["properties"])
        for name, inner in value.items():
            validate(inner, schema["properties"][name])
    elif schema["type"] == "array":
        assert schema["minItems"] <= len(value) <= schema["maxItems"]
        for inner in value:
            validate(inner, schema["items"])
    elif schema["type"] == "integer":
        assert type(value) is int
        assert schema["minimum"] <= value <= schema["maximum"]
    elif schema["type"] == "string":
        assert isinstance(value, str)
        assert len(value) <= schema["maxLength"]
    else:
        assert isinstance(value, bool)


@given(SCHEMAS, st.integers(0, 99), st.sampled_from([0.0, 1.0, 3.0]))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_answer_keeps_to_its_schema(model, tokenizer, source, seed, temperature):
    request = schema(source, seed=seed, temperature=temperature, max_tokens=2000)
    (result,) = alone(model, tokenizer, [request])
    assert result.finish_reason is FinishReason.STOP
    validate(json.loads(result.text), source)


def test_any_object_is_an_object(stage):
    request = held(Grammar("json_object"), temperature=1.0, logit_bias=((ord("}"), 6.0), (ord('"'), 4.0)))
    ended = [
        result
        for result in stage().answer([replace(request, sampling=replace(request.sampling, seed=i)) for i in range(8)])
        if result.finish_reason is FinishReason.STOP
    ]
    assert len(ended) > 4
    assert all(isinstance(json.loads(result.text), dict) for result in ended)


def test_held_and_free_rows_in_one_batch_are_answered_as_alone(model, tokenizer, stage, expected):
    """Nobody else's answer changes, and the held ones stay the same."""
    wanted = alone(model, tokenizer, held_requests())
    together = stage(rows=10).answer([*held_requests(), *mixed_requests()])
    assert [result.ids for result in together[:5]] == [result.ids for result in wanted]
    assert [result.ids for result in together[5:]] == expected
    assert [result.text for result in together[:5]] == [result.text for result in wanted]


@pytest.mark.parametrize("settings", [{"pages": 16}, {"pages": None, "kv_cache": False}])
def test_paused_and_computed_anew_a_grammar_goes_on_where_it_was(model, tokenizer, stage, settings):
    wanted = alone(model, tokenizer, held_requests())
    playing = stage(**settings)
    numbers = [playing.submit(request) for request in held_requests()]
    while playing.loop.has_work:
        playing.step()
        if playing.steps % 9 == 0 and playing.scheduler.active:
            playing.scheduler.pause(playing.scheduler.active[-1])
    assert playing.loop.stats.pauses > 3
    assert [playing.result(number).ids for number in numbers] == [result.ids for result in wanted]
    playing.check_empty()


def test_going_over_to_long_positions_changes_no_grammar(tokenizer):
    model = lively_model(tiny_config(short_tokens=64, max_tokens=400))
    (result,) = Stage(model, tokenizer).answer([regex("(ab|cd|e[0-9]){30}", temperature=1.0)])
    assert result.footprint.prompt_tokens < 64 < result.footprint.prompt_tokens + len(result.ids)
    assert re.fullmatch("(ab|cd|e[0-9]){30}", result.text)


def test_a_step_that_is_done_again_changes_no_answer(model, tokenizer, stage):
    """Memory runs out after all that a step does has been done."""
    requests = held_requests()[:4]
    struck = stage()
    run, steps = struck.loop.runner.run, count()

    def strike(plan):
        result = run(plan)
        if next(steps) % 5 == 4:
            raise KINDS["torch"]()
        return result

    struck.loop.runner.run = strike
    wanted = [result.ids for result in alone(model, tokenizer, requests)]
    assert struck.ids(requests) == wanted
    assert sum(struck.loop.stats.rungs.values()) > 5


def test_an_answer_that_has_to_stop_too_early_says_so(stage):
    results = stage().answer([regex("[a-z]{9}[0-9]", max_tokens=4), schema(PERSON, max_tokens=5)])
    for result in results:
        assert result.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[a-z]{1,9}", results[0].text)
    assert results[1].text.startswith("{")


def test_without_ends_an_answer_goes_on_as_far_as_its_grammar_does(stage):
    (result, cut) = stage().answer([regex("a{1,9}", ignore_eos=True), regex("a+", ignore_eos=True, max_tokens=30)])
    assert (result.text, result.finish_reason) == ("a" * 9, FinishReason.STOP)
    assert (cut.text, cut.finish_reason) == ("a" * 30, FinishReason.LENGTH)


def test_a_stop_string_ends_a_held_answer(stage):
    (result,) = stage().answer([regex("abcabc", stop=("ca",))])
    assert (result.text, result.finish_reason) == ("ab", FinishReason.STOP)


def test_calls_of_tools_are_tokens_and_not_text(stage, tokenizer):
    call, close = tokenizer.special("<|tool_call|>"), tokenizer.special("<|/tool_call|>")
    written = regex(r"<\|tool_call\|>\[\]<\|/tool_call\|>")
    (called, plain) = stage().answer([held(Grammar("lark", CALLS)), written])
    assert called.ids[0] == call
    assert called.ids[-2] == close
    assert called.text.startswith("<|tool_call|>[")
    validate(
        json.loads(called.text.removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>")),
        {"type": "array", "minItems": 0, "maxItems": 2, "items": {"enum": [1, "two"]}},
    )
    assert plain.text == "<|tool_call|>[]<|/tool_call|>"
    assert not {call, close} & set(plain.ids)


def test_a_grammar_that_leads_no_further_fails_its_own_request_alone(stage, expected):
    playing = stage()
    # The last ids of the vocabulary stand for no token.
    dead_end = playing.submit(held(Grammar("lark", f'start: "ab" <[{VOCAB_SIZE - 1}]>')))
    others = [playing.submit(request) for request in mixed_requests()]
    playing.run()
    with pytest.raises(RequestError, match="the Lark grammar asks for what the model has no token for"):
        playing.result(dead_end)
    assert [playing.result(number).ids for number in others] == expected
    assert playing.loop.stats.ended["failed"] == 1
    playing.check_empty()


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    engine = Engine(model, tokenizer)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"grammar": Grammar("regex", "(")}, "the regular expression cannot be used: .*unclosed group"),
        ({"grammar": Grammar("json_schema", '{"type": 1}')}, "the JSON schema cannot be used"),
        ({"grammar": Grammar("lark", "begin: x")}, "the Lark grammar cannot be used"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, f"logit_bias names id {VOCAB_SIZE}.*0 to {VOCAB_SIZE - 1}"),
    ],
)
def test_what_cannot_be_used_is_refused_before_it_is_let_in(engine, sampling, reason):
    requests = [Request.ask("hi", sampling=GREEDY), Request.ask("hi", sampling=replace(GREEDY, **sampling))]
    steps = engine.stats.steps
    with pytest.raises(RequestError, match=reason):
        engine.generate(requests)
    with pytest.raises(RequestError, match=reason):
        list(engine.stream(requests[1]))
    assert engine.stats.steps == steps
    assert engine.stats.open == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(
        tmp_path_factory.mktemp("grammar") / "model", tiny_config(short_tokens=4096, max_tokens=8192)
    )


def test_it_is_all_the_same_in_another_process(folder):
    import memphi

    requests = [*held_requests(), Request.ask("hi", sampling=replace(GREEDY, logit_bias=((5, 3.0),), top_logprobs=3))]
    here = memphi.load(str(folder), "cpu", "fp32").generate(requests)
    there = process.start(str(folder), "cpu", "fp32")
    try:
        for request in (regex("("), Request.ask("hi", sampling=SamplingParams(logit_bias=((-1, 0.0),)))):
            with pytest.raises(RequestError):
                there.generate(request)
        assert there.stats.steps == 0
        for result, alike in zip(there.generate(requests), here, strict=True):
            assert (result.ids, result.text) == (alike.ids, alike.text)
            assert [entry.id for entry in result.logprobs] == [entry.id for entry in alike.logprobs]
    finally:
        there.close()


# --- memphi ask ----------------------------------------------------------------------------------------------------


def ask(folder, *arguments):
    options = ["--model", folder, "--device", "cpu", "--dtype", "fp32", "--max-tokens", 200]
    return CliRunner().invoke(app, [str(word) for word in ("ask", "hi", *options, *arguments)])


def test_ask_takes_a_schema_or_a_regex(folder, tmp_path):
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON), encoding="utf-8")
    answered = ask(folder, "--schema", file)
    assert answered.exit_code == 0, answered.output
    validate(json.loads(answered.stdout), PERSON)
    answered = ask(folder, "--regex", "[0-9]{4}")
    assert re.fullmatch(r"[0-9]{4}\n", answered.stdout)


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (None, [], r"missing.json holds no JSON schema: .*No such file"),
        ("[]", [], "holds no JSON schema: it is no JSON object"),
        ("{", [], "holds no JSON schema: Expecting property name"),
        ("\udcff", [], "holds no JSON schema: 'utf-8' codec can't decode"),
        ("{}", ["--regex", "a"], "held to a --schema or to a --regex, not to both"),
    ],
)
def test_ask_says_what_is_wrong_with_a_schema_before_it_loads(tmp_path, content, options, reason):
    file = tmp_path / ("missing.json" if content is None else "schema.json")
    if content is not None:
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
    refused = ask("no such model", "--schema", file, *options)
    assert refused.exit_code == 2
    # Without blanks: a long path is broken anywhere.
    assert re.search(reason.replace(" ", ""), "".join(refused.output.replace("│", " ").split()))
