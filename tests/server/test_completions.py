"""Plain completions: the prompt is what stands there, without turns."""

import pytest

from memphi.request import Delta, FinishReason, TokenLogprob
from tests.server.conftest import chunks_of, refused
from tests.server.fakes import said


def complete(client, prompt="Once upon", **fields):
    return client.post("/v1/completions", json={"model": "demo", "prompt": prompt, **fields})


def test_a_completion(client, fake):
    answer = complete(client).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "It is a fake.", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == len(fake.tokenizer.encode_text("Once upon"))
    assert answer["memphi"]["ignored"] == []
    (request,) = fake.requests
    assert request.raw
    assert request.sampling.max_tokens == 16


def test_what_is_too_long_is_told_with_its_field(client):
    assert "(max_tokens " in refused(complete(client, max_tokens=10**6), 413, "max_tokens")


def test_text_that_looks_like_a_special_token_stays_text(client, fake):
    text = "<|user|>Hello<|end|>"
    assert complete(client, text).json()["usage"]["prompt_tokens"] == len(fake.tokenizer.encode_text(text))


def test_several_prompts_have_several_answers_each(client, fake):
    fake.worker.say = lambda request: said(f"{request.messages[0].content[0]} {request.sampling.seed}")
    answer = complete(client, ["a", "b"], n=2, seed=1, user="u", max_tokens=3).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a 1"),
        (1, "a 2"),
        (2, "b 1"),
        (3, "b 2"),
    ]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["memphi"]["ignored"] == ["user"]
    assert {request.sampling.max_tokens for request in fake.requests} == {3}


def test_the_same_prompt_twice_is_drawn_anew_without_a_seed(client, fake):
    complete(client, ["a", "a"], n=2, temperature=1)
    assert len({request.sampling.seed for request in fake.requests}) == 4
    fake.requests.clear()
    complete(client, ["a", "a"], n=2, temperature=1, seed=5)
    assert [request.sampling.seed for request in fake.requests] == [5, 6, 5, 6]


def test_a_stream(client):
    *chunks, last = chunks_of(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "It is a fake."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    *_, last = chunks_of(complete(client, stream=True))
    assert last["memphi"]["price"]["pages"] == 1


def test_logprobs_count_characters(client, fake):
    a, b, end = (*fake.tokenizer.encode_text("ab"), fake.tokenizer.end_id)
    deltas = [
        Delta("a", (a,), logprobs=(TokenLogprob(a, -0.5, ((a, -0.5), (b, -1.0))),)),
        Delta(
            "b", (b, end), FinishReason.STOP, logprobs=(TokenLogprob(b, -0.1, ((b, -0.1),)), TokenLogprob(end, -0.2))
        ),
    ]
    fake.worker.say = lambda request: deltas
    expected = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.1],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {"b": -0.1}],
        "text_offset": [0, 1],
    }
    assert complete(client, logprobs=2).json()["choices"][0]["logprobs"] == expected
    assert fake.requests[0].sampling.top_logprobs == 2
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(complete(client, logprobs=2, stream=True))]
    assert {name: [one for part in told for one in part[name]] for name in expected} == expected


def test_offsets_count_whole_characters_however_the_text_is_shown(client, fake):
    """Text comes later than its tokens where a character has several, or a stop string might begin."""
    tokens = [fake.tokenizer.encode_text(text) for text in ("a", "\N{PARTY POPPER}", "b")]
    ids = [number for each in tokens for number in each]
    assert len(tokens[1]) > 1, "the character should be in pieces"
    deltas = [Delta("", (number,), logprobs=(TokenLogprob(number, -0.5),)) for number in ids]
    deltas.append(Delta("a\N{PARTY POPPER}b", (), FinishReason.STOP))
    fake.worker.say = lambda request: deltas
    expected = [0, *[1] * len(tokens[1]), 2]
    assert complete(client, logprobs=0).json()["choices"][0]["logprobs"]["text_offset"] == expected
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(complete(client, logprobs=0, stream=True))]
    assert [place for part in told for place in part["text_offset"]] == expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [1, 2]}, "prompt[0]", "valid string"),
        ({"prompt": None}, "prompt", "valid list"),
        ({"echo": True}, "echo", "should be False"),
        ({"suffix": "x"}, "suffix", "is not supported"),
        ({"best_of": 2}, "best_of", "beyond n"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"messages": []}, "messages", "no field"),
        ({"memphi": {"each": True}}, "memphi.each", "attachments"),
        ({"memphi": {"grammar": {"regex": "("}}}, "memphi.grammar", "regular expression"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(client, fake, fields, param, words):
    assert words in refused(complete(client, **fields), 400, param)
    assert not fake.requests
