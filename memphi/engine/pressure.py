"""What may be done for a request that can never fit: fewer crops of its pictures, or one picture at a time.

Decides from footprints and the room there is; nothing is decoded or run here. The engine asks before a request enters,
and puts the answers of one that was divided together again.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

from memphi.config import AdapterName, EngineConfig, ModelConfig, VisionConfig
from memphi.engine.admission import Refuse, refuse
from memphi.errors import BusyError, DoesNotFitError, MediaError, RequestError
from memphi.inputs.image import footprint as image_footprint
from memphi.memory.plan import MemoryPlan
from memphi.request import (
    Delta,
    Detail,
    FinishReason,
    Footprint,
    ImageFootprint,
    InputMode,
    Media,
    Message,
    OnPressure,
    Request,
    Result,
    SamplingParams,
)

Measured = tuple[Footprint, tuple[int, ...]]
"""What a request costs, and its ids."""
Measure = Callable[[Request], Measured]


@dataclass(frozen=True)
class Part:
    """A request to be run: the whole as it came, the whole with less of its pictures, or one picture's share."""

    request: Request
    footprint: Footprint
    ids: tuple[int, ...] = ()
    """The request's, one for each attachment; none: it is encoded once more."""
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """The longest sequence that fits alone, and the longest that the model takes; both with the answer."""

    tokens: int
    context_tokens: int
    merged: AdapterName | None = None
    """The adapter in the weights: requests that do not use it cannot be answered."""

    def refuse(self, footprint: Footprint, sampling: SamplingParams) -> Refuse | None:
        """Whether this can never fit."""
        prompt = footprint.prompt_tokens
        # A prompt as long as the model's context leaves no room for an answer.
        tokens = self.tokens if prompt < self.context_tokens else min(self.tokens, self.context_tokens - 1)
        return refuse(prompt, sampling.max_tokens, tokens)

    def answer_tokens(self, footprint: Footprint) -> int:
        """The longest answer to what fits: its last token needs no room."""
        return min(self.tokens + 1, self.context_tokens) - footprint.prompt_tokens

    def __str__(self) -> str:
        if self.tokens < self.context_tokens:
            return f"the memory allows {self.tokens:,} tokens of context"
        return f"the model's context holds {self.context_tokens:,} tokens"


def bounds_of(plan: MemoryPlan, engine: EngineConfig, config: ModelConfig) -> Bounds:
    """The bounds under a plan; without a cache a whole sequence is one step."""
    tokens = plan.context_tokens if engine.kv_cache else min(plan.context_tokens, plan.step_tokens)
    return Bounds(tokens, config.language.max_tokens, engine.merge)


def endless(config: ModelConfig) -> ModelConfig:
    """The same model with room for any prompt, so that one which never fits can be measured too."""
    return replace(config, language=replace(config.language, max_tokens=1 << 60))


def relieve(request: Request, measure: Measure, bounds: Bounds, vision: VisionConfig) -> tuple[Part, ...]:
    """What to run for a request, so that it fits: itself where it does.

    measure counts requests of any length where on_pressure lets them be changed. Raises DoesNotFitError where nothing
    that it allows helps, and RequestError for a mode whose adapter is not the merged one.
    """
    _check_choice(request)
    whole = _part(request, measure)
    check_mode(whole.footprint.mode, bounds.merged)
    if bounds.refuse(whole.footprint, request.sampling) is None:
        return (whole,)
    if request.on_pressure == "shrink-images":
        return (_shrink(whole, bounds, vision),)
    if request.on_pressure == "one-by-one":
        return _divide(whole, measure, bounds)
    raise too_large(whole, bounds)


def _part(request: Request, measure: Measure) -> Part:
    return Part(request, *measure(request))


def _check_choice(request: Request) -> None:
    """Raise RequestError for an on_pressure that there is not."""
    choices = get_args(OnPressure)
    if request.on_pressure not in choices:
        raise RequestError(f"on_pressure is {request.on_pressure!r}; it must be one of {', '.join(choices)}")


def check_mode(mode: InputMode, merged: AdapterName | None) -> None:
    """Raise RequestError for a request that weights with this adapter would answer wrongly."""
    if merged is not None and mode.adapter != merged:
        answered = {"vision": "pictures", "speech": "recordings and no pictures"}[merged]
        raise RequestError(
            f"the {merged} adapter is merged into the weights, so only requests with {answered} are answered; "
            "load the model without --merge for others"
        )


def too_large(part: Part, bounds: Bounds, what: str = "the request") -> DoesNotFitError:
    """The error of what never fits, with its numbers and what would work."""
    refused = bounds.refuse(part.footprint, part.request.sampling)
    assert refused is not None
    return DoesNotFitError(
        f"{what} needs {refused.needed_tokens} tokens of context, its answer included, and this engine has memory for "
        f"{refused.available_tokens}; {refused.advice}"
    )


def not_now(needed_tokens: int, free_tokens: int | None, rows: int, most_rows: int, waiting: int) -> BusyError:
    """The error of a request that would have to wait and may not; free_tokens None: where none are counted."""
    needs = f"with the first stretch of its answer it needs {needed_tokens} tokens of context"
    free = f"and {free_tokens} are free" if free_tokens is not None else "and nothing is kept between steps"
    others = f"{rows} of at most {most_rows} requests run and {waiting} wait before it"
    return BusyError(
        f"the request would have to wait: {needs} {free}, {others}; send it again later, or let it wait "
        "(--on-pressure wait)"
    )


# --- fewer crops ---------------------------------------------------------------------------------------------------


def _shrink(whole: Part, bounds: Bounds, vision: VisionConfig) -> Part:
    """The same with one limit on the crops of every picture, the highest with which it fits.

    So the pictures with the most crops give up theirs first, and equal pictures are seen equally well.
    """
    smaller = whole
    for most in range(max(map(_crops, whole.footprint.images), default=1) - 1, 0, -1):
        smaller = _limit(whole, most, bounds, vision)
        if bounds.refuse(smaller.footprint, whole.request.sampling) is None:
            return smaller
    what = "the request, even with its pictures as small as they can be seen," if smaller.degraded else "the request"
    raise too_large(smaller, bounds, what)


def _limit(whole: Part, most: int, bounds: Bounds, vision: VisionConfig) -> Part:
    """The same with at most so many crops of every picture, besides the global view."""
    pictures = [media for media in whole.request.media if media.kind == "image"]
    before = whole.footprint.images
    forms = [_see(media, image, most, vision) for media, image in zip(pictures, before, strict=True)]
    told = tuple(
        f"picture {media.name} is seen in {_count_crops(_crops(after))} instead of {_crops(image)}: {bounds}"
        for (media, after), image in zip(forms, before, strict=True)
        if after is not image
    )
    images = tuple(after for _, after in forms)
    request = _replace_pictures(whole.request, [media for media, _ in forms])
    return replace(whole, request=request, footprint=replace(whole.footprint, images=images), degraded=told)


def _see(media: Media, image: ImageFootprint, most: int, vision: VisionConfig) -> tuple[Media, ImageFootprint]:
    """A picture in at most so many crops, or in a few more where it would be too narrow to be seen."""
    for limit in range(most, _crops(image)):
        with suppress(MediaError):
            after = image_footprint(image.width, image.height, vision, limit)
            # The grid of the closest shape stays the closest where no larger ones are allowed.
            detail: Detail = _crops(after) if _crops(after) > 1 else "low"
            return replace(media, detail=detail), after
    return media, image


def _replace_pictures(request: Request, pictures: Sequence[Media]) -> Request:
    """The same request with these pictures, in order, for its own."""
    coming = iter(pictures)

    def place(part: str | Media) -> str | Media:
        return part if isinstance(part, str) or part.kind != "image" else next(coming)

    messages = tuple(
        replace(message, content=tuple(place(part) for part in message.content)) for message in request.messages
    )
    return replace(request, messages=messages)


def _crops(image: ImageFootprint) -> int:
    """Crops besides the global view, as a request's detail counts them."""
    return image.crop_rows * image.crop_columns


def _count_crops(crops: int) -> str:
    return "1 crop" if crops == 1 else f"{crops} crops"


# --- one picture at a time -----------------------------------------------------------------------------------------


def _divide(whole: Part, measure: Measure, bounds: Bounds) -> tuple[Part, ...]:
    """The same conversation once for each picture, with all else in it; every share must fit by itself."""
    count = len(whole.footprint.images)
    requests = [_keep_picture(whole.request, place) for place in range(count)]
    if count < 2 or not all(_says_something(message) for request in requests for message in request.messages):
        raise too_large(whole, bounds)
    refused = bounds.refuse(whole.footprint, whole.request.sampling)
    assert refused is not None
    told = (
        f"the {count} pictures are answered one by one: together they need {refused.needed_tokens:,} tokens, the "
        f"question and the answer included, and {bounds}"
    )
    parts = tuple(replace(_part(request, measure), degraded=(told,)) for request in requests)
    for part in parts:
        if bounds.refuse(part.footprint, part.request.sampling) is not None:
            raise too_large(part, bounds, f"picture {picture_name(part.request)}, even alone,")
    return parts


def _keep_picture(request: Request, place: int) -> Request:
    """The same request without any other picture than this."""
    messages = list[Message]()
    seen = 0
    for message in request.messages:
        content = list[str | Media]()
        for part in message.content:
            is_picture = not isinstance(part, str) and part.kind == "image"
            if not is_picture or seen == place:
                content.append(part)
            seen += is_picture
        messages.append(replace(message, content=tuple(content)))
    return replace(request, messages=tuple(messages))


def _says_something(message: Message) -> bool:
    """Whether a message may stand in a conversation, now that pictures have left it."""
    has_content = any(not isinstance(part, str) or part.strip() for part in message.content)
    return has_content or message.role in ("assistant", "tool") or message.tools is not None


def picture_name(request: Request) -> str:
    """Of a request with one picture."""
    return next(media.name for media in request.media if media.kind == "image")


class Listing:
    """The answers of a divided request as one, a line "name: answer" for each picture; of any other, its answer."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """The requests that were made of one."""
        divided = len(requests) > 1
        self._openings = [f"{picture_name(request)}: " for request in requests] if divided else [""]
        self._place = 0
        self._begun = False
        self._reasons: list[FinishReason] = []

    def add(self, delta: Delta) -> Delta:
        """The next piece of the answers, one after another, as it stands in the list."""
        opening = "" if self._begun else self._open()
        reason = delta.finish_reason
        self._begun = reason is None
        if reason is None:
            return replace(delta, text=opening + delta.text)
        self._reasons.append(reason)
        self._place += 1
        if self._place < len(self._openings):
            return replace(delta, text=opening + delta.text, finish_reason=None, degraded=())
        return replace(delta, text=opening + delta.text, finish_reason=_whole_reason(self._reasons))

    def result(self, results: Sequence[Result]) -> Result:
        """The answers as one; its tokens and footprint are those of all, its times from the first to the last."""
        if len(results) == 1:
            return results[0]
        peaks = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
        return Result(
            text="\n".join(opening + result.text for opening, result in zip(self._openings, results, strict=True)),
            ids=tuple(token for result in results for token in result.ids),
            finish_reason=_whole_reason([result.finish_reason for result in results]),
            footprint=_sum([result.footprint for result in results]),
            seconds=max(result.seconds for result in results),
            first_token_seconds=min(result.first_token_seconds for result in results),
            peak_memory_bytes=max(peaks, default=None),
            degraded=results[-1].degraded,
            logprobs=tuple(entry for result in results for entry in result.logprobs),
            cached_tokens=sum(result.cached_tokens for result in results),
        )

    def _open(self) -> str:
        return ("\n" if self._place else "") + self._openings[self._place]


def _whole_reason(reasons: Sequence[FinishReason]) -> FinishReason:
    """Whole only if all are."""
    return next((reason for reason in reasons if reason is not FinishReason.STOP), FinishReason.STOP)


def _sum(footprints: Sequence[Footprint]) -> Footprint:
    return Footprint(
        footprints[0].mode,
        sum(footprint.text_tokens for footprint in footprints),
        tuple(image for footprint in footprints for image in footprint.images),
        tuple(clip for footprint in footprints for clip in footprint.clips),
    )
