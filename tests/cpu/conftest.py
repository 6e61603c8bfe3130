"""What the tests of the engine share: a tiny model in fp32 with varied answers, and loops stepped by hand."""

import pytest

from tests.scenes import Stage, alone, lively_model, mixed_requests, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def stage(model, tokenizer):
    """Make a loop with room for all; pages and pins as given."""

    def make(pages=128, rows=8, **settings):
        return Stage(model, tokenizer, pages, rows=rows, **settings)

    return make


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """The ids of each mixed request's answer, alone."""
    return [result.ids for result in alone(model, tokenizer, mixed_requests())]
