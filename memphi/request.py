"""The plain data that a request becomes on its way: Request, Footprint, Prompt, Delta, Result.

Knows shapes and names, decides nothing. Every floor shares it; imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from numbers import Integral, Real
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from memphi.errors import RequestError

MediaKind = Literal["image", "audio"]
Role = Literal["system", "user", "assistant", "tool"]
Detail = Literal["low", "auto", "high"] | int
"""How finely an image is seen. auto and high: as the model's own processor does it, the global view and crops in up to
full resolution; a number: at most so many crops; low: one crop, the smallest form that the model knows."""
OnPressure = Literal["wait", "shrink-images", "one-by-one", "refuse"]
"""What is done for a request that does not fit the memory there is. wait: it waits for its turn, and is refused only if
it can never fit. shrink-images: one that can never fit is run with fewer crops of its pictures. one-by-one: one that
can never fit is run once for each of its pictures. refuse: it never waits to begin, it runs now or is refused."""
Pixels = NDArray[np.uint8]
Float32 = NDArray[np.float32]


class InputMode(Enum):
    """What a request carries; it alone decides the adapter and the audio head (spec 3.2)."""

    TEXT = 0
    VISION = 1
    SPEECH = 2
    VISION_SPEECH = 3

    @classmethod
    def of(cls, images: bool, audio: bool) -> "InputMode":
        return cls(images + 2 * audio)

    @property
    def adapter(self) -> str | None:
        return (None, "vision", "speech", "vision")[self.value]

    @property
    def audio_head(self) -> str:
        return "vision" if self is InputMode.VISION_SPEECH else "speech"


@dataclass(frozen=True)
class Samples:
    """Decoded sound: float32 in [-1, 1], one channel, at `rate` Hz."""

    values: Float32  # [samples]
    rate: int


@dataclass(frozen=True)
class Media:
    """One attachment: the bytes of a file, or pixels uint8 [height, width, 3], or samples already decoded."""

    kind: MediaKind
    name: str
    content: bytes | Pixels | Samples = field(repr=False, compare=False)
    digest: str
    """A hash of the content, which stands for it where media are compared."""
    detail: Detail = "auto"
    """For an image."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; media stand where they are meant to be seen or heard."""

    role: Role
    content: tuple[str | Media, ...]
    tools: str | None = None
    """For a system message: a JSON list of tools in the model's own format (spec 6.1)."""
    tool_calls: str | None = None
    """For an assistant's message: a JSON list of the calls that it ends with, each with its name and arguments."""


GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
MOST_TOP_LOGPROBS = 20
COUNTS = "max_tokens", "top_k", "top_logprobs", "seed"
REALS = "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
"""What of SamplingParams is a whole number, and a number."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like: any JSON object, JSON of a schema, a regular expression, a Lark grammar."""

    kind: GrammarKind
    source: str = ""
    """The schema as JSON, the expression or the grammar; empty for json_object."""

    def __post_init__(self) -> None:
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise RequestError(f"the grammar's kind is {self.kind!r}; it must be one of {', '.join(kinds)}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; the defaults are greedy and end where the model ends."""

    max_tokens: int | None = None
    """New tokens at most; None: as many as the context holds."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Of ids in the prompt or the answer: their scores are divided by it."""
    presence_penalty: float = 0.0
    """Taken from the scores of ids that occurred in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the scores of ids in the answer as often as they occurred there."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the scores of these ids."""
    top_logprobs: int | None = None
    """Tell the log-probability of every token of the answer, and of so many likeliest ones at its place; None: none."""
    grammar: Grammar | None = None
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_kinds()
        self._make_plain()
        rules = (
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0.0 <= self.temperature <= 100.0, "temperature must lie between 0 and 100"),
            (0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1"),
            (self.top_k is None or self.top_k >= 1, "top_k must be at least 1"),
            (0.0 <= self.min_p <= 1.0, "min_p must lie between 0 and 1"),
            (0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty must lie between 0.01 and 100"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty must lie between -2 and 2"),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty must lie between -2 and 2"),
            (all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias), "logit_bias must lie between -100 and 100"),
            (
                self.top_logprobs is None or 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS,
                f"top_logprobs must lie between 0 and {MOST_TOP_LOGPROBS}",
            ),
            (0 <= self.seed < 2**64, "seed must lie between 0 and 2**64 - 1"),
            (all(self.stop), "stop strings must not be empty"),
        )
        _hold(rules)

    def _check_kinds(self) -> None:
        bias, stop = self.logit_bias, self.stop
        pairs = isinstance(bias, tuple | list) and all(
            isinstance(each, tuple | list) and len(each) == 2 for each in bias
        )
        _hold([(pairs, "logit_bias must be pairs of an id and what its score gets, as in ((5, 1.0),)")])
        counts = (*(getattr(self, name) for name in COUNTS), *(number for number, _ in bias))
        reals = (*(getattr(self, name) for name in REALS), *(added for _, added in bias))
        is_stop = isinstance(stop, tuple | list) and all(isinstance(each, str) for each in stop)
        rules = (
            (
                all(number is None or isinstance(number, Integral) for number in counts) and self.seed is not None,
                f"{', '.join(COUNTS)} and the ids of logit_bias must be whole numbers",
            ),
            (all(isinstance(each, Real) for each in reals), f"{', '.join(REALS)} and logit_bias must be numbers"),
            (not isinstance(stop, str), f"stop must be a tuple of strings, as in stop=({stop!r},)"),
            (is_stop, "stop must be a tuple of strings, not of other things"),
            (self.grammar is None or isinstance(self.grammar, Grammar), "grammar must be a Grammar"),
        )
        _hold(rules)

    def _make_plain(self) -> None:
        """Python's own numbers: those of other libraries count otherwise, NumPy's not beyond their bits."""
        for name in COUNTS:
            number = getattr(self, name)
            object.__setattr__(self, name, None if number is None else int(number))
        for name in REALS:
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "logit_bias", tuple((int(number), float(added)) for number, added in self.logit_bias))


def _hold(rules: Iterable[tuple[bool, str]]) -> None:
    for holds, message in rules:
        if not holds:
            raise RequestError(message)


@dataclass(frozen=True)
class Request:
    """What a caller sends."""

    messages: tuple[Message, ...]
    sampling: SamplingParams = SamplingParams()
    on_pressure: OnPressure = "wait"
    raw: bool = False
    """The messages' text is the prompt as it stands, without roles and turns: the model goes on with it."""

    def __post_init__(self) -> None:
        _hold([(isinstance(self.sampling, SamplingParams), "sampling must be SamplingParams, as memphi has it")])

    @classmethod
    def ask(
        cls,
        text: str,
        attachments: Media | Sequence[Media] = (),
        system: str | None = None,
        sampling: SamplingParams | None = None,
        on_pressure: OnPressure = "wait",
    ) -> "Request":
        """One question about some attachments, which stand before the text as in the model card."""
        media = (attachments,) if isinstance(attachments, Media | str) else tuple(attachments)
        for item in media:
            if not isinstance(item, Media):
                raise RequestError(f"an attachment is what open_media returns, not {type(item).__name__}")
        user = Message("user", (*media, text))
        messages = (user,) if system is None else (Message("system", (system,)), user)
        return cls(messages, sampling or SamplingParams(), on_pressure)

    @property
    def media(self) -> tuple[Media, ...]:
        """All attachments, in the order in which they stand."""
        return tuple(part for message in self.messages for part in message.content if isinstance(part, Media))

    @property
    def mode(self) -> InputMode:
        kinds = {media.kind for media in self.media}
        return InputMode.of(images="image" in kinds, audio="audio" in kinds)


@dataclass(frozen=True)
class ImageFootprint:
    """What one image costs, known from its header."""

    width: int
    height: int
    crop_rows: int
    crop_columns: int
    tokens: int

    @property
    def crops(self) -> int:
        """Crops to encode, the global view included."""
        return self.crop_rows * self.crop_columns + 1


@dataclass(frozen=True)
class ClipFootprint:
    """What one audio clip costs; `frames` are log-mel frames of 10 ms."""

    seconds: float
    frames: int
    tokens: int


@dataclass(frozen=True)
class Footprint:
    """What a request costs in tokens, before anything is decoded."""

    mode: InputMode
    text_tokens: int
    images: tuple[ImageFootprint, ...]
    clips: tuple[ClipFootprint, ...]

    # Asked for at every row of every step.
    @cached_property
    def image_tokens(self) -> int:
        return sum(image.tokens for image in self.images)

    @cached_property
    def audio_tokens(self) -> int:
        return sum(clip.tokens for clip in self.clips)

    @cached_property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.image_tokens + self.audio_tokens

    @property
    def crops(self) -> int:
        return sum(image.crops for image in self.images)


@dataclass(frozen=True)
class ImageInput:
    """One image as the vision tower eats it: the global view first, then the crops row by row."""

    crops: Float32 = field(repr=False)  # [crops, 3, crop_size, crop_size] in [-1, 1]
    patch_mask: NDArray[np.bool_] = field(repr=False)  # [crops, patches, patches]
    footprint: ImageFootprint


@dataclass(frozen=True)
class Layout:
    """How one picture fills a grid of crops, in pixels (spec 4.3, steps 1 to 4)."""

    crop_rows: int
    crop_columns: int
    height: int
    """Height after resizing; padding below fills the grid."""
    width: int
    valid_rows: int
    """Rows of patches that hold picture."""
    valid_columns: int


@dataclass(frozen=True)
class DecodedImage:
    """One image whose crops the device makes as they are encoded."""

    pixels: Pixels = field(repr=False)  # [height, width, 3]
    layout: Layout
    patch_mask: NDArray[np.bool_] = field(repr=False)  # [crops, patches, patches]
    footprint: ImageFootprint


@dataclass(frozen=True)
class ClipInput:
    """One clip as the audio encoder eats it."""

    features: Float32 = field(repr=False)  # [frames, mel_bins]
    footprint: ClipFootprint


@dataclass(frozen=True)
class DecodedClip:
    """One clip whose log-mel frames the device makes as they are encoded."""

    samples: Float32 = field(repr=False)  # [samples]
    rate: int
    """16 or 8 kHz."""
    footprint: ClipFootprint


@dataclass(frozen=True)
class MediaSpan:
    """Where one attachment's embeddings stand in the prompt; `index` counts within its kind."""

    kind: MediaKind
    index: int
    start: int
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """A request after preparation: everything the model needs, on the host."""

    ids: tuple[int, ...] = field(repr=False)
    spans: tuple[MediaSpan, ...]
    images: tuple[ImageInput | DecodedImage, ...]
    clips: tuple[ClipInput | DecodedClip, ...]
    footprint: Footprint

    @property
    def mode(self) -> InputMode:
        return self.footprint.mode

    @property
    def cropped_images(self) -> tuple[ImageInput, ...]:
        """The images of a prompt that was prepared on the host throughout."""
        assert all(isinstance(image, ImageInput) for image in self.images)
        return cast(tuple[ImageInput, ...], self.images)

    @property
    def framed_clips(self) -> tuple[ClipInput, ...]:
        """The clips of a prompt that was prepared on the host throughout."""
        assert all(isinstance(clip, ClipInput) for clip in self.clips)
        return cast(tuple[ClipInput, ...], self.clips)


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string appeared."""
    LENGTH = "length"
    """max_tokens or the context was reached."""
    CANCELLED = "cancelled"
    """The caller went away."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token of the answer was, and the likeliest ones at its place; before temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Ids and log-probabilities, likeliest first."""


@dataclass(frozen=True)
class Delta:
    """What a step added to one answer, or several did: whole characters only."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    degraded: tuple[str, ...] = ()
    """As in a Result; with the finish reason."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of the ids, where they were asked for."""
    cached_tokens: int = 0
    """As in a Result; with the finish reason."""

    def followed_by(self, later: "Delta") -> "Delta":
        """Both as one."""
        return replace(
            later,
            text=self.text + later.text,
            ids=self.ids + later.ids,
            logprobs=self.logprobs + later.logprobs,
            cached_tokens=self.cached_tokens + later.cached_tokens,
        )


@dataclass(frozen=True)
class Result:
    """A finished answer."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    footprint: Footprint
    seconds: float
    """From the call to the last token."""
    first_token_seconds: float
    peak_memory_bytes: int | None
    """The most that the engine held so far, pages included; on a CPU, the process; None where nobody counts."""
    degraded: tuple[str, ...] = ()
    """What memory pressure changed about the request, one sentence each."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of the ids, where they were asked for."""
    cached_tokens: int = 0
    """The prompt's tokens whose keys and values were there already: of an earlier prompt that begins alike."""
