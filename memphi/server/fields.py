"""The fields of requests: each is used, refused by name, or accepted and listed as ignored.

Fields of the type None are those that OpenAI knows and memphi does not do. Those marked IGNORED change nothing.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from memphi.request import Grammar, OnPressure, SamplingParams
from memphi.sampling.grammar import NAMES
from memphi.server.errors import ApiError, path


@dataclass(frozen=True)
class Ignored:
    """Marks a field that common clients send and that changes nothing."""


IGNORED = Ignored()


class Fields(BaseModel):
    """An object of a request; what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def ignored(self) -> list[str]:
        """Paths of the fields that were given and change nothing."""
        return [path(steps) for steps in _ignored(self, ())]


def _ignored(value: Any, at: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:  # noqa: ANN401
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from _ignored(item, (*at, place))
    if isinstance(value, Fields):
        for name in sorted(value.model_fields_set):
            if IGNORED in type(value).model_fields[name].metadata:
                if getattr(value, name) is not None:
                    yield (*at, name)
            else:
                yield from _ignored(getattr(value, name), (*at, name))


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Literal[False] | None, IGNORED] = None


class GrammarFields(Fields):
    """What an answer must look like; one of the two."""

    regex: str | None = None
    lark: str | None = None


DetailField = Annotated[
    Annotated[Literal["low", "auto", "high"], Tag("<word>")] | Annotated[int, Field(ge=1), Tag("<number>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<number>"),
]


class Extensions(Fields):
    """What memphi takes beyond OpenAI's protocol."""

    on_pressure: OnPressure | None = None
    detail: DetailField | None = None
    """How finely images are seen that do not say so themselves."""
    each: bool = False
    grammar: GrammarFields | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class SamplingFields(Fields):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        Field(max_length=16),
        BeforeValidator(as_list, json_schema_input_type=str | list[str] | None),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str | None, IGNORED] = None
    memphi: Extensions = Extensions()

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise ApiError.wrong("stream_options", "needs stream: true")
        grammar = self.memphi.grammar
        if grammar is not None and (grammar.regex is None) == (grammar.lark is None):
            raise ApiError.wrong("memphi.grammar", "takes one of regex and lark")

    def sampling(self, max_tokens: int | None, top_logprobs: int | None, grammar: Grammar | None) -> SamplingParams:
        """How to sample; greedy unless a temperature is given, and without a seed another answer every time."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.memphi.top_k,
            min_p=self.memphi.min_p or 0.0,
            repetition_penalty=1.0 if self.memphi.repetition_penalty is None else self.memphi.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self._bias(),
            top_logprobs=top_logprobs,
            grammar=grammar,
            seed=seed,
            stop=tuple(self.stop or ()),
        )

    def place_of(self, sentence: str) -> str | None:
        """The field that the engine finds fault with: it begins with its name, or with what a grammar is called."""
        word = sentence.partition(" ")[0]
        if word in Extensions.model_fields:
            return f"memphi.{word}"
        if sentence.startswith(tuple(f"the {name}" for name in NAMES.values())):
            return self.grammar_place
        return word if word in type(self).model_fields else None

    @property
    def grammar_place(self) -> str:
        """The field that the grammar came from."""
        return "memphi.grammar"

    @property
    def own_grammar(self) -> Grammar | None:
        """The extension's."""
        grammar = self.memphi.grammar
        if grammar is None:
            return None
        return Grammar("lark", grammar.lark or "") if grammar.regex is None else Grammar("regex", grammar.regex)

    def _bias(self) -> tuple[tuple[int, float], ...]:
        bias = self.logit_bias or {}
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError.wrong("logit_bias", 'has a key that is no token id; write it as {"42": -100}')
        return tuple((int(token), value) for token, value in bias.items())
