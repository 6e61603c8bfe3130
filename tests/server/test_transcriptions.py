"""Recordings become text: long ones in pieces and in order, and each field is used or refused by name."""

import asyncio
import functools
import io
import json
import threading
import wave
from contextlib import aclosing

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from memphi.errors import DoesNotFitError, MediaError
from memphi.inputs.media import audio_media, open_media
from memphi.inputs.segments import cut_recording
from memphi.request import Delta, FinishReason, Request, TokenLogprob
from memphi.server import recordings
from memphi.server.app import make_app
from memphi.server.recordings import Recording, open_recording
from memphi.server.service import Service
from memphi.server.settings import Limits, ServerSettings
from tests.server.conftest import asked, listening, refused, sample, wait_for
from tests.server.fakes import FakeEngine, said

RATE = 16_000
CARD_PROMPT = "Transcribe the audio clip into text."
SETTINGS = ServerSettings("demo")


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def noise(seconds):
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


def wav(*parts):
    """A file of these samples one after another."""
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(RATE)
        output.writeframes((np.concatenate(parts) * 32767).astype("<i2").tobytes())
    return file.getvalue()


SHORT = wav(noise(2))
LONG = wav(*[part for _ in range(8) for part in (noise(12), silence(1))])
"""Of eight sentences; two fit into a segment."""


def serving(engine, settings=SETTINGS):
    return TestClient(make_app(engine, settings), base_url="http://localhost")


def post(client, content=SHORT, path="transcriptions", **fields):
    files = {"file": ("talk.wav", content)}
    return client.post(f"/v1/audio/{path}", files=files, data={"model": "demo", **fields})


def data(answer):
    """What each event of a stream says."""
    return [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]


def events(answer):
    """The events of a stream that has ended well."""
    *told, last = data(answer)
    assert last == "[DONE]"
    return [json.loads(each) for each in told]


def counting(request):
    """An answer that tells how long the segment is."""
    return said(f" {len(request.media[0].content.values)} samples. ")


def heard(fake):
    """The samples that the engine was given, in the order in which it was."""
    return [request.media[0].content.values for request in fake.requests]


# --- what is said ------------------------------------------------------------------------------------------------


def test_a_short_recording_is_one_request_in_the_cards_words(client, fake):
    answer = post(client)
    assert answer.status_code == 200
    assert answer.json()["text"] == "It is a fake."
    (request,) = fake.requests
    assert request.messages[0].content[1:] == (CARD_PROMPT,)
    assert request.sampling.temperature == 0
    assert request.sampling.max_tokens == 2 * 25 + 32
    np.testing.assert_array_equal(heard(fake)[0], next(cut_recording(open_media(SHORT))).samples.values)
    usage = answer.json()["usage"]
    footprint = fake.measure(request)
    assert usage["input_token_details"] == {"text_tokens": footprint.text_tokens, "audio_tokens": 25}
    assert usage["total_tokens"] == footprint.prompt_tokens + 3
    assert answer.json()["memphi"]["price"]["prompt_tokens"] == footprint.prompt_tokens


def test_a_translation_asks_for_english(client, fake):
    answer = post(client, path="translations", response_format="verbose_json")
    assert answer.json()["language"] == "english"
    assert answer.json()["task"] == "translate"
    assert fake.requests[0].messages[0].content[1:] == ("Translate the audio to English.",)


def test_what_the_client_knows_stands_behind_the_cards_words(client, fake):
    post(client, prompt=" A talk by Dr. Müller. ", **{"keywords[]": ["Grüezi", "Znüni"]}, temperature="0.5")
    (request,) = fake.requests
    assert request.messages[0].content[1] == (
        f"{CARD_PROMPT} Context, for names and spelling: A talk by Dr. Müller. These words may be said: Grüezi, Znüni"
    )
    assert request.sampling.temperature == 0.5


def test_a_long_recording_is_heard_in_pieces_and_told_as_one(client, fake):
    fake.worker.say = counting
    answer = post(client, LONG, response_format="verbose_json").json()
    pieces = heard(fake)
    assert len(pieces) == 4
    np.testing.assert_array_equal(
        np.concatenate(pieces), np.concatenate([s.samples.values for s in cut_recording(open_media(LONG))])
    )
    texts = [f"{len(piece)} samples." for piece in pieces]
    assert answer["text"] == " ".join(texts)
    assert [segment["text"] for segment in answer["segments"]] == texts
    edges = np.cumsum([0, *map(len, pieces)]) / RATE
    assert [segment["start"] for segment in answer["segments"]] == pytest.approx(edges[:-1], abs=1e-3)
    assert [segment["end"] for segment in answer["segments"]] == pytest.approx(edges[1:], abs=1e-3)
    assert answer["duration"] == 104.0
    assert "times of segments are those of the cuts" in answer["memphi"]["notes"][0]
    assert answer["memphi"]["segments"] == 4


def test_silence_is_not_asked_about(client, fake):
    answer = post(client, wav(noise(5), silence(90), noise(5)), response_format="verbose_json").json()
    silences = answer["memphi"]["silences"]
    assert len(silences) >= 2
    assert len(answer["segments"]) == len(fake.requests) == answer["memphi"]["segments"]
    covered = [(segment["start"], segment["end"]) for segment in answer["segments"]] + [
        tuple(each) for each in silences
    ]
    assert sum(end - start for start, end in covered) == pytest.approx(100)
    fake.requests.clear()
    assert post(client, wav(silence(3))).json()["text"] == ""
    assert fake.requests == []


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("json", '{"text":"It is a fake."'),
        ("text", "It is a fake.\n"),
        ("verbose_json", '{"task":"transcribe"'),
        ("srt", "1\n00:00:00,000 --> 00:00:02,000\nIt is a fake.\n"),
        ("vtt", "WEBVTT\n\nNOTE times of segments"),
    ],
)
def test_formats(client, form, begins):
    answer = post(client, response_format=form)
    assert answer.text.startswith(begins)
    assert answer.headers["content-type"].startswith("application/json" if "json" in form else "text/plain")


@pytest.mark.parametrize(
    ("fields", "language"),
    [
        ({}, "unknown"),
        ({"language": "de"}, "german"),
        ({"language": "pt-BR"}, "portuguese"),
        ({"languages[]": ["en", "en"]}, "english"),
        ({"languages[]": ["en", "fr"]}, "unknown"),
    ],
)
def test_the_language_is_told_where_the_client_knows_it(client, fake, fields, language):
    told = post(client, response_format="verbose_json", **fields).json()
    assert (told["language"], told["memphi"]["ignored"]) == (language, [])
    assert post(client, **fields).json()["memphi"]["ignored"] == list(fields)  # Which json has no place for.
    assert fake.requests[0].messages[0].content[1] == CARD_PROMPT


def test_an_answer_without_end_is_cut_and_said_to_be(client, fake):
    fake.worker.say = lambda request: said("la la la", FinishReason.LENGTH)
    assert post(client).json()["memphi"]["cut_short"] == [0]


def test_a_stream_brings_the_same_in_pieces(client, fake):
    fake.worker.say = counting
    whole = post(client, LONG).json()
    answer = post(client, LONG, stream="true")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(answer)
    assert len(deltas) > 4
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in deltas) == done["text"] == whole["text"]
    assert done["type"] == "transcript.text.done"
    assert done["usage"] == whole["usage"]
    assert all(event["delta"] for event in deltas)


def test_a_stream_of_silence_is_done_at_once(client):
    (done,) = events(post(client, wav(silence(3)), stream="true"))
    assert (done["type"], done["text"], done["usage"]["total_tokens"]) == ("transcript.text.done", "", 0)


def test_how_likely_tokens_were_is_told_where_asked_for(client, fake):
    ids = (*fake.tokenizer.encode_text("Hi"), fake.tokenizer.end_id)
    likely = tuple(TokenLogprob(token, -0.5) for token in ids)

    def say(request):
        asked = request.sampling.top_logprobs is not None
        return [Delta("Hi", ids, FinishReason.STOP, (), likely if asked else ())]

    fake.worker.say = say
    whole = post(client, **{"include[]": ["logprobs"]}).json()["logprobs"]
    assert [(each["token"], each["bytes"]) for each in whole] == [("H", [72]), ("i", [105])]
    assert all(each["logprob"] == -0.5 for each in whole)
    delta, done = events(post(client, stream="true", **{"include[]": ["logprobs"]}))
    assert delta["logprobs"] == done["logprobs"] == whole
    (segment,) = post(client, response_format="verbose_json").json()["segments"]
    assert segment["avg_logprob"] == -0.5
    assert [request.sampling.top_logprobs for request in fake.requests] == [0, 0, 0]
    assert "logprobs" not in post(client).json()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"language": "tlh"}, "language", "en (English), zh (Chinese), de (German), fr (French), it (Italian)"),
        ({"languages[]": ["en", "xx"]}, "languages[][1]", "not 'xx'"),
        ({"response_format": "diarized_json"}, "response_format", "'verbose_json'"),
        ({"temperature": "2"}, "temperature", "less than or equal to 1"),
        ({"timestamp_granularities[]": ["word"]}, "timestamp_granularities[]", "no times of words; ask for segment"),
        ({"timestamp_granularities[]": ["segment"]}, "timestamp_granularities[]", "verbose_json"),
        ({"include[]": ["logprobs"], "response_format": "text"}, "include[]", "response_format json only"),
        ({"include[]": ["speakers"]}, "include[][0]", "'logprobs'"),
        ({"stream": "true", "response_format": "srt"}, "stream", "only response_format json can be streamed, not srt"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy", "'auto'"),
        ({"known_speaker_names[]": ["Ann"]}, "known_speaker_names[]", "is not supported"),
        ({"known_speaker_references[]": ["data:"]}, "known_speaker_references[]", "is not supported"),
        ({"seed": "1"}, "seed", "is no field that memphi knows"),
    ],
)
def test_fields_are_refused_by_name(client, fake, fields, param, reason):
    answer = post(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert reason in error["message"]
    assert fake.requests == []


NAMES = [
    *("model", "prompt", "response_format", "temperature", "language", "languages[]", "keywords[]", "stream", "user"),
    *("include[]", "timestamp_granularities[]", "chunking_strategy", "known_speaker_names[]"),
]
WORDS = ["demo", "json", "srt", "vtt", "text", "verbose_json", "true", "0.3", "en", "logprobs", "segment", "auto", ""]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["transcriptions", "translations"]),
    st.dictionaries(st.sampled_from(NAMES), st.lists(st.sampled_from(WORDS) | st.text(max_size=9), max_size=2)),
)
def test_whatever_stands_in_the_fields_is_used_or_refused(path, fields):
    with serving(FakeEngine()) as client:
        answer = post(client, path=path, **fields)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code != 200:
        assert any(answer.json()["error"]["param"].startswith(name) for name in fields)


@pytest.mark.parametrize("field", ["language", "stream", "include[]", "timestamp_granularities[]"])
def test_a_translation_takes_less(client, field):
    assert post(client, path="translations", **{field: "en"}).json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello", "is neither a picture nor a sound"),
        (sample("number.png"), "is a picture, not a sound"),
        (SHORT[:100], "is shorter than 25 ms"),
        (wav(noise(31)), "is longer than 30 seconds"),
    ],
    ids=["empty", "text", "picture", "scrap", "long"],
)
def test_recordings_are_refused_before_they_are_heard(fake, content, reason):
    with serving(fake, ServerSettings("demo", limits=Limits(audio_seconds=30))) as client:
        answer = post(client, content)
    error = answer.json()["error"]
    assert error["message"].startswith(f"talk.wav: {reason}")
    assert (answer.status_code, error["param"], fake.requests) == (400, "file", [])


def test_uploads_have_a_limit(fake):
    with serving(fake, ServerSettings("demo", limits=Limits(recording_bytes=len(SHORT)))) as client:
        answer = post(client, SHORT)  # The form around it counts too.
        assert "compress them: sound as FLAC, OGG or MP3" in refused(answer, 413)
        assert post(client, SHORT[:-1000]).status_code == 200


def test_uploads_may_be_larger_than_other_bodies(fake):
    path = "/v1/audio/transcriptions"
    with serving(fake, ServerSettings("demo", limits=Limits(body_bytes=len(SHORT) // 2))) as client:
        assert post(client, SHORT).status_code == 200
        refused(client.post(path, data={"prompt": "x" * len(SHORT)}), 413)
        refused(client.post("/v1/chat/completions", files={"file": ("a.wav", SHORT)}), 413)
    limits = Limits()
    assert limits.recording_bytes > limits.audio_seconds * 16_000 * 2 + (1 << 20)


def test_what_is_no_file_is_refused(client):
    for fields in ({}, {"file": "text"}):
        answer = client.post("/v1/audio/transcriptions", data={"model": "demo", **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


@pytest.mark.parametrize("path", ["transcriptions", "translations"])
@pytest.mark.parametrize("name", ["file", "response_format"])
def test_a_field_that_is_there_twice_is_refused(client, fake, path, name):
    parts = {"file": ("talk.wav", SHORT), "response_format": (None, "json")}
    answer = client.post(f"/v1/audio/{path}", files=[*parts.items(), (name, parts[name])])
    assert refused(answer, 400, name) == f"{name} is there twice; send it once"
    assert not fake.requests


def test_another_model_is_not_there(client):
    answer = client.post("/v1/audio/transcriptions", files={"file": ("a.wav", SHORT)}, data={"model": "whisper-1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


def test_a_full_queue_is_told_before_a_stream_begins(client):
    service = client.app.state.service
    with service.places(service.rows + service.settings.limits.queue):
        for fields in ({}, {"stream": "true"}):
            answer = post(client, **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert "retry-after" in answer.headers
    assert post(client).status_code == 200


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize(
    ("ending", "status"),
    [(DoesNotFitError("there is no room"), 413), (Delta("", (), FinishReason.CANCELLED), 503)],
)
def test_a_segment_that_fails_ends_all(client, fake, stream, ending, status):
    """The third of four: what was told before stays told, and then comes the error."""
    fake.worker.say = lambda request: [ending] if len(fake.requests) == 3 else said("Well")
    answer = post(client, LONG, stream=stream)
    if stream == "false":
        assert answer.status_code == status
    else:
        *told, last = map(json.loads, data(answer))
        assert "".join(event["delta"] for event in told) == "Well Well"
        assert last["error"]["type"] in ("invalid_request_error", "server_error")
    assert client.app.state.service.open_answers == 0


# --- several at once ---------------------------------------------------------------------------------------------


class LateEngine(FakeEngine):
    """Answers only once so many requests are there, the last one first."""

    def __init__(self, together):
        super().__init__(counting)
        self._together, self._waiting = together, []
        self._answer, self.worker.submit = self.worker.submit, self._wait

    def _wait(self, submission, mailbox):
        self._waiting.append((submission, mailbox))
        if len(self._waiting) == self._together:
            while self._waiting:
                self._answer(*self._waiting.pop())


def test_segments_run_at_once_and_are_told_in_order():
    engine = LateEngine(4)
    with serving(engine) as client:
        answer = post(client, LONG).json()
        *_, done = events(post(client, LONG, stream="true"))
    lengths = [len(s.samples.values) for s in cut_recording(open_media(LONG))]
    assert answer["text"] == done["text"] == " ".join(f"{length} samples." for length in lengths)
    assert list(map(len, heard(engine))) == lengths[::-1] * 2


def ask(media, seconds):
    return Request.ask(CARD_PROMPT, (media,))


def test_one_recording_leaves_rows_for_others(monkeypatch):
    """It runs as many segments as it may, no more; once nobody listens, all of them end."""
    full = asyncio.Event()

    class Places(asyncio.Semaphore):
        async def acquire(self):
            if self.locked():
                full.set()
            return await super().acquire()

    monkeypatch.setattr(asyncio, "Semaphore", Places)

    async def listen():
        engine = FakeEngine(lambda request: [Delta("on", (1,))])
        service = Service(engine, SETTINGS)
        recording = await open_recording(service, open_media(wav(*[noise(30)] * 20)), ask)
        most = engine.plan.rows // 2
        assert 1 <= most < 20
        async with aclosing(recording.pieces()) as pieces:
            assert (await anext(pieces))[0] == "on"
            await asyncio.wait_for(full.wait(), 30)
            assert (len(engine.requests), service.open_answers) == (most, most)
            assert engine.worker.cancelled == []
        assert sorted(engine.worker.cancelled) == list(range(most))
        assert service.open_answers == 0

    asyncio.run(listen())


@pytest.mark.parametrize("step", ["measure", "cut"])
def test_recordings_that_take_long_keep_no_other_work_waiting(monkeypatch, step):
    go_on = threading.Event()

    def cut(media, limits):
        assert go_on.wait(60)
        yield from ()

    def measure(media, limits):
        assert step == "cut" or go_on.wait(60)
        return 1.0

    monkeypatch.setattr(recordings, "measure_recording", measure)
    monkeypatch.setattr(recordings, "cut_recording", cut)
    service = Service(FakeEngine(), ServerSettings("demo", limits=Limits(queue=1000)))

    async def hear():
        return (await (await open_recording(service, open_media(SHORT), ask)).hear()).text

    async def run():
        hanging = [asyncio.create_task(hear()) for _ in range(100)]
        try:
            async with asyncio.timeout(30):
                for _ in range(100):
                    await asyncio.sleep(0)
                assert await asyncio.to_thread(lambda: "done") == "done"
        finally:
            go_on.set()
        assert await asyncio.gather(*hanging) == [""] * 100

    asyncio.run(run())


def test_a_defect_ends_the_recording_and_hangs_nobody():
    def fail(request):
        raise ZeroDivisionError

    async def listen(media, say):
        service = Service(FakeEngine(say), SETTINGS)
        async with asyncio.timeout(30):
            await Recording(service, media, 2.0, ask, 0.0).hear()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(listen(open_media(SHORT), fail))
    with pytest.raises(MediaError, match="has 1 samples a second"):
        asyncio.run(listen(audio_media(noise(1), 1), counting))


def test_a_server_that_drains_finishes_what_it_has_begun(client, fake):
    """It drains from the first segment on; the others follow, and the next recording is refused."""
    service = client.app.state.service

    def drain(request):
        service.draining = True
        return said("Well")

    fake.worker.say = drain
    assert post(client, LONG).json()["text"] == "Well Well Well Well"
    for fields in ({}, {"stream": "true"}):
        answer = post(client, **fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_draining")
        assert "retry-after" in answer.headers


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_leaves_ends_all_its_segments(stream):
    engine = FakeEngine(lambda request: [Delta("on", (1,))])
    app = make_app(engine, SETTINGS)
    form = {"files": {"file": ("talk.wav", LONG)}, "data": {"stream": stream}}
    with listening(app) as url:
        with asked(url, "/v1/audio/transcriptions", **form):
            wait_for(lambda: len(engine.requests) == 4)
        wait_for(lambda: app.state.service.open_answers == 0)
        assert sorted(engine.worker.cancelled) == [0, 1, 2, 3]


# --- the openai client and the demo model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talk():
    """Spoken words with silences between, over more than one segment."""
    question, words = (
        next(cut_recording(open_media(sample(f"{name}.wav")))).samples.values for name in ("question", "words")
    )
    generator = np.random.default_rng(0)
    parts = [part for n in range(8) for part in (question if n % 3 == 1 else words, silence(generator.uniform(2, 4)))]
    return wav(*parts)


@pytest.fixture(scope="module")
def alone(engine, talk):
    """What the model answers to each segment alone, by instruction; and the segments."""
    segments = list(cut_recording(open_media(talk)))
    assert len(segments) >= 2

    @functools.cache
    def answer(instruction):
        media = [audio_media(segment.samples.values, segment.samples.rate) for segment in segments]
        return [engine.generate(Request.ask(instruction, (each,))).text.strip() for each in media]

    return answer, segments


@pytest.fixture
def openai_client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


def test_the_clients_transcription_is_that_of_the_pieces(openai_client, talk, alone):
    answer, segments = alone
    texts = answer(CARD_PROMPT)
    assert all(texts)
    create = openai_client.audio.transcriptions.create
    file = ("talk.wav", talk)
    told = create(file=file, model="demo")
    assert told.text == " ".join(texts)
    assert told.usage.type == "tokens"
    assert told.usage.output_tokens > sum(map(len, texts))  # The demo's tokens are bytes.
    assert create(file=file, model="demo", response_format="text") == " ".join(texts) + "\n"
    verbose = create(
        file=file, model="demo", response_format="verbose_json", timestamp_granularities=["segment"], language="en"
    )
    assert (verbose.language, verbose.text) == ("english", " ".join(texts))
    assert [segment.text for segment in verbose.segments] == texts
    assert all(-1 < segment.avg_logprob < 0 for segment in verbose.segments)
    assert [segment.start for segment in verbose.segments] == pytest.approx(
        [s.start_seconds for s in segments], abs=1e-3
    )
    for form in ("srt", "vtt"):
        subtitles = create(file=file, model="demo", response_format=form)
        assert [line for line in subtitles.splitlines() if line in texts] == texts
        assert subtitles.count("-->") == len(texts)


def test_the_clients_stream_brings_the_same(openai_client, talk, alone):
    answer, segments = alone
    create = openai_client.audio.transcriptions.create
    with create(file=("talk.wav", talk), model="demo", stream=True, include=["logprobs"]) as stream:
        *deltas, done = list(stream)
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == " ".join(answer(CARD_PROMPT))
    assert (
        sum(len(event.logprobs) for event in deltas) == len(done.logprobs) == done.usage.output_tokens - len(segments)
    )
    assert all(each.logprob <= 0 for each in done.logprobs)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_the_clients_translation(openai_client, talk, alone):
    answer, _ = alone
    create = openai_client.audio.translations.create
    text = " ".join(answer("Translate the audio to English."))
    assert create(file=("talk.wav", talk), model="demo").text == text
    assert create(file=("talk.wav", talk), model="demo", response_format="verbose_json").language == "english"


def test_two_asynchronous_clients_at_once(url, talk, alone):
    async def transcribe():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            create = client.audio.transcriptions.create
            whole, stream = await asyncio.gather(
                create(file=("talk.wav", talk), model="demo"),
                create(file=("talk.wav", talk), model="demo", stream=True),
            )
            return whole.text, [event async for event in stream][-1].text

    text = " ".join(alone[0](CARD_PROMPT))
    assert asyncio.run(transcribe()) == (text, text)


def test_the_client_is_told_what_is_wrong(openai_client):
    create = openai_client.audio.transcriptions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(file=("talk.wav", SHORT), model="demo", timestamp_granularities=["word"], response_format="verbose_json")
    assert refused.value.param == "timestamp_granularities[]"
    with pytest.raises(openai.NotFoundError):
        create(file=("talk.wav", SHORT), model="whisper-1")
