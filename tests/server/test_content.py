"""What clients send becomes memphi's messages; whatever is wrong with an attachment is told with its place."""

import base64
import dataclasses

import pytest
from starlette.testclient import TestClient

from memphi.errors import MediaError
from memphi.request import Media
from memphi.server.app import make_app
from memphi.server.settings import Limits, ServerSettings
from tests.server.conftest import ask, data_uri, refused, sample

PNG, WAV = sample("first.png"), sample("question.wav")


def image(url=None, **fields):
    return {"type": "image_url", "image_url": {"url": data_uri(PNG) if url is None else url, **fields}}


def audio(content=WAV, form="wav"):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": form}}


def text(words):
    return {"type": "text", "text": words}


def serving(engine, **fields):
    return TestClient(make_app(engine, ServerSettings("demo", **fields)), base_url="http://localhost")


def content_of(client, fake, content, **fields):
    answer = ask(client, content, **fields)
    assert answer.status_code == 200, answer.text
    return fake.requests[-1].messages[-1].content


def test_attachments_stand_where_they_were_put(client, fake):
    content = content_of(client, fake, [text("a"), image(), text("b"), text("c"), audio(), image()])
    assert [part if isinstance(part, str) else part.name for part in content] == [
        "a",
        "image 1",
        "b\nc",
        "audio 1",
        "image 2",
    ]
    assert [part.content for part in content if isinstance(part, Media)] == [PNG, WAV, PNG]
    assert [part.kind for part in content if isinstance(part, Media)] == ["image", "audio", "image"]


def test_a_conversation_with_attachments_in_its_history(client, fake):
    messages = [
        {"role": "system", "content": [text("Be"), text("brief.")]},
        {"role": "user", "content": [image(), text("What is it?")]},
        {"role": "assistant", "content": [text("A number."), {"type": "refusal", "refusal": "No more."}]},
        {"role": "user", "content": [image(), text("And this?")]},
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "user", "content": "Why?"},
    ]
    answer = ask(client, messages=messages)
    assert answer.status_code == 200
    got = fake.requests[0].messages
    assert [message.role for message in got] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [message.content[-1] for message in got] == [
        "Be\nbrief.",
        "What is it?",
        "A number.\nNo more.",
        "And this?",
        "I cannot.",
        "Why?",
    ]
    assert [media.name for media in fake.requests[0].media] == ["image 1", "image 2"]
    assert answer.json()["memphi"]["price"]["image_tokens"] > 0


def test_an_answer_can_be_sent_back_as_it_came(client):
    first = ask(client).json()["choices"][0]["message"]
    messages = [{"role": "user", "content": "Hello"}, {**first, "annotations": []}, {"role": "user", "content": "More"}]
    assert ask(client, messages=messages).json()["memphi"]["ignored"] == ["messages[1].annotations"]


@pytest.mark.parametrize(
    ("part", "fields", "detail"),
    [
        (image(), {}, "auto"),
        (image(detail="low"), {}, "low"),
        (image(detail="high"), {"memphi": {"detail": "low"}}, "high"),
        (image(), {"memphi": {"detail": "low"}}, "low"),
        (image(), {"memphi": {"detail": 4}}, 4),
    ],
)
def test_how_finely_an_image_is_seen(client, fake, part, fields, detail):
    content = content_of(client, fake, [part], **fields)
    assert content[0].detail == detail


def test_low_detail_costs_less(client):
    prices = [
        ask(client, [image(data_uri(sample("wide.png")), detail=detail)]).json()["memphi"]["price"]
        for detail in ("low", "high")
    ]
    assert prices[0]["image_tokens"] < prices[1]["image_tokens"]
    assert prices[0]["crops"] < prices[1]["crops"]
    assert prices[0]["pages"] < prices[1]["pages"]


def test_sound_may_be_a_data_uri_in_any_format_name(client, fake):
    part = {"type": "input_audio", "input_audio": {"data": data_uri(WAV, "audio/wav")}}
    assert content_of(client, fake, [part])[0].content == WAV
    assert ask(client, [audio(form="mp3")]).json()["memphi"]["ignored"] == ["messages[0].content[0].input_audio.format"]


URL, DATA = "messages[0].content[0].image_url.url", "messages[0].content[0].input_audio.data"


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        (image("data:image/png;base64,!!!"), URL, "damaged base64"),
        (image("data:image/png"), URL, "not a data URI"),
        (image("data:image/png;base64,"), URL, "is empty"),
        (image(data_uri(b"hello")), URL, "neither a picture nor a sound"),
        (image(data_uri(b"%PDF-1.7")), URL, "PDF"),
        (image(data_uri(WAV)), URL, "holds no image but sound"),
        (image(data_uri(PNG[:40])), URL, "image 1"),
        (image("https://example.org/x.png"), URL, "fetches no URLs"),
        (image("file:///etc/passwd"), URL, "fetches no URLs"),
        (image("/etc/passwd"), URL, "fetches no URLs"),
        (image(""), URL, "fetches no URLs"),
        ({"type": "image_url", "image_url": data_uri(PNG)}, "messages[0].content[0].image_url", "dictionary"),
        (image(detail="fine"), "messages[0].content[0].image_url.detail", "'low', 'auto' or 'high'"),
        (audio(b"hello"), DATA, "neither a picture nor a sound"),
        (audio(PNG), DATA, "holds no audio but an image"),
        (audio(b"RIFF\x04\x00\x00\x00WAVE"), DATA, "audio 1"),
        ({"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}, DATA, "damaged base64"),
        ({"type": "input_audio", "input_audio": {"data": "/etc/passwd"}}, DATA, "audio"),
    ],
)
def test_wrong_attachments_are_told_with_their_place(client, fake, part, param, words):
    assert words in refused(ask(client, [part]), 400, param)
    assert not fake.requests


def test_limits_hold_before_anything_is_decoded(fake):
    with serving(fake, limits=Limits(images=1, pixels=1000, audio_seconds=0.5)) as client:
        second = "messages[0].content[1].image_url.url"
        assert "one image too many" in refused(ask(client, [image(), image()]), 400, second)
        assert "pixels" in refused(ask(client, [image()]), 400, URL)
        assert "0.5 seconds" in refused(ask(client, [audio()]), 400, DATA)
    assert not fake.requests


def test_images_are_fetched_where_that_is_allowed(fake):
    class Fetcher:
        async def fetch(self, urls):
            asked.extend(urls)
            return {url: PNG if "good" in url else MediaError("did not arrive") for url in urls}

    asked = []
    with serving(fake, allow_urls=("example.org",)) as client:
        client.app.state.service._fetcher = Fetcher()
        content = content_of(client, fake, [image("https://example.org/good.png"), image()])
        assert [part.content for part in content] == [PNG, PNG]
        answer = ask(client, [image(), image("https://example.org/bad.png")])
        assert "did not arrive" in refused(answer, 400, "messages[0].content[1].image_url.url")
    assert asked == ["https://example.org/good.png", "https://example.org/bad.png"]


def test_what_is_logged_holds_no_attachments(fake, caplog):
    caplog.set_level("INFO", "memphi.server")
    with serving(fake) as client:
        ask(client, [image(), text("a secret")])
    assert "a secret" not in caplog.text
    with serving(fake, log_requests=True) as client:
        ask(client, [image(), text("a secret")])
    assert "a secret" in caplog.text
    assert "It is a fake." in caplog.text
    assert "\\x89PNG" not in caplog.text


def test_media_of_equal_content_are_equal_to_the_cache(client, fake):
    first, second = content_of(client, fake, [image(), image()])
    assert dataclasses.replace(first, name="") == dataclasses.replace(second, name="")
