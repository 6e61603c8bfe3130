"""A request being generated, as integers; imports no torch. What the device holds for it is the runner's."""

from dataclasses import dataclass, field

from memphi.config import LanguageConfig
from memphi.request import FinishReason, Prompt, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One request's ids and how far they are computed."""

    id: int
    prompt: Prompt
    sampling: SamplingParams
    config: LanguageConfig
    ids: list[int] = field(init=False)
    """The prompt, then the answer so far."""
    computed: int = 0
    """How many ids the cache holds."""
    long: bool = field(init=False)
    """The rope regime of that cache."""
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.prompt.ids)
        self.long = self.config.is_long(len(self.ids))

    @property
    def pending(self) -> int:
        """Ids that are known and not computed yet."""
        return len(self.ids) - self.computed

    @property
    def answer(self) -> list[int]:
        return self.ids[len(self.prompt.ids) :]

    @property
    def max_tokens(self) -> int:
        """New tokens at most: what was asked for, within the context."""
        room = self.config.max_tokens - len(self.prompt.ids)
        return room if self.sampling.max_tokens is None else min(self.sampling.max_tokens, room)
