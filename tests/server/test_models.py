"""What models there are, and what a request would cost."""

import dataclasses

import pytest
from starlette.testclient import TestClient

from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.server.conftest import ask, data_uri, refused, sample


def test_the_one_model_and_what_it_can_do(client, fake):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("demo", "model", "memphi")
    assert model["memphi"] == {
        "input_modes": ["text", "image", "audio", "image+audio"],
        "context_tokens": fake.plan.context_tokens,
        "answers_at_once": fake.plan.rows,
    }
    assert client.get("/v1/models/demo").json() == model
    assert "no model 'other'" in refused(client.get("/v1/models/other"), 404, "model")


def test_a_merged_adapter_leaves_the_modes_that_use_it(fake):
    fake.worker.bounds = dataclasses.replace(fake.bounds, merged="vision")
    with TestClient(make_app(fake, ServerSettings("a/b")), base_url="http://localhost") as client:
        assert client.get("/v1/models/a/b").json()["memphi"]["input_modes"] == ["image", "image+audio"]


def tokenize(client, **body):
    return client.post("/v1/tokenize", json={"model": "demo", **body})


def test_the_price_is_that_of_the_answer(client, fake):
    content = [{"type": "image_url", "image_url": {"url": data_uri(sample("wide.png"))}}, {"type": "text", "text": "x"}]
    messages = [{"role": "user", "content": content}]
    price = tokenize(client, messages=messages, user="u").json()
    assert not fake.requests, "nothing is run"
    answer = ask(client, messages=messages).json()
    assert {name: price[name] for name in answer["memphi"]["price"]} == answer["memphi"]["price"]
    assert price["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    (image,) = price["attachments"]
    assert (image["kind"], image["tokens"], image["crops"]) == ("image", price["image_tokens"], price["crops"])
    assert price["ignored"] == ["user"]
    assert price["context_tokens"] == fake.bounds.tokens


def test_the_price_of_a_plain_prompt(client):
    assert tokenize(client, prompt=["ab", "c"]).json()["prompt_tokens"] == 3


def test_a_price_may_be_asked_while_the_queue_is_full(client):
    service = client.app.state.service
    with service.places(service.rows + service.settings.limits.queue):
        assert tokenize(client, prompt="ab").status_code == 200
        assert refused(ask(client), 429)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": [], "foo": 1}, 400, "messages"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x" * 40_000}, 413, "prompt"),
    ],
)
def test_what_cannot_be_run_has_no_price(client, body, status, param):
    assert refused(tokenize(client, **body), status, param)


def test_what_memory_would_change_is_told(client, fake):
    content = [{"type": "image_url", "image_url": {"url": data_uri(sample("wide.png"))}}]
    messages = [{"role": "user", "content": content * 3}]
    whole = tokenize(client, messages=messages).json()
    fake.worker.bounds = dataclasses.replace(fake.bounds, tokens=whole["prompt_tokens"] // 2)
    told = tokenize(client, messages=messages, memphi={"on_pressure": "one-by-one"}).json()
    assert "answered one by one" in told["degraded"][0]
    assert len(told["degraded"]) == 1
    assert told["image_tokens"] == whole["image_tokens"]
    assert refused(tokenize(client, messages=messages), 413)
