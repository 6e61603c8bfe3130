"""What is run for a request that can never fit: no more is taken from it than is needed, and it is told."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memphi.config import VisionConfig
from memphi.engine.pressure import Bounds, Listing, not_now, relieve
from memphi.errors import DoesNotFitError, MediaError, RequestError
from memphi.inputs.image import footprint as image_footprint
from memphi.request import (
    ClipFootprint,
    Delta,
    FinishReason,
    Footprint,
    Media,
    Message,
    Request,
    Result,
    SamplingParams,
)

VISION = VisionConfig()
CONTEXT = 131072
TEXT_TOKENS, CLIP_TOKENS = 20, 50
CLIP = Media("audio", "note.wav", b"", "sound")
SAMPLING = SamplingParams(max_tokens=10)


def picture(width, height, name="scan.png", detail="auto"):
    pixels = np.broadcast_to(np.uint8(0), (height, width, 3))
    return Media("image", name, pixels, f"{name} {width} x {height}", detail)


PAGE, PHOTO, ICON = picture(2480, 3508, "page.png"), picture(1600, 1200, "photo.jpg"), picture(200, 200, "icon.png")
STRIP = picture(10000, 100, "strip.png")


def measure(request):
    """So many tokens for each text and clip, and for pictures what they cost."""
    images = [image_footprint(m.content.shape[1], m.content.shape[0], VISION, m.detail) for m in pictures(request)]
    clips = [ClipFootprint(4.0, 400, CLIP_TOKENS) for media in request.media if media.kind == "audio"]
    texts = sum(isinstance(part, str) for message in request.messages for part in message.content)
    return Footprint(request.mode, texts * TEXT_TOKENS, tuple(images), tuple(clips))


def pictures(request):
    return [media for media in request.media if media.kind == "image"]


def crops(image):
    return image.crop_rows * image.crop_columns


def needed(request):
    return measure(request).prompt_tokens + (request.sampling.max_tokens or 1) - 1


def ask(media, on_pressure, sampling=SAMPLING):
    return Request.ask("What is the total?", media, sampling=sampling, on_pressure=on_pressure)


def run(request, tokens, context_tokens=CONTEXT):
    return relieve(request, lambda each: (measure(each), ()), Bounds(tokens, context_tokens), VISION)


def limited(request, most):
    """The request with this detail set by hand for all pictures that have more crops."""
    told = iter(measure(request).images)

    def see(part):
        if isinstance(part, str) or part.kind != "image":
            return part
        image = next(told)
        return replace(part, detail=most) if crops(image) > most else part

    messages = tuple(replace(m, content=tuple(map(see, m.content))) for m in request.messages)
    return replace(request, messages=messages)


# --- what fits, and what may not be changed ---------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["wait", "shrink-images", "one-by-one", "refuse"])
def test_what_fits_is_run_as_it_came(choice):
    request = ask([PAGE, CLIP, PHOTO], choice)
    (part,) = run(request, needed(request))
    assert part.request is request
    assert part.footprint == measure(request)
    assert part.degraded == ()


@pytest.mark.parametrize("choice", ["wait", "refuse"])
def test_what_may_not_be_changed_is_refused_with_numbers(choice):
    request = ask([PAGE], choice)
    with pytest.raises(DoesNotFitError, match=rf"needs {needed(request)} tokens .* memory for {needed(request) - 1};"):
        run(request, needed(request) - 1)


@pytest.mark.parametrize("choice", ["shrink-images", "one-by-one"])
@pytest.mark.parametrize("media", [[], [CLIP], [ICON]], ids=["text", "sound", "one small picture"])
def test_what_no_change_helps_is_refused_with_numbers(choice, media):
    request = ask(media, choice, SamplingParams(max_tokens=5000))
    least = needed(limited(request, 1)) if choice == "shrink-images" else needed(request)
    with pytest.raises(DoesNotFitError, match=f"needs {least} tokens .* memory for 400;"):
        run(request, 400)


def test_a_choice_that_there_is_not_is_named():
    with pytest.raises(RequestError, match=r"'shrink'; it must be one of wait, shrink-images, one-by-one, refuse"):
        run(ask([PAGE], "shrink"), 10)


def test_a_prompt_as_long_as_the_model_s_context_does_not_fit():
    request = ask([PAGE, ICON], "shrink-images", SamplingParams(max_tokens=1))
    context = measure(request).prompt_tokens
    (part,) = run(request, context, context)
    assert part.footprint.prompt_tokens < context
    assert part.degraded == (
        f"picture page.png is seen in 24 crops instead of 35: the model's context holds {context:,} tokens",
    )
    assert run(request, context, context + 1)[0].request is request


# --- fewer crops ------------------------------------------------------------------------------------------------


sizes = st.tuples(st.integers(60, 4000), st.integers(60, 4000))
details = st.sampled_from(["auto", "high", "low", 1, 2, 9, 36])


@settings(deadline=None)
@given(st.lists(st.tuples(sizes, details), min_size=1, max_size=4), st.integers(300, 20000), st.booleans())
def test_pictures_lose_no_more_crops_than_they_must(kinds, tokens, sound):
    media = []
    for place, ((width, height), detail) in enumerate(kinds):
        try:
            image_footprint(width, height, VISION, detail)
        except MediaError:
            continue
        media.append(picture(width, height, f"{place}.png", detail))
    request = ask([*media, CLIP] if sound else media, "shrink-images")
    most = max(map(crops, measure(request).images), default=1)
    tried = [request, *(limit_as_seen(request, limit) for limit in range(most - 1, 0, -1))]
    expected = next((measure(other) for other in tried if needed(other) <= tokens), None)
    if expected is None:
        with pytest.raises(DoesNotFitError):
            run(request, tokens)
        return
    (part,) = run(request, tokens)
    assert part.footprint == measure(part.request) == expected
    changed = [(a, b) for a, b in zip(request.media, part.request.media, strict=True) if a != b]
    assert len(part.degraded) == len(changed)
    assert all(before.kind == "image" and before.content is after.content for before, after in changed)


def limit_as_seen(request, most):
    """As `limited`, but a picture too narrow for so few crops gets the fewest in which it is seen."""
    details = []
    for media, image in zip(pictures(request), measure(request).images, strict=True):
        own = crops(image)
        details.append(next((n for n in range(most, own) if is_seen(media, n)), media.detail))
    coming = iter(details)
    (message,) = request.messages
    content = tuple(
        replace(part, detail=next(coming)) if not isinstance(part, str) and part.kind == "image" else part
        for part in message.content
    )
    return replace(request, messages=(replace(message, content=content),))


def is_seen(media, detail):
    try:
        image_footprint(media.content.shape[1], media.content.shape[0], VISION, detail)
    except MediaError:
        return False
    return True


def test_the_pictures_with_the_most_crops_give_up_theirs_first_and_equal_ones_alike():
    request = ask([ICON, PAGE, PHOTO, PAGE], "shrink-images")
    (part,) = run(request, needed(limited(request, 24)))
    assert [media.detail for media in part.request.media] == ["auto", 24, "auto", 24]
    tokens = f"{needed(limited(request, 24)):,}"
    assert (
        part.degraded
        == (f"picture page.png is seen in 24 crops instead of 35: the memory allows {tokens} tokens of context",) * 2
    )


def test_at_the_end_every_picture_is_seen_in_low_detail():
    request = ask([PAGE, PHOTO], "shrink-images")
    (part,) = run(request, needed(limited(request, 1)))
    assert [media.detail for media in part.request.media] == ["low", "low"]
    assert part.degraded[1].startswith("picture photo.jpg is seen in 1 crop instead of 12: ")


def test_a_picture_too_narrow_for_one_crop_keeps_the_fewest_in_which_it_is_seen():
    with pytest.raises(MediaError):
        image_footprint(10000, 100, VISION, "low")
    fewest = next(n for n in range(1, 36) if is_seen(STRIP, n))
    assert fewest > 1
    request = ask([STRIP, PAGE], "shrink-images")
    (part,) = run(request, needed(limit_as_seen(request, 1)))
    assert [media.detail for media in part.request.media] == [fewest, "low"]
    with pytest.raises(DoesNotFitError, match="even with its pictures as small as they can be seen"):
        run(request, needed(limit_as_seen(request, 1)) - 1)


def test_pictures_of_earlier_turns_shrink_too():
    turns = (Message("user", (PAGE, "What is it?")), Message("assistant", ("A page.",)), Message("user", ("Sure?",)))
    request = Request(turns, SAMPLING, "shrink-images")
    (part,) = run(request, needed(request) - 1)
    assert part.request.messages[1:] == turns[1:]
    assert part.request.media[0].detail == 24


# --- one picture at a time --------------------------------------------------------------------------------------


def test_every_picture_is_asked_about_alone_with_all_else():
    request = ask([PHOTO, CLIP, PAGE, ICON], "one-by-one")
    parts = run(request, needed(ask([PAGE, CLIP], "wait")))
    assert [part.request.media for part in parts] == [(PHOTO, CLIP), (CLIP, PAGE), (CLIP, ICON)]
    assert {part.request.messages[-1].content[-1] for part in parts} == {"What is the total?"}
    assert all(part.footprint == measure(part.request) for part in parts)
    assert all(part.request.sampling == SAMPLING for part in parts)
    assert {part.degraded for part in parts} == {
        (
            f"the 3 pictures are answered one by one: together they need {needed(request):,} tokens, the question and "
            f"the answer included, and the memory allows {needed(ask([PAGE, CLIP], 'wait')):,} tokens of context",
        )
    }


def test_a_picture_that_does_not_fit_even_alone_is_named():
    with pytest.raises(DoesNotFitError, match=r"^picture page\.png, even alone, needs \d+ tokens"):
        run(ask([PHOTO, PAGE], "one-by-one"), needed(ask([PAGE], "wait")) - 1)


def test_a_turn_that_is_only_a_picture_cannot_be_divided():
    turns = (Message("user", (PAGE,)), Message("assistant", ("A page.",)), Message("user", (PHOTO, "And this?")))
    with pytest.raises(DoesNotFitError, match=r"^the request needs"):
        run(Request(turns, SAMPLING, "one-by-one"), needed(ask([PAGE], "wait")) + 50)


def test_a_conversation_is_repeated_for_each_of_its_pictures():
    turns = (Message("user", (PAGE, "This?")), Message("assistant", ("",)), Message("user", (PHOTO, "And this?")))
    parts = run(Request(turns, SAMPLING, "one-by-one"), needed(ask([PAGE], "wait")) + 50)
    contents = [[message.content for message in part.request.messages] for part in parts]
    assert contents == [
        [(PAGE, "This?"), ("",), ("And this?",)],
        [("This?",), ("",), (PHOTO, "And this?")],
    ]


# --- the answers together ---------------------------------------------------------------------------------------

STOP, LENGTH, CANCELLED = FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED


def result(request, text, ids, reason=STOP, seconds=2.0, peak_bytes=None):
    return Result(text, ids, reason, measure(request), seconds, seconds / 2, peak_bytes, ("told",))


def test_answers_are_listed_by_name_and_their_costs_added():
    requests = [ask([CLIP, PAGE], "wait"), ask([CLIP, PHOTO], "wait")]
    listed = Listing(requests).result(
        [result(requests[0], "12", (1, 2), seconds=2.0, peak_bytes=7), result(requests[1], "", (3,), LENGTH, 4.0)]
    )
    assert listed.text == "page.png: 12\nphoto.jpg: "
    assert (listed.ids, listed.finish_reason, listed.degraded) == ((1, 2, 3), LENGTH, ("told",))
    assert (listed.seconds, listed.first_token_seconds, listed.peak_memory_bytes) == (4.0, 1.0, 7)
    assert listed.footprint.prompt_tokens == sum(measure(request).prompt_tokens for request in requests)
    assert listed.footprint.images == tuple(measure(request).images[0] for request in requests)
    assert len(listed.footprint.clips) == 2


def test_one_answer_is_left_as_it_is():
    request = ask([PAGE, PHOTO], "wait")
    one = result(request, "12", (1,))
    assert Listing([request]).result([one]) is one
    pieces = [Delta("1", (1,)), Delta("2", (2,), STOP, ("told",))]
    listing = Listing([request])
    assert [listing.add(piece) for piece in pieces] == pieces


@pytest.mark.parametrize(
    ("reasons", "whole"), [((STOP, STOP), STOP), ((LENGTH, STOP), LENGTH), ((STOP, CANCELLED), CANCELLED)]
)
@given(st.lists(st.lists(st.text(max_size=3), max_size=3), min_size=2, max_size=2))
def test_pieces_make_the_list(reasons, whole, texts):
    requests = [ask([PAGE], "wait"), ask([PHOTO], "wait")]
    listing, pieces = Listing(requests), []
    for answer, reason in zip(texts, reasons, strict=True):
        pieces += [listing.add(Delta(text, (5,))) for text in answer]
        pieces.append(listing.add(Delta("", (6,), reason, ("told",), cached_tokens=4)))
    results = [result(r, "".join(t), (), e) for r, t, e in zip(requests, texts, reasons, strict=True)]
    assert "".join(piece.text for piece in pieces) == Listing(requests).result(results).text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole]
    assert [piece.degraded for piece in pieces] == [()] * (len(pieces) - 1) + [("told",)]
    assert sum(len(piece.ids) for piece in pieces) == len(pieces)
    assert sum(piece.cached_tokens for piece in pieces) == 8


# --- not now ----------------------------------------------------------------------------------------------------


def test_a_refusal_for_now_has_numbers():
    assert str(not_now(700, 320, 3, 8, 2)) == (
        "the request would have to wait: with the first stretch of its answer it needs 700 tokens of context and 320 "
        "are free, 3 of at most 8 requests run and 2 wait before it; send it again later, or let it wait "
        "(--on-pressure wait)"
    )


def test_deciding_imports_no_torch():
    code = "import sys, memphi.engine.pressure; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
