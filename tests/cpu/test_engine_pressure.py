"""Requests that never fit, or not now, on an engine with a small pool: what is changed is told, and nothing else is."""

import asyncio
from dataclasses import replace

import pytest

from memphi.engine.engine import Engine
from memphi.engine.sequence import State
from memphi.errors import DoesNotFitError, RequestError
from memphi.request import FinishReason, Message, Request
from tests.scenes import GREEDY, Stage, clip, picture, plan_of

PAGES = 17
"""Room for 272 tokens. The large picture has 6 crops and 125 tokens; 75 in 4 crops, 49 in 2 and 36 in 1."""
LARGE, SMALL = picture(1, 330, 220), picture(2, 100, 110)
QUESTION = "How many?"


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    built = Engine(model, tokenizer, plan=plan_of(model, pages=PAGES))
    yield built
    built.close()


def ask(media, on_pressure="wait", sampling=GREEDY):
    return Request.ask(QUESTION, media, sampling=sampling, on_pressure=on_pressure)


def in_detail(media, detail):
    return replace(media, detail=detail)


def gather(engine, request):
    async def hear():
        return [delta async for delta in engine.submit(request)]

    return asyncio.run(hear())


def check_pieces(pieces, result):
    """Pieces make the result, and the last one tells what it tells."""
    assert "".join(piece.text for piece in pieces) == result.text
    assert tuple(i for piece in pieces for i in piece.ids) == result.ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [result.finish_reason]
    assert [piece.degraded for piece in pieces] == [()] * (len(pieces) - 1) + [result.degraded]


def check_empty(engine):
    scheduler = engine.loop.scheduler
    scheduler.check()
    assert not scheduler.sequences
    assert scheduler.reservations.claimed_pages == 0


# --- it can never fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["wait", "shrink-images", "one-by-one", "refuse"])
def test_what_fits_is_not_changed(engine, choice):
    plain = engine.generate(ask([LARGE]))
    result = engine.generate(ask([LARGE], choice))
    assert (result.ids, result.footprint, result.degraded) == (plain.ids, plain.footprint, ())
    check_pieces(list(engine.stream(ask([LARGE], choice))), result)


@pytest.mark.parametrize("choice", ["wait", "refuse"])
def test_what_may_not_be_changed_is_refused(engine, choice):
    for start in (engine.generate, engine.stream, lambda request: gather(engine, request)):
        with pytest.raises(DoesNotFitError, match=f"needs .* memory for {PAGES * 16};"):
            start(ask([LARGE] * 3, choice))


def test_shrunk_pictures_give_the_answer_of_that_detail_set_by_hand(engine):
    request = ask([LARGE, SMALL, LARGE, clip(1)], "shrink-images")
    result = engine.generate(request)
    by_hand = engine.generate(ask([in_detail(LARGE, 4), SMALL, in_detail(LARGE, 4), clip(1)]))
    assert (result.ids, result.text, result.footprint) == (by_hand.ids, by_hand.text, by_hand.footprint)
    told = f"picture {LARGE.name} is seen in 4 crops instead of 6: the memory allows 272 tokens of context"
    assert result.degraded == (told, told)
    check_pieces(list(engine.stream(request)), result)
    check_pieces(gather(engine, request), result)


def test_low_detail_is_the_last_step(engine):
    request = ask([LARGE] * 6, "shrink-images")
    result = engine.generate(request)
    assert result.ids == engine.generate(ask([in_detail(LARGE, "low")] * 6)).ids
    assert all("is seen in 1 crop instead of 6" in sentence for sentence in result.degraded)
    with pytest.raises(DoesNotFitError, match="even with its pictures as small as they can be seen"):
        engine.generate(ask([LARGE] * 8, "shrink-images"))


def test_a_picture_too_narrow_for_low_detail_is_no_error(engine):
    strip = picture(3, 1100, 80)
    with pytest.raises(RequestError, match="too narrow"):
        engine.generate(ask([in_detail(strip, "low")]))
    result = engine.generate(ask([*[LARGE] * 5, strip], "shrink-images"))
    assert [image.crops - 1 for image in result.footprint.images] == [1] * 5 + [2]
    assert result.ids == engine.generate(ask([*[in_detail(LARGE, "low")] * 5, in_detail(strip, 2)])).ids


def test_more_than_the_model_s_context_is_shrunk_too(engine):
    """Beyond it a request cannot even be measured otherwise."""
    many = ask([SMALL] * 300, "shrink-images")
    with pytest.raises(DoesNotFitError, match="the model's context holds 8192"):
        engine.generate(replace(many, on_pressure="wait"))
    with pytest.raises(DoesNotFitError, match="memory for 272"):
        engine.generate(many)
    result = engine.generate(ask([SMALL] * 300, "one-by-one"))
    assert len(result.text.split(f"{SMALL.name}: ")) == 301
    assert len(result.footprint.images) == 300


def test_one_by_one_lists_the_answers_of_each_picture_alone(engine):
    media = [LARGE, clip(1), SMALL, replace(LARGE, name="again")]
    request = ask(media, "one-by-one")
    alone = [engine.generate(ask([m, clip(1)] if m is LARGE else [clip(1), m])) for m in media if m.kind == "image"]
    result = engine.generate(request)
    names = [LARGE.name, SMALL.name, "again"]
    assert result.text == "\n".join(f"{name}: {answer.text}" for name, answer in zip(names, alone, strict=True))
    assert result.ids == tuple(i for answer in alone for i in answer.ids)
    assert result.finish_reason is FinishReason.LENGTH
    assert result.footprint.prompt_tokens == sum(answer.footprint.prompt_tokens for answer in alone)
    assert len(result.degraded) == 1
    assert result.degraded[0].startswith("the 3 pictures are answered one by one: together they need ")
    check_pieces(list(engine.stream(request)), result)
    check_pieces(gather(engine, request), result)


def test_changed_requests_keep_their_places_among_others(engine):
    requests = [ask([LARGE] * 3, "one-by-one"), ask([]), ask([LARGE] * 3, "shrink-images"), ask([SMALL])]
    together = engine.generate(requests)
    assert [r.text for r in together] == [engine.generate(request).text for request in requests]
    assert [bool(r.degraded) for r in together] == [True, False, True, False]


def test_leaving_a_divided_stream_frees_what_it_held(engine):
    stream = engine.stream(ask([LARGE] * 3, "one-by-one"))
    next(stream)
    stream.close()
    engine.generate(ask([]))  # the stream's end has been read before it
    check_empty(engine)

    async def leave():
        pieces = engine.submit(ask([LARGE] * 3, "one-by-one"))
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())
    engine.generate(ask([]))
    check_empty(engine)


def test_a_conversation_that_outgrew_the_memory_goes_on(engine):
    turns = (Message("user", (LARGE, "This?")), Message("assistant", ("A.",)), Message("user", (LARGE, "And this?")))
    with pytest.raises(DoesNotFitError):
        engine.generate(Request(turns, GREEDY))
    assert engine.generate(Request(turns, GREEDY, "shrink-images")).degraded
    assert engine.generate(Request(turns, GREEDY, "one-by-one")).degraded


def test_a_choice_that_there_is_not_is_refused(engine):
    with pytest.raises(RequestError, match="on_pressure is 'hope'"):
        engine.generate(ask([SMALL], "hope"))


# --- it does not fit now ----------------------------------------------------------------------------------------


def error_of(stage, request):
    return stage.ends.get(stage.submit(request))


@pytest.fixture
def stage(model, tokenizer):
    return RefusingStage(model, tokenizer, pages=PAGES)


class RefusingStage(Stage):
    """A stage that hears at once whether a request is refused."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        add = self.loop.add
        self.loop.add = lambda *sequence: self._hear(add(*sequence))


def test_one_that_may_not_wait_runs_where_there_is_room(stage):
    first, second = stage.submit(ask([SMALL])), stage.submit(ask([SMALL], "refuse"))
    assert [s.state for s in stage.scheduler.sequences] == [State.PREPARING] * 2
    stage.run()
    assert stage.result(first).ids == stage.result(second).ids
    stage.check_empty()


def test_one_that_may_not_wait_is_refused_with_the_numbers_of_that_moment(stage, engine):
    first, refused = stage.submit(ask([LARGE])), ask([LARGE], "refuse")
    needed = engine.measure(refused).prompt_tokens + GREEDY.max_tokens - 1
    free = 272 - -(-needed // 16) * 16
    error = error_of(stage, refused)
    assert isinstance(error, DoesNotFitError)
    assert f"it needs {needed} tokens of context and {free} are free, 1 of at most" in str(error)
    assert "and 0 wait before it" in str(error)
    assert len(stage.scheduler.sequences) == 1
    stage.run()
    assert stage.loop.stats.ended["failed"] == 1
    # What was refused before is let in now.
    assert stage.answer([refused])[0].ids == stage.result(first).ids
    stage.check_empty()


def test_one_that_may_not_wait_passes_nobody(stage):
    stage.submit(ask([LARGE]))
    waiting = stage.submit(ask([LARGE]))
    error = error_of(stage, ask([], "refuse"))
    assert "and 1 wait before it" in str(error)
    stage.run()
    assert len(stage.result(waiting).ids) == GREEDY.max_tokens


def test_one_that_may_not_wait_needs_a_row(model, tokenizer):
    stage = RefusingStage(model, tokenizer, pages=PAGES, rows=1)
    stage.submit(ask([]))
    assert "1 of at most 1 requests run" in str(error_of(stage, ask([], "refuse")))
    stage.run()
    stage.check_empty()


def test_without_pages_only_rows_decide(model, tokenizer):
    stage = RefusingStage(model, tokenizer, rows=1, kv_cache=False)
    stage.submit(ask([]))
    assert "nothing is kept between steps, 1 of at most 1" in str(error_of(stage, ask([], "refuse")))
    stage.run()
    assert stage.answer([ask([], "refuse")])[0].ids


def test_without_pages_no_more_embeddings_are_held_than_were_planned(model, tokenizer):
    stage = Stage(model, tokenizer, rows=8, kv_cache=False)
    pictures = [[picture(10 * i + j, 600, 600) for j in range(4)] for i in range(4)]
    numbers = [stage.submit(Request.ask("x", each, sampling=GREEDY)) for each in pictures]
    most_bytes = 0
    while stage.loop.has_work:
        stage.step()
        most_bytes = max(most_bytes, stage.scheduler.media.held_bytes)
    assert all(stage.result(number).ids for number in numbers)
    assert 0 < most_bytes <= stage.plan.media_bytes


def test_callers_hear_a_refusal_and_the_engine_goes_on(engine):
    long = ask([LARGE], sampling=replace(GREEDY, max_tokens=100))
    expected = engine.generate(long)
    stream = engine.stream(long)
    pieces = [next(stream)]
    with pytest.raises(DoesNotFitError, match="would have to wait"):
        engine.generate(ask([LARGE], "refuse"))
    with pytest.raises(DoesNotFitError, match="would have to wait"):
        gather(engine, ask([LARGE], "refuse"))
    check_pieces([*pieces, *stream], expected)
    assert engine.generate(ask([LARGE], "refuse")).ids == engine.generate(ask([LARGE])).ids
    check_empty(engine)
