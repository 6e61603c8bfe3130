"""POST /v1/audio/transcriptions and /v1/audio/translations: what is said in a recording, as text or subtitles."""

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Form, UploadFile
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from starlette.datastructures import UploadFile as Upload
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from memphi.errors import MediaError
from memphi.inputs.media import open_media
from memphi.request import Media, Request, SamplingParams, TokenLogprob
from memphi.server import transcripts
from memphi.server.answers import unless_left
from memphi.server.errors import ApiError
from memphi.server.fields import Fields
from memphi.server.recordings import Ask, Recording, open_recording
from memphi.server.service import Service, service_of
from memphi.server.stream import Chunk, event_stream, json_response

LANGUAGES = {
    "en": "English",
    "zh": "Chinese",
    "de": "German",
    "fr": "French",
    "it": "Italian",
    "ja": "Japanese",
    "es": "Spanish",
    "pt": "Portuguese",
}
"""What the model was trained to hear, by its card."""
TOKENS_PER_SECOND, SPARE_TOKENS = 25, 32
"""Nobody says more; a model that repeats itself for ever is stopped here."""

router = APIRouter()


def _check_language(code: str) -> str:
    name = code.partition("-")[0].lower()
    if name not in LANGUAGES:
        known = ", ".join(f"{key} ({language})" for key, language in LANGUAGES.items())
        raise ValueError(f"the model hears {known}, not {code!r}; leave it out and the model tells by itself")
    return name


def _check_upload(value: object) -> object:
    if not isinstance(value, Upload):
        raise ValueError("send the recording as a file, with a filename")
    return value


Language = Annotated[str, AfterValidator(_check_language)]
Format = Literal["json", "text", "srt", "verbose_json", "vtt"]


class AudioFields(Fields):
    """What both endpoints take, as a form."""

    model_config = ConfigDict(strict=False)  # A form's numbers are texts.
    task: ClassVar[str]
    instruction: ClassVar[str]
    """In the model card's words, which it was trained with (spec 6.1)."""

    file: Annotated[UploadFile, BeforeValidator(_check_upload)]
    model: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def logprobs(self) -> bool:
        """Whether they are told, or averaged."""
        return self.response_format == "verbose_json"

    @property
    def language_name(self) -> str:
        """Of the text, as OpenAI names it."""
        raise NotImplementedError

    @property
    def question(self) -> str:
        """What the model is asked of each segment: its card's words, then what the client wants it to know."""
        context = (self.prompt or "").strip()
        return f"{self.instruction} Context, for names and spelling: {context}" if context else self.instruction

    def ask(self, seed: int) -> Ask:
        """How to ask of a segment."""

        def request(media: Media, seconds: float) -> Request:
            sampling = SamplingParams(
                max_tokens=math.ceil(seconds * TOKENS_PER_SECOND) + SPARE_TOKENS,
                temperature=self.temperature,
                top_logprobs=0 if self.logprobs else None,
                seed=seed,
            )
            return Request.ask(self.question, (media,), sampling=sampling)

        return request


class TranslationFields(AudioFields):
    """The form of POST /v1/audio/translations."""

    task = "translate"
    instruction = "Translate the audio to English."

    @property
    def language_name(self) -> str:
        return "english"


class TranscriptionFields(AudioFields):
    """The form of POST /v1/audio/transcriptions."""

    task = "transcribe"
    instruction = "Transcribe the audio clip into text."

    language: Language | None = None
    """The model tells by itself; this is what verbose_json then says."""
    languages: Annotated[tuple[Language, ...], Field(alias="languages[]")] = ()
    keywords: Annotated[tuple[str, ...], Field(alias="keywords[]")] = ()
    stream: bool = False
    include: Annotated[tuple[Literal["logprobs"], ...], Field(alias="include[]")] = ()
    timestamp_granularities: Annotated[
        tuple[Literal["segment", "word"], ...], Field(alias="timestamp_granularities[]")
    ] = ()
    chunking_strategy: Literal["auto"] | None = None
    """Recordings are always cut at silence, where they are too long."""
    known_speaker_names: Annotated[None, Field(alias="known_speaker_names[]")] = None
    known_speaker_references: Annotated[None, Field(alias="known_speaker_references[]")] = None

    @property
    def logprobs(self) -> bool:
        return bool(self.include) or super().logprobs

    @property
    def language_name(self) -> str:
        known = {self.language, *self.languages} - {None}
        return LANGUAGES[known.pop() or ""].lower() if len(known) == 1 else "unknown"

    @property
    def question(self) -> str:
        words = ", ".join(self.keywords)
        return f"{super().question} These words may be said: {words}" if words else super().question

    def ignored(self) -> list[str]:
        languages = {"language": self.language, "languages[]": self.languages}
        told = self.response_format == "verbose_json"
        return [*super().ignored(), *(name for name, given in languages.items() if given and not told)]

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        times, form = self.timestamp_granularities, self.response_format
        if "word" in times:
            _refuse("timestamp_granularities[]", "the model tells no times of words; ask for segment")
        if times and form in ("json", "text"):
            _refuse("timestamp_granularities[]", "times are told in response_format verbose_json, srt and vtt only")
        if self.include and form != "json":
            _refuse("include[]", "logprobs are told in response_format json only")
        if self.stream and form != "json":
            _refuse("stream", f"only response_format json can be streamed, not {form}")


def _refuse(field: str, reason: str) -> None:
    raise ApiError(400, f"{field}: {reason}", field, "invalid_value")


FORMATS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/plain": {}, "text/event-stream": {}}}
}


@router.post("/v1/audio/transcriptions", responses=FORMATS)
async def create_transcription(
    http: HttpRequest, fields: Annotated[TranscriptionFields, Form(media_type="multipart/form-data")]
) -> Response:
    """What is said in a recording, in the language in which it is said."""
    await _check_once(http)
    fields.check()
    reply = await _listen(http, fields)
    if fields.stream:
        return await event_stream(http, reply.chunks())
    return await reply.whole(http)


@router.post("/v1/audio/translations", responses=FORMATS)
async def create_translation(
    http: HttpRequest, fields: Annotated[TranslationFields, Form(media_type="multipart/form-data")]
) -> Response:
    """What is said in a recording, in English."""
    await _check_once(http)
    return await (await _listen(http, fields)).whole(http)


async def _check_once(http: HttpRequest) -> None:
    """Raise ApiError for a field that is there twice and is no list: all of it but the last would be dropped."""
    names = Counter(name for name, _ in (await http.form()).multi_items() if not name.endswith("[]"))
    for name, times in names.items():
        if times > 1:
            raise ApiError.wrong(name, "is there twice; send it once")


async def _listen(http: HttpRequest, fields: AudioFields) -> "Reply":
    """Open the recording that was sent; raises ApiError."""
    service = service_of(http)
    service.check_model(fields.model)
    service.check_room(1)
    try:
        content = await fields.file.read()
        media = await asyncio.to_thread(open_media, content, fields.file.filename, service.settings.limits.media)
        recording = await open_recording(service, media, fields.ask(secrets.randbits(63)))
    except MediaError as error:
        raise ApiError.of(error, "file") from None
    return Reply(service, fields, recording)


class Reply:
    """One response in the making, whole or in events."""

    def __init__(self, service: Service, fields: AudioFields, recording: Recording) -> None:
        self._tokenizer = service.engine.tokenizer
        self._fields = fields
        self._recording = recording

    async def whole(self, http: HttpRequest) -> Response:
        """The response to who waits for it all, in the form asked for."""
        transcript = await unless_left(http, self._recording.hear())
        form = self._fields.response_format
        if form == "json":
            return json_response({"text": transcript.text, **self._end()})
        if form == "verbose_json":
            fields = self._fields
            told = transcripts.verbose(transcript, fields.task, fields.language_name, fields.temperature)
            return json_response({**told, "memphi": self._extensions()})
        tell = {"text": transcripts.plain, "srt": transcripts.srt, "vtt": transcripts.vtt}[form]
        return PlainTextResponse(tell(transcript).encode(errors="replace"))

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The response as OpenAI's events."""
        async with aclosing(self._recording.pieces()) as pieces:
            async for text, delta in pieces:
                logprobs = self._logprobs(delta.logprobs)
                if text or logprobs:
                    yield {"type": "transcript.text.delta", "delta": text, **logprobs}
        yield {"type": "transcript.text.done", "text": self._recording.transcript.text, **self._end()}

    def _end(self) -> Chunk:
        """What stands beside the text."""
        transcript = self._recording.transcript
        logprobs = [each for passage in transcript.passages for each in passage.logprobs]
        return {**self._logprobs(logprobs), "usage": transcript.usage, "memphi": self._extensions()}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Chunk:
        """Those of OpenAI's own field; verbose_json has only their averages."""
        if not logprobs or self._fields.response_format != "json":
            return {}
        return {"logprobs": transcripts.spell(logprobs, self._tokenizer)}

    def _extensions(self) -> Chunk:
        """What OpenAI has no field for."""
        recording, transcript = self._recording, self._recording.transcript
        notes = transcripts.NOTES if self._fields.response_format == "verbose_json" else ()
        return {
            "ignored": self._fields.ignored(),
            "segments": len(transcript.passages),
            "silences": transcript.silences,
            "cut_short": transcript.cut_short,
            "notes": notes,
            "price": recording.price,
            "timings": recording.timings,
        }
