"""Masks over the official vocabulary: what may follow an answer depends on the answer and the grammar alone."""

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.errors import RequestError
from memphi.request import Grammar, SamplingParams
from memphi.sampling.grammar import MOST_PARTS, Grammars
from tests.pure.inputs_samples import config, tokenizer

STOPS = {199_999, 200_020}
CALL, CALL_CLOSE = 200_025, 200_026
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name"],
    "additionalProperties": False,
}
CASES = [
    (Grammar("json_object"), '{"a": [1, {"b": null}], "c": "d\\n"}'),
    (Grammar("json_schema", json.dumps(SCHEMA)), '{"name": "Zoë 👋", "sizes": [1, -20]}'),
    (Grammar("json_schema", json.dumps(SCHEMA)), json.dumps({"name": "x", "sizes": []}, indent=4)),
    (Grammar("regex", r"(yes|no), [0-9]{2,4}!"), "yes, 123!"),
    (Grammar("regex", r".*\n\d+"), "любой текст\n12"),
    (Grammar("lark", 'start: "1" ("+" "1")*'), "1+1+1+1"),
]


@pytest.fixture(scope="module")
def grammars():
    return Grammars(tokenizer(), config())


def ids_of(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


@pytest.mark.parametrize(("grammar", "text"), CASES)
def test_an_answer_may_be_written_token_by_token_and_end_where_it_is_complete(grammars, grammar, text):
    matcher, answer = grammars.matcher(grammar), tokenizer().encode_text(text)
    for place, token in enumerate(answer):
        assert token in ids_of(matcher.allowed(answer[:place]))
    assert ids_of(matcher.allowed(answer)) >= STOPS


@pytest.mark.parametrize(("grammar", "text"), CASES[:5])
def test_it_may_not_end_before(grammars, grammar, text):
    matcher, answer = grammars.matcher(grammar), tokenizer().encode_text(text)
    for place in range(len(answer)):
        complete = grammar.kind == "regex" and re.fullmatch(grammar.source, tokenizer().decode(answer[:place]))
        assert bool(ids_of(matcher.allowed(answer[:place])) & STOPS) is bool(complete)


@given(st.sampled_from(CASES), st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_a_mask_depends_on_the_answer_alone(grammars, case, asked):
    """In any order, as after a pause or a step that is done again."""
    grammar, text = case
    answer = tokenizer().encode_text(text)
    matcher = grammars.matcher(grammar)
    for length, goes_on in asked:
        fresh = grammars.matcher(grammar).allowed(answer[:length], goes_on)
        assert (matcher.allowed(answer[:length], goes_on) == fresh).all()


def test_a_wrong_answer_is_refused_and_forgotten(grammars):
    matcher = grammars.matcher(Grammar("regex", "ab"))
    with pytest.raises(RequestError, match="the regular expression cannot be used"):
        matcher.allowed(tokenizer().encode_text("b"))
    assert ids_of(matcher.allowed(())) == set(tokenizer().encode_text("ab"))


def test_where_an_answer_is_to_go_on_it_ends_only_if_it_must(grammars):
    matcher = grammars.matcher(Grammar("regex", "a{1,2}"))
    (a,) = tokenizer().encode_text("a")
    assert ids_of(matcher.allowed([a])) == {a} | STOPS
    assert ids_of(matcher.allowed([a], goes_on=True)) == {a}
    assert ids_of(matcher.allowed([a, a], goes_on=True)) == STOPS


def test_special_tokens_are_never_text_and_text_is_never_special(grammars):
    named = grammars.matcher(Grammar("lark", 'start: <|tool_call|> "[" "]" <|/tool_call|>'))
    assert ids_of(named.allowed(())) == {CALL}
    (brackets,) = tokenizer().encode_text("[]")
    assert brackets in ids_of(named.allowed([CALL]))
    assert ids_of(named.allowed([CALL, brackets])) == {CALL_CLOSE}
    assert ids_of(named.allowed([CALL, brackets, CALL_CLOSE])) == STOPS
    text = grammars.matcher(Grammar("regex", r"(.|\n)*"))
    assert {number for number in ids_of(text.allowed(())) if number >= 200_019} == STOPS & {200_020}
    written = tokenizer().encode_text("<|tool_call|>")
    assert CALL not in written
    assert ids_of(grammars.matcher(Grammar("regex", r"<\|tool_call\|>")).allowed(written)) == STOPS


def test_ids_without_a_token_are_never_allowed(grammars):
    mask = grammars.matcher(Grammar("lark", "start: <[*]>")).allowed(())
    assert ids_of(mask) == set(np.flatnonzero(tokenizer().known_ids(200_064)).tolist())


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "[", r'the regular expression cannot be used: invalid regex "\[": unclosed character class$'),
        ("regex", "a(?=b)", "look-ahead and look-behind, is not supported"),
        ("regex", r"[^\s\S]", "the regular expression cannot be used: no answer could match it$"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("regex", "a" * 300_000, "has 300000 characters; at most 262144"),
        ("json_schema", "[1]", "the JSON schema cannot be used: it is no JSON object$"),
        ("json_schema", "{", "the JSON schema cannot be used: EOF while parsing"),
        ("json_schema", '{"type": "nothing"}', "Invalid type: nothing"),
        ("json_schema", '{"not": {}}', "Unimplemented keys"),
        ("json_schema", '{"$ref": "http://example.com/"}', "example.com"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}', r"Unsatisfiable schema.*5.*2"),
        ("lark", "", "Empty grammar"),
        ("lark", "start: nothing", 'unknown name: "nothing"'),
        ("lark", "start: <|nothing|>", "unknown special token"),
        ("lark", "start: start", "no answer could match it"),
        ("lark", "start: <[200040]>", "the Lark grammar asks for what the model has no token for"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(grammars, kind, source, reason):
    with pytest.raises(RequestError, match=reason) as refused:
        grammars.check(SamplingParams(grammar=Grammar(kind, source)))
    assert "\n" not in str(refused.value)


def test_a_kind_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match="kind is 'xml'; it must be one of json_object, json_schema, regex, lark"):
        Grammar("xml")


@pytest.mark.parametrize("number", [-1, 200_064, 10**9])
def test_a_bias_needs_an_id_that_there_is(grammars, number):
    grammars.check(SamplingParams(logit_bias=((0, 1.0), (200_063, -1.0))))
    with pytest.raises(RequestError, match=f"logit_bias names id {number}; this model's ids are 0 to 200063"):
        grammars.check(SamplingParams(logit_bias=((0, 1.0), (number, 1.0))))


def chained(links, wrap):
    """A schema each of whose definitions refers to the next."""
    names = {str(place): wrap({"$ref": f"#/$defs/{place + 1}"}) for place in range(links)}
    return json.dumps({"$ref": "#/$defs/0", "$defs": {**names, str(links): {"type": "string"}}})


def ruled(links, rule):
    return "start: r0\n" + "".join(rule(f"r{i}", f"r{i + 1}") for i in range(links)) + f'r{links}: "a"'


DEEP = {
    "items": lambda parts: Grammar("json_schema", chained((parts - 5) // 2, lambda ref: {"items": ref})),
    "properties": lambda parts: Grammar(
        "json_schema", chained((parts - 5) // 3, lambda ref: {"properties": {"a": ref}})
    ),
    "rules": lambda parts: Grammar("lark", ruled(parts - 2, lambda this, to: f"{this}: {to}\n")),
    "groups": lambda parts: Grammar("lark", ruled(parts // 3 - 2, lambda this, to: f'{this}: ("a" ("b" {to})+)+\n')),
    "both": lambda parts: Grammar(
        "lark",
        ruled(parts // 2, lambda this, to: f"{this}: {to}\n").rpartition('"a"')[0]
        + "%json "
        + chained(parts // 4 - 3, lambda ref: {"items": ref}),
    ),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_deepest_grammar_fits_a_thread_s_stack_and_a_deeper_one_is_refused(grammars, name):
    """Beyond that the process would end at once, with everybody's requests."""
    grammars.check(SamplingParams())
    checked = []

    def check():
        grammars.check(SamplingParams(grammar=DEEP[name](MOST_PARTS)))
        checked.append(name)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert checked
    with pytest.raises(RequestError, match=r"has \d+ parts that may refer to each other; at most 1000"):
        grammars.check(SamplingParams(grammar=DEEP[name](2 * MOST_PARTS)))


def test_a_large_grammar_that_refers_to_little_is_taken(grammars):
    schema = {"type": "object", "properties": {f"p{place}": {"type": "integer"} for place in range(1500)}}
    grammars.check(SamplingParams(grammar=Grammar("json_schema", json.dumps(schema))))
    tools = [f'call_{place}: "x" %json {{"enum": ["a (b) [c]"], "$defs": {{}}}}' for place in range(300)]
    start = "start: " + " | ".join(f"call_{place}" for place in range(300))
    grammars.check(SamplingParams(grammar=Grammar("lark", "\n".join([start, *tools]))))


def test_checking_imports_no_torch():
    script = """
import sys
from memphi import official
from memphi.config import ModelConfig
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Grammar, SamplingParams
from memphi.sampling.grammar import Grammars
grammars = Grammars(Tokenizer.from_folder(official.folder()), ModelConfig.from_folder(official.folder()))
assert "llguidance" not in sys.modules
grammars.check(SamplingParams(grammar=Grammar("regex", "a+")))
assert "llguidance" in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
