"""Workloads are what they say, for every seed, and a time becomes the right figure."""

from dataclasses import replace

import pytest

from memphi.bench.workloads import NAMES, UNITS, WORKLOADS, Timing, Words, draw
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.inputs.prompt import measure
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import InputMode


def made(name):
    """A config, its tokenizer and its words."""
    folder = locate(name).folder
    config, tokenizer = read_config(folder), Tokenizer.from_folder(folder)
    return config, tokenizer, Words(tokenizer, config.language.vocab_size)


@pytest.fixture(scope="module")
def official():
    return made("random")


@pytest.fixture(scope="module", params=["official", "demo"])
def model(request, official):
    """The official vocabulary, and one of bytes."""
    return official if request.param == "official" else made("demo")


def few(name):
    """A workload with few requests, otherwise as it is."""
    workload = WORKLOADS[name]
    return replace(workload, requests=min(workload.requests, 3))


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_exactly_the_tokens_that_are_said(model, name):
    config, tokenizer, words = model
    workload = few(name).scaled(0.2) if WORKLOADS[name].seconds else few(name)
    for draft in draw(workload, words, 7):
        request = draft.request()
        footprint = measure(request, config, tokenizer)
        assert footprint.text_tokens == workload.prompt_tokens
        assert len(footprint.images) == workload.images
        assert request.sampling.ignore_eos
        assert request.sampling.max_tokens == workload.answer_tokens
        assert (draft.mode is None) == workload.attaches


def test_the_sizes_are_those_of_the_official_model(official):
    (config, tokenizer, words), tokens = official, {}
    for name in ("decode-1", "prefill", "describe-1", "describe-8", "pages", "transcribe"):
        footprint = measure(draw(few(name), words, 0)[0].request(), config, tokenizer)
        tokens[name] = (footprint.prompt_tokens, footprint.crops, round(sum(clip.seconds for clip in footprint.clips)))
    assert tokens == {
        "decode-1": (512, 0, 0),
        "prefill": (1713, 0, 0),
        "describe-1": (1713, 7, 0),
        "describe-8": (8 * 1681 + 32, 56, 0),
        "pages": (9377, 36, 0),
        "transcribe": (7532, 0, 600),
    }


def test_a_seed_says_it_all_and_nothing_is_drawn_twice(model):
    words = model[2]
    shapes = [replace(few(name), images=1, size=(40, 50), seconds=0.5) for name in ("decode-64", "describe-64")]
    again, *others = (
        [draft.request() for workload in shapes for draft in draw(workload, words, seed)] for seed in (1, 1, 2)
    )
    assert [r.messages[0].content[-1] for r in again] == [r.messages[0].content[-1] for r in others[0]]
    assert [m.digest for r in again for m in r.media] == [m.digest for r in others[0] for m in r.media]
    texts = [request.messages[0].content[-1] for request in (*again, *others[1])]
    digests = [medium.digest for request in (*again, *others[1]) for medium in request.media]
    assert len(set(texts)) == len(texts) == 12
    assert len(set(digests)) == len(digests) == 24


def test_adapters_take_turns(model):
    drafts = draw(replace(WORKLOADS["mixed"], requests=4), model[2], 0)
    assert [draft.mode for draft in drafts] == [InputMode.TEXT, InputMode.VISION, InputMode.SPEECH, InputMode.TEXT]


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("decode-1", 127 / 8),
        ("decode-64", 64 * 128 / 10),
        ("prefill", 2.0),
        ("describe-1", 10.0),
        ("describe-64", 6.4),
        ("transcribe", 2.0),
    ],
)
def test_a_time_becomes_the_figure_of_the_metric(name, figure):
    workload = WORKLOADS[name]
    assert workload.figure(Timing(2.0, 10.0)) == pytest.approx(figure)
    twice_as_good = figure / 2 if UNITS[workload.metric] == "s" else figure * 2
    assert workload.share(figure, twice_as_good) == pytest.approx(0.5)


def test_scaling_makes_everything_less_and_nothing_none():
    for workload in WORKLOADS.values():
        small = workload.scaled(0.01)
        assert workload.scaled(1) is workload
        assert 1 <= small.requests <= workload.requests
        assert 8 <= small.prompt_tokens <= workload.prompt_tokens
        assert (small.images > 0, small.seconds > 0) == (workload.images > 0, workload.seconds > 0)
        assert min(small.size) >= 32
        assert (small.answer_tokens > 1) == (workload.answer_tokens > 1)
        assert str(small.requests) in small.says


def test_the_names_are_the_known_ones():
    assert {"decode-1", "decode-64", "decode-256", "prefill", "describe-1", "describe-8", "describe-64"} <= set(NAMES)
    assert {"pages", "transcribe", "mixed", "start"} <= set(NAMES)
