"""A client's messages to memphi's: text, images and sound, each where it stands; every error names its place.

The messages' fields, what attachments may be, and a conversation shared out, one attachment each. Reading attachments
takes a while, so `read_messages` belongs into a thread.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from memphi.errors import MediaError, MemphiError, RequestError
from memphi.inputs.media import open_media
from memphi.request import Detail, Media, MediaKind, Message
from memphi.server.errors import ApiError
from memphi.server.fields import IGNORED, Fields
from memphi.server.settings import Limits

DATA = "data:"
_NUMBERED = re.compile(r"message (\d+)")
"""How errors name a message."""
Fetched = Mapping[str, bytes | MediaError]
"""What URLs hold, or why it is not here."""


class TextPart(Fields):
    type: Literal["text"]
    text: str


class RefusalPart(Fields):
    """What an assistant said instead of an answer; for the model, it is what it said."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Fields):
    url: str
    detail: Literal["low", "auto", "high"] | None = None


class ImagePart(Fields):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Fields):
    data: str
    """Base64."""
    format: Annotated[str | None, IGNORED] = None
    """The content tells its own format."""


class AudioPart(Fields):
    type: Literal["input_audio"]
    input_audio: InputAudio


def kind_of(value: object) -> str | None:
    """What tells which of several kinds of object this is."""
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    kind = given.get("type", given.get("role"))
    return f"<{kind}>" if isinstance(kind, str) else None


def _form_of(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<none>" if value is None else "<parts>"


UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_part",
        custom_error_message="a part's type must be text, image_url or input_audio",
    ),
]
AssistantPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(
        kind_of, custom_error_type="unknown_part", custom_error_message="a part's type must be text or refusal"
    ),
]
_TEXT_OR_PARTS = Discriminator(
    _form_of, custom_error_type="no_content", custom_error_message="content must be text or a list of parts"
)
UserContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[UserPart], Tag("<parts>")], _TEXT_OR_PARTS]
AssistantContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[AssistantPart], Tag("<parts>")] | Annotated[None, Tag("<none>")],
    Discriminator(_form_of),
]
TextContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<parts>")], _TEXT_OR_PARTS]


class CalledFunction(Fields):
    name: str
    arguments: str
    """A JSON object, as text."""
    parsed_arguments: Annotated[Any, IGNORED] = None
    """As OpenAI's client adds them, and `parsed` and `index` below."""


class ToolCall(Fields):
    id: str
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int | None, IGNORED] = None


class SystemMessage(Fields):
    role: Literal["system", "developer"]
    content: TextContent
    name: Annotated[str | None, IGNORED] = None


class UserMessage(Fields):
    role: Literal["user"]
    content: UserContent
    name: Annotated[str | None, IGNORED] = None


class AssistantMessage(Fields):
    """An answer, as clients send it back."""

    role: Literal["assistant"]
    content: AssistantContent = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any] | None, IGNORED] = None
    parsed: Annotated[Any, IGNORED] = None
    memphi: Annotated[dict[str, Any] | None, IGNORED] = None
    name: Annotated[str | None, IGNORED] = None
    audio: None = None
    function_call: None = None


class ToolMessage(Fields):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: str
    name: Annotated[str | None, IGNORED] = None


AnyMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_role",
        custom_error_message="a message's role must be system, developer, user, assistant or tool",
    ),
]


@dataclass(frozen=True)
class Conversation:
    """Messages as the engine takes them, and where each attachment stood."""

    messages: tuple[Message, ...]
    places: dict[str, str]
    """Paths by the attachments' names."""
    unusable: Mapping[str, MediaError] = field(default_factory=dict)
    """Why attachments are none, by their names; what stands for them is never asked about."""
    added: int = 0
    """Messages that stand before the client's own."""

    @property
    def media(self) -> list[Media]:
        return [part for message in self.messages for part in message.content if isinstance(part, Media)]

    @property
    def shares(self) -> list[tuple[Message, ...] | MediaError]:
        """The same conversation once for each attachment, with no other; or why there is none."""
        return [
            self.unusable.get(media.name) or tuple(_keep(message, media) for message in self.messages)
            for media in self.media
        ]

    @contextmanager
    def located(self, place_of: Callable[[str], str | None]) -> Iterator[None]:
        """Turn what the engine raises inside into errors that name the field; place_of knows those beside messages."""
        try:
            yield
        except MemphiError as error:
            found = self.locate(error)
            found.param = found.param or place_of(found.message)
            raise found from None

    def with_tools(self, listed: str) -> "Conversation":
        """The same with tools in its system message, as the model is shown them."""
        first, *rest = self.messages
        if first.role == "system":
            return replace(self, messages=(replace(first, tools=listed), *rest))
        return replace(self, messages=(Message("system", (), listed), *self.messages), added=1)

    def locate(self, error: MemphiError) -> ApiError:
        """The same error, with the place of the attachment or the message that it names."""
        if error.exit_code != RequestError.exit_code:
            return ApiError.of(error)
        text = str(error)
        if match := _NUMBERED.match(text):
            place = f"messages[{int(match[1]) - 1 - self.added}]"
            return ApiError.of(RequestError(place + text[match.end() :]), place)
        return ApiError.of(error, self.places.get(text.partition(": ")[0]))


def _keep(message: Message, media: Media) -> Message:
    """The same message with no other attachment than this."""
    content = tuple(part for part in message.content if isinstance(part, str) or part is media)
    return replace(message, content=content)


def urls_of(messages: Sequence[Any]) -> list[str]:
    """The addresses of attachments that have to be fetched."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    return [url for url in urls if not url.startswith(DATA)]


def read_messages(
    messages: Sequence[Any], detail: Detail, limits: Limits, fetched: Fetched, tolerant: bool = False
) -> Conversation:
    """Read all messages, attachments too; raises ApiError, naming the place.

    detail is how images are seen that do not say it themselves; fetched is what the URLs hold, of those that were.
    tolerant: an attachment that cannot be used raises nothing, it is among the `unusable`.
    """
    reader = _Reader(detail, limits, fetched, tolerant)
    read = tuple(reader.read(message, place) for place, message in enumerate(messages))
    return Conversation(read, reader.places, reader.unusable)


class _Reader:
    """One conversation being read: what is attached so far, and the calls that may be answered."""

    def __init__(self, detail: Detail, limits: Limits, fetched: Fetched, tolerant: bool) -> None:
        self.places: dict[str, str] = {}
        self.unusable: dict[str, MediaError] = {}
        self._tolerant = tolerant
        self._detail = detail
        self._limits = limits
        self._fetched = fetched
        self._counts: dict[MediaKind, int] = {"image": 0, "audio": 0}
        self._calls: set[str] = set()

    def read(self, message: Any, place: int) -> Message:  # noqa: ANN401
        at = f"messages[{place}]"
        if isinstance(message, UserMessage):
            return Message("user", self._user_content(message.content, f"{at}.content"))
        if isinstance(message, AssistantMessage):
            return self._answer(message, at)
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in self._calls:
                raise ApiError.wrong(f"{at}.tool_call_id", "belongs to no tool call of a message before it")
            return Message("tool", (_text(message.content),))
        return Message("system", (_text(message.content),))

    def _answer(self, message: AssistantMessage, at: str) -> Message:
        calls = message.tool_calls or []
        self._calls |= {call.id for call in calls}
        text = _text(message.content) or message.refusal or ""
        return Message("assistant", (text,), tool_calls=_model_calls(calls, at) if calls else None)

    def _user_content(self, content: Any, at: str) -> tuple[str | Media, ...]:  # noqa: ANN401
        if isinstance(content, str):
            return (content,)
        read: list[str | Media] = []
        for place, part in enumerate(content):
            if not isinstance(part, TextPart):
                read.append(self._attachment(part, f"{at}[{place}]"))
            elif read and isinstance(read[-1], str):
                read[-1] += "\n" + part.text  # Parts are pieces of a text that stand by themselves.
            else:
                read.append(part.text)
        return tuple(read)

    def _attachment(self, part: ImagePart | AudioPart, at: str) -> Media:
        kind: MediaKind = "image" if isinstance(part, ImagePart) else "audio"
        self._counts[kind] += 1
        name = f"{kind} {self._counts[kind]}"
        where = f"{at}.image_url.url" if isinstance(part, ImagePart) else f"{at}.input_audio.data"
        self.places[name] = where
        self._check_count(where)
        try:
            media = self._open(part, name)
            if media.kind != kind:
                raise MediaError(f"{name}: holds no {kind} but {'an image' if media.kind == 'image' else 'sound'}")
        except MediaError as error:
            if not self._tolerant:
                raise ApiError.of(error, where) from None
            self.unusable[name] = error
            return Media(kind, name, b"", "")
        if isinstance(part, AudioPart):
            return media
        return replace(media, detail=part.image_url.detail or self._detail)

    def _check_count(self, where: str) -> None:
        most = self._limits.images
        if self._counts["image"] > most:
            raise ApiError.wrong(where, f"is one image too many: this server takes {most} in one request")

    def _open(self, part: ImagePart | AudioPart, name: str) -> Media:
        limits = self._limits.media
        if isinstance(part, AudioPart):
            return open_media(_decode(part.input_audio.data, name), name, limits)
        url = part.image_url.url
        content = url if url.startswith(DATA) else self._fetched.get(url)
        if content is None:
            raise MediaError(f"{name}: this server fetches no URLs; send the image as data:image/png;base64,…")
        if isinstance(content, MediaError):
            raise MediaError(f"{name}: {content}")
        return open_media(content, name, limits)


def _decode(data: str, name: str) -> bytes | str:
    """The bytes of an input_audio; some clients send a whole data URI."""
    if data.startswith(DATA):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"{name}: holds damaged base64") from None


def _text(content: Any) -> str:  # noqa: ANN401
    """Text content in one piece."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _model_calls(calls: Sequence[ToolCall], at: str) -> str:
    """An assistant's calls as the model itself writes them; raises ApiError for arguments that are no object."""
    written = []
    for place, call in enumerate(calls):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError.wrong(f"{at}.tool_calls[{place}].function.arguments", "must be a JSON object")
        written.append({"name": call.function.name, "arguments": arguments})
    return json.dumps(written, ensure_ascii=False)
