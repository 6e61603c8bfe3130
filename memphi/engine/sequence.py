"""A request being generated, as integers; imports no torch. What the device holds for it is the runner's."""

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from memphi.cache.media import MediaEntry
from memphi.engine.drafts import Drafts
from memphi.request import FinishReason, Footprint, Prompt, Request, SamplingParams, TokenLogprob
from memphi.sampling.grammar import Matcher


class State(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """Not admitted yet, or paused: it holds nothing."""
    PREPARING = "preparing"
    """Its price is reserved; its attachments are being decoded on the host."""
    ENCODING = "encoding"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """One request's ids and how far they are computed."""

    id: int
    request: Request
    footprint: Footprint
    max_tokens: int
    """New tokens at most: what was asked for, within what fits."""
    state: State = State.WAITING
    prompt: Prompt | None = None
    """Known once prepared."""
    ids: list[int] = field(default_factory=list)
    """The prompt, then the answer so far; empty until prepared."""
    computed: int = 0
    """How many ids the pages hold."""
    losses: int = 0
    """How often it lost its pages: what was planned for it before counts for nothing."""
    long: bool = False
    """The rope regime of those pages."""
    pages: tuple[int, ...] = ()
    """Those that it holds; another tuple when they change, so that the same one is known to hold the same pages."""
    reserved_pages: int = 0
    """Pages that the budget keeps for it, those that it holds included."""
    keys: list[bytes] = field(default_factory=list)
    """Names of its full pages' content, as far as they are known."""
    entries: list[MediaEntry[Any]] = field(default_factory=list)
    """Its attachments' embeddings, in the order in which they stand."""
    matcher: Matcher | None = None
    """What its answer is held to; made while it is prepared. Where it stands follows from the answer."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each id of the answer, where they were asked for."""
    drafts: Drafts | None = None
    """What guesses its next ids; made when it is prepared first."""
    finish_reason: FinishReason | None = None
    degraded: tuple[str, ...] = ()
    cached_tokens: int | None = None
    """Ids of the prompt that were in others' pages when it first ran; None before."""
    text_ids: tuple[int, ...] = ()
    """The request's, one for each attachment, where they are known before it is prepared."""

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @cached_property
    def adapter(self) -> str | None:
        return self.footprint.mode.adapter

    @property
    def pending(self) -> int:
        """Ids that are known and not computed yet."""
        return len(self.ids) - self.computed

    @property
    def length(self) -> int:
        """Ids known, or to be known once prepared."""
        return len(self.ids) or self.footprint.prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """How long the answer is so far."""
        tokens = len(self.ids) - self.footprint.prompt_tokens
        return tokens if tokens > 0 else 0

    @property
    def answer(self) -> list[int]:
        return self.answer_after(0)

    def answer_after(self, tokens: int) -> list[int]:
        """The answer without its first so many tokens."""
        return self.ids[self.footprint.prompt_tokens + tokens :]

    def cut_answer(self, tokens: int) -> None:
        """Drop what was chosen beyond so many tokens: the answer has ended there."""
        del self.ids[self.footprint.prompt_tokens + tokens :]
        del self.logprobs[tokens:]
