"""What is measured: named workloads, each the same requests for the same seed, and how a time becomes a figure.

All prompts, pictures and sounds of a run differ, so no cache helps. Imports no torch.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from memphi.inputs.audio import RATE
from memphi.inputs.chat import render
from memphi.inputs.media import audio_media, image_media
from memphi.inputs.prompt import encode
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Float32, InputMode, Message, Pixels, Request, SamplingParams

Metric = Literal["pace", "tokens", "images", "whole", "first token"]
"""Tokens a second after the first; tokens or images a second of the whole; seconds of the whole, or to the first token
of the last request."""
CurveName = Literal["context", "rows", "crops", "seconds"]
PeerName = Literal["transformers", "recipe"]
UNITS: dict[Metric, str] = {
    "pace": "tokens/s",
    "tokens": "tokens/s",
    "images": "images/s",
    "whole": "s",
    "first token": "s",
}
PICTURE, A4 = (768, 1024), (3508, 2480)
"""Pixels of a picture, and of a page at 300 dpi: height and width."""
ANSWER_TOKENS = 250
"""What an answer about a picture has."""
BENCHMARK = "memphi bench"
"""What its documents call themselves."""
START = "start"
"""Not a workload of a loaded engine: how long a process takes from nothing to its first token."""
SMALLEST_PROMPT, SMALLEST_SIDE, SHORTEST_SECONDS = 8, 32, 0.5


@dataclass(frozen=True)
class Timing:
    """How long work took, or takes at least, from the start of the clock."""

    first_token_seconds: float
    """Until every request has its first token."""
    seconds: float


@dataclass(frozen=True)
class Workload:
    """So many requests at once, all of one shape."""

    name: str
    metric: Metric
    requests: int = 1
    prompt_tokens: int = 32
    """Without what pictures and sound take."""
    answer_tokens: int = 1
    images: int = 0
    """In each request."""
    size: tuple[int, int] = PICTURE
    seconds: float = 0.0
    """Of sound in each request."""
    adapters: tuple[InputMode, ...] = (InputMode.TEXT,)
    """For text alone: as what the requests run, in turn. Peers' figures were taken with text under adapters."""

    @property
    def attaches(self) -> bool:
        return bool(self.images or self.seconds)

    @property
    def says(self) -> str:
        """What it is, in words."""
        answer = "to the first token" if self.answer_tokens == 1 else f"{self.answer_tokens} new tokens"
        if self.attaches:
            height, width = self.size
            pictures = f"{_count(self.images, 'image')} of {width}x{height}" if self.images else ""
            sound = f"{self.seconds:g} s of sound" if self.seconds else ""
            return f"{_count(self.requests, 'request')} of {pictures}{sound}, {answer}"
        names = [f"{mode.adapter or 'no'} adapter" for mode in self.adapters]
        under = ", ".join(names) + (" in turn" if len(names) > 1 else "")
        return f"{_count(self.requests, 'request')} of {self.prompt_tokens} tokens, {answer}, {under}"

    def figure(self, timing: Timing) -> float:
        """What a time says of it, in its metric's unit."""
        if self.metric == "first token":
            return timing.first_token_seconds
        if self.metric == "whole":
            return timing.seconds
        if self.metric == "images":
            return self.requests * self.images / timing.seconds
        if self.metric == "tokens":
            return self.requests * self.answer_tokens / timing.seconds
        return self.requests * (self.answer_tokens - 1) / (timing.seconds - timing.first_token_seconds)

    def share(self, figure: float, limit: float) -> float:
        """How much of what the card allows a figure is: 1 is the limit."""
        return limit / figure if UNITS[self.metric] == "s" else figure / limit

    def scaled(self, scale: float) -> "Workload":
        """The same with less of everything, to try the benchmark itself: its figures compare with nothing."""
        if scale == 1:
            return self
        return replace(
            self,
            requests=max(math.ceil(self.requests * scale), 1),
            prompt_tokens=max(round(self.prompt_tokens * scale), SMALLEST_PROMPT),
            answer_tokens=max(round(self.answer_tokens * scale), min(self.answer_tokens, 4)),
            images=math.ceil(self.images * scale),
            size=(max(round(self.size[0] * scale), SMALLEST_SIDE), max(round(self.size[1] * scale), SMALLEST_SIDE)),
            seconds=self.seconds and max(self.seconds * scale, SHORTEST_SECONDS),
        )


IN_TURN = (InputMode.TEXT, InputMode.VISION, InputMode.SPEECH)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode-1", "pace", 1, 512, 128),
        Workload("decode-1-vision", "pace", 1, 512, 128, adapters=(InputMode.VISION,)),
        Workload("decode-64", "tokens", 64, 512, 128),
        Workload("mixed", "tokens", 64, 512, 128, adapters=IN_TURN),
        Workload("decode-256", "tokens", 256, 512, 128),
        Workload("mixed-256", "tokens", 256, 512, 128, adapters=IN_TURN),
        Workload("prefill", "first token", 8, 1713, adapters=(InputMode.VISION,)),
        Workload("prefill-text", "first token", 8, 1713),
        Workload("describe-8", "first token", images=8),
        Workload("describe-1", "whole", answer_tokens=ANSWER_TOKENS, images=1),
        Workload("describe-64", "images", 64, answer_tokens=ANSWER_TOKENS, images=1),
        Workload("pages", "images", 8, answer_tokens=ANSWER_TOKENS, images=1, size=A4),
        Workload("transcribe", "first token", seconds=600.0),
    )
}
NAMES = (*WORKLOADS, START)


@dataclass(frozen=True)
class Wanted:
    """What is to be measured, and how."""

    workloads: tuple[str, ...]
    curves: tuple[CurveName, ...] = ()
    peers: tuple[PeerName, ...] = ()
    repeats: int = 3
    seconds: float = 300.0
    """For everything."""
    scale: float = 1.0
    seed: int = 0
    commit: str | None = None


@dataclass(frozen=True, eq=False)
class Draft:
    """A request as the host holds it before the clock starts: text, decoded pixels and samples."""

    text: str
    pictures: tuple[Pixels, ...]
    sound: Float32 | None
    mode: InputMode | None
    """What text alone is to run as; None: as what it is."""
    answer_tokens: int

    def request(self) -> Request:
        media = [image_media(pixels, f"image {number}") for number, pixels in enumerate(self.pictures, 1)]
        media += [audio_media(self.sound, RATE, "sound")] if self.sound is not None else []
        return Request.ask(self.text, media, None, SamplingParams(self.answer_tokens, ignore_eos=True))


class Words:
    """Texts of exactly so many tokens, of words drawn from a tokenizer's own vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Words that are one token each; where there are none, letters."""
        self._tokenizer = tokenizer
        texts = [tokenizer.token_bytes(int(i)) for i in tokenizer.known_ids(vocab_size).nonzero()[0]]
        for pattern in (rb" [a-z]{2,12}", rb"[a-z]"):
            self._words = [text.decode() for text in texts if re.fullmatch(pattern, text)]
            if self._words:
                break

    def draw(self, tokens: int, random: np.random.Generator) -> str:
        """A text that makes a question of this many tokens, the roles' own included."""
        words = [self._words[i] for i in random.integers(0, len(self._words), tokens)]
        # No space begins it, which would count after a picture and not after a role.
        while excess := self._question_tokens(text := "".join(words).lstrip()) - tokens:
            # The first word without its space may be several tokens; each later one is one.
            words = words[:-excess] if excess > 0 else words + words[excess:]
        return text

    def _question_tokens(self, text: str) -> int:
        return len(encode(render((Message("user", (text,)),)), self._tokenizer))


def draw(workload: Workload, words: Words, seed: int) -> list[Draft]:
    """The requests of a workload; those of other seeds and other workloads share nothing with them."""
    random = np.random.default_rng((seed, *workload.name.encode()))
    drafts = []
    for number in range(workload.requests):
        shape = (workload.images, *workload.size, 3)
        samples = round(workload.seconds * RATE)
        drafts.append(
            Draft(
                text=words.draw(workload.prompt_tokens, random),
                pictures=tuple(random.integers(0, 256, shape, np.uint8)),
                sound=0.1 * random.standard_normal(samples, np.float32) if samples else None,
                mode=None if workload.attaches else workload.adapters[number % len(workload.adapters)],
                answer_tokens=workload.answer_tokens,
            )
        )
    return drafts


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
