"""Arguments that could be read as something else are taken as they are meant, or refused."""

import pickle
from dataclasses import asdict, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from memphi.errors import RequestError
from memphi.inputs.media import image_media
from memphi.request import Footprint, InputMode, Request, SamplingParams

IMAGE = image_media(np.zeros((4, 6, 3), np.uint8))


@pytest.mark.parametrize("attachments", [IMAGE, [IMAGE], iter([IMAGE])])
def test_a_lone_attachment_needs_no_list(attachments):
    assert Request.ask("What is it?", attachments).media == (IMAGE,)


@pytest.mark.parametrize("attachments", [["a.png"], "a.png", [IMAGE, Path("a.png")], [b"bytes"]])
def test_an_attachment_that_was_not_opened_is_refused(attachments):
    with pytest.raises(RequestError, match=r"an attachment is what open_media returns, not (str|PosixPath|bytes)"):
        Request.ask("What is it?", attachments)


def test_a_lone_stop_string_is_refused():
    with pytest.raises(RequestError, match=r"as in stop=\('me',\)"):
        SamplingParams(stop="me")


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1.0},
        {"top_k": 5.0},
        {"top_logprobs": 2.0},
        {"max_tokens": 8.0},
        {"logit_bias": ((1.0, 5.0),)},
        {"logit_bias": {1: 5.0}},
        {"logit_bias": (1, 5.0)},
        {"stop": (13,)},
        {"stop": ("a", b"b")},
        {"stop": None},
        {"seed": None},
        {"logit_bias": None},
        {"logit_bias": ((1, "5"),)},
        {"temperature": None},
        {"top_p": "0.5"},
        {"temperature": Decimal("0.5")},
        {"grammar": "abc"},
    ],
)
def test_what_is_no_whole_number_or_no_text_is_refused(wrong):
    with pytest.raises(RequestError, match=r"must be (whole |)(numbers|a tuple of strings|pairs of an id|a Grammar)"):
        SamplingParams(**wrong)


def test_whole_numbers_of_numpy_are_whole_numbers():
    sampling = SamplingParams(
        seed=np.int64(3), top_k=np.int32(2), logit_bias=((np.int64(5), 1),), temperature=Fraction(1, 2)
    )
    assert (sampling.seed, sampling.top_k) == (3, 2)
    kept = sampling.seed, sampling.top_k, sampling.temperature, *sampling.logit_bias[0]
    assert [type(number) for number in kept] == [int, int, float, int, float]


def test_how_to_sample_is_sampling_params():
    with pytest.raises(RequestError, match="sampling must be SamplingParams"):
        Request.ask("Hello", sampling={"seed": 3})


def test_a_footprint_that_was_asked_for_its_tokens_is_the_same_as_before():
    asked, fresh = (Footprint(InputMode.TEXT, 5, (), ()) for _ in range(2))
    assert asked.prompt_tokens == 5
    assert (asked, hash(asked), repr(asked), asdict(asked)) == (fresh, hash(fresh), repr(fresh), asdict(fresh))
    assert pickle.loads(pickle.dumps(asked)) == fresh
    assert replace(asked, text_tokens=7).prompt_tokens == 7
