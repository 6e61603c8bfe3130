"""JSON bodies that are refused before their fields are looked at."""

import pytest

from tests.server.conftest import refused


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "tokenize"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model": "demo"', "is not JSON: Expecting"),
        (b'{"model": "\xff"}', "is not JSON: its bytes are not UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "holds a whole number of thousands of digits"),
        (b'{"model": "demo", "n": 1, "model": "other"}', "has 'model' twice in one object; send it once"),
        (b'{"messages": [{"role": "user", "content": "Hi", "content": "Ho"}]}', "has 'content' twice in one object"),
    ],
    ids=["cut", "latin", "deep", "digits", "twice", "inside"],
)
def test_what_is_no_json_or_would_not_all_be_read(client, fake, path, content, words):
    answer = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 400).startswith(f"the body {words}")
    assert answer.json()["error"]["code"] == "invalid_json"
    assert not fake.requests


def test_a_key_may_stand_in_one_object_after_another(client):
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]
    assert client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
