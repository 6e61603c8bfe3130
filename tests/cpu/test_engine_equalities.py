"""What may not change an answer does not: chunks, pages, company, pauses, rungs, slices, crossing, others that go.

Loops are stepped by hand, so every run is the same; answers are compared id by id, in fp32.
"""

from dataclasses import replace

import pytest
import torch

from memphi.engine.rungs import make_rungs
from memphi.inputs.prompt import prepare
from memphi.model.rows import Row
from memphi.request import FinishReason, Request
from tests.checkpoints import tiny_config
from tests.scenes import (
    GREEDY,
    Stage,
    alone,
    clip,
    conversation,
    lively_model,
    mixed_requests,
    picture,
)

SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)


def compute_plainly(model, tokenizer, request):
    """Ids by the definition: no engine, no pages, every token from the beginning."""
    prompt = prepare(request, model.config, tokenizer)
    media = model.encode_media(prompt)
    forbidden = ~torch.from_numpy(tokenizer.known_ids(model.config.language.vocab_size))
    ids = list(prompt.ids)
    for _ in range(request.sampling.max_tokens):
        row = Row(len(ids), 0, prompt.mode.adapter, model.config.language.is_long(len(ids)))
        logits = model(torch.tensor(ids), [row], media)
        ids.append(int(logits[0].masked_fill(forbidden, -torch.inf).argmax()))
    return tuple(ids[len(prompt.ids) :])


def until_running(stage):
    while not all(s.state.value == "running" for s in stage.scheduler.sequences):
        stage.step()


@torch.inference_mode()
def test_the_engine_computes_what_the_model_is_defined_to(model, tokenizer, expected):
    assert [compute_plainly(model, tokenizer, request) for request in mixed_requests()] == expected
    assert len(set(expected)) == len(expected)
    assert all(len(set(ids)) > 5 for ids in expected)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, replace(GREEDY, repetition_penalty=1.3)])
def test_together_equals_alone(model, tokenizer, stage, sampling):
    requests = mixed_requests(sampling)
    together = stage()
    together.answer(requests)
    assert together.steps < 25
    assert [together.result(i).ids for i in range(5)] == [r.ids for r in alone(model, tokenizer, requests)]
    together.check_empty()


@pytest.mark.parametrize("settings", [{"step_tokens": 1}, {"step_tokens": 7}, {"step_tokens": 40, "rows": 2}])
def test_chunks_equal_the_whole(stage, expected, settings):
    chunked = stage(**settings)
    assert chunked.ids(mixed_requests()) == expected
    chunked.check_empty()


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 200}, {"rows": 1}])
def test_without_a_cache_answers_are_the_same(stage, expected, settings):
    whole = stage(pages=None, kv_cache=False, **settings)
    assert whole.pool is None
    assert whole.ids(mixed_requests()) == expected
    whole.check_empty()


@pytest.mark.parametrize("crops", [1, 3, 8])
def test_crops_made_as_they_are_encoded_equal_those_made_ahead(stage, expected, crops):
    made = stage(preprocessing="device", crops_per_pass=crops)
    assert made.plan.preprocessing == "device"
    assert made.ids(mixed_requests()) == expected
    made.check_empty()


def test_a_known_beginning_is_not_computed_again(stage, model, tokenizer):
    shared = stage()
    first, second = conversation(1), conversation(2)
    wanted = [r.ids for r in alone(model, tokenizer, [first, second])]
    assert shared.ids([first]) == wanted[:1]
    stats = shared.loop.stats
    encoded, computed, footprint = stats.encoded_units, stats.prompt_tokens, shared.result(0).footprint
    assert encoded == footprint.crops
    assert computed == footprint.prompt_tokens
    assert not stats.shared_tokens
    assert shared.ids([first]) == wanted[:1]
    page = shared.plan.page_tokens
    assert stats.shared_tokens == (footprint.prompt_tokens - 1) // page * page
    assert [shared.result(number).cached_tokens for number in (0, 1)] == [0, stats.shared_tokens]
    assert stats.prompt_tokens == computed + footprint.prompt_tokens - stats.shared_tokens
    known, computed = stats.shared_tokens, stats.prompt_tokens
    assert shared.ids([second]) == wanted[1:]
    assert stats.shared_tokens - known >= footprint.image_tokens
    assert stats.encoded_units == encoded
    shared.check_empty()


def test_requests_that_run_together_share_pages(stage, model, tokenizer):
    requests = [conversation(turns) for turns in (1, 2, 3)]
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    together = stage()
    together.submit(requests[0])
    until_running(together)
    together.step()
    others = [together.submit(request) for request in requests[1:]]
    until_running(together)
    together.step()
    pages = together.scheduler.reservations.pages
    assert max(pages.users(page) for page in range(pages.capacity)) == 3
    together.run()
    assert [together.result(i).ids for i in (0, *others)] == wanted
    together.check_empty()


def test_the_same_words_about_other_media_are_another_beginning(stage, model, tokenizer):
    requests = [
        Request.ask("What is it?", [picture(1, 60, 60)], sampling=GREEDY),
        Request.ask("What is it?", [picture(2, 60, 60)], sampling=GREEDY),
        Request.ask("What is it?", [replace(picture(1, 60, 60), detail="low")], sampling=GREEDY),
        Request.ask("What is it?", [clip(1, 0.5)], sampling=GREEDY),
        Request.ask("What is it?", [clip(2, 0.5)], sampling=GREEDY),
        Request.ask("What is it?", [clip(1, 0.5), picture(1, 60, 60)], sampling=GREEDY),
        Request.ask("What is it?", [clip(1, 0.5), picture(2, 60, 60)], sampling=GREEDY),
    ]
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    one_after_another = stage()
    assert [one_after_another.ids([request])[0] for request in requests] == wanted
    assert [one_after_another.ids([request])[0] for request in reversed(requests)] == wanted[::-1]
    assert stage().ids(requests) == wanted
    assert len(set(wanted)) > 5


def test_several_pictures_are_answered_jointly(stage):
    pair = stage()
    footprint = pair.answer([mixed_requests()[4]])[0].footprint
    assert len(footprint.images) == 2
    base = Request.ask("Compare.", [picture(3), picture(4, 60, 60)], sampling=GREEDY)
    variants = [
        base,
        Request.ask("Compare.", [picture(3), picture(5, 60, 60)], sampling=GREEDY),
        Request.ask("Compare.", [picture(6), picture(4, 60, 60)], sampling=GREEDY),
        Request.ask("Compare.", [picture(4, 60, 60), picture(3)], sampling=GREEDY),
    ]
    assert len(set(stage().ids(variants))) == len(variants)


def test_a_picture_in_several_requests_is_encoded_once(stage, expected):
    twice = stage()
    request = mixed_requests()[1]
    assert twice.ids([request, request, request]) == [expected[1]] * 3
    assert twice.loop.stats.encoded_units == twice.result(0).footprint.crops
    in_one = stage()
    both = Request.ask("Same?", [picture(1), picture(1)], sampling=GREEDY)
    assert in_one.answer([both])[0].footprint.crops == 2 * in_one.loop.stats.encoded_units


def test_who_encodes_a_shared_picture_may_go_away(stage, expected):
    """The one whose slices were encoded is cancelled half-way; the other goes on from there."""
    request = mixed_requests()[1]
    shared = stage(crops_per_pass=1)
    first, second = shared.submit(request), shared.submit(request)
    shared.step()
    shared.step()
    shared.cancel(first)
    shared.run()
    assert shared.result(second).ids == expected[1]
    assert shared.loop.stats.encoded_units == shared.result(second).footprint.crops
    shared.check_empty()


@pytest.mark.parametrize(("crops", "windows"), [(1, 1), (2, 3), (37, 8)])
def test_slices_of_any_size_encode_the_same(stage, model, tokenizer, crops, windows):
    requests = [
        Request.ask("Read.", [picture(7, 330, 220), picture(8, 100, 300)], sampling=GREEDY),
        Request.ask("", [clip(3, 7.1), clip(4, 2.4), clip(5, 0.2)], sampling=GREEDY),
        Request.ask("Both.", [clip(6, 5.0), picture(9, 230, 120)], sampling=GREEDY),
    ]
    sliced = stage(pages=256, crops_per_pass=crops, windows_per_pass=windows)
    assert sliced.plan.crops_per_pass == crops
    assert sliced.ids(requests) == [r.ids for r in alone(model, tokenizer, requests)]
    sliced.check_empty()


LONG = replace(GREEDY, max_tokens=100)


def test_paused_and_resumed_equals_uninterrupted(model, tokenizer, stage):
    """A pool that holds any one of them, and not their growth together."""
    requests = mixed_requests(LONG)
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    tight = stage(pages=20)
    assert tight.ids(requests) == wanted
    tight.check_empty()


def test_growth_pauses_the_newest(model, tokenizer, stage):
    """Answers that outgrow the first stretch, in a pool for one and a half."""
    sampling = replace(GREEDY, max_tokens=400)
    requests = [Request.ask(text, sampling=sampling) for text in ("One.", "Two and three.", "Four?")]
    wanted = [r.ids for r in alone(model, tokenizer, requests)]
    tight = stage(pages=46)
    assert tight.ids(requests) == wanted
    assert tight.loop.stats.pauses > 0
    assert list(tight.ends) == [0, 1, 2]
    tight.check_empty()


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_pause_at_any_step_changes_nothing(stage, expected, every):
    paused = stage(step_tokens=20, crops_per_pass=1)
    for request in mixed_requests():
        paused.submit(request)
    for _ in range(5000):
        if not paused.loop.has_work:
            break
        paused.step()
        newest = next(reversed(paused.scheduler.active), None)
        oldest = paused.scheduler.sequences[:1]
        if paused.steps % every == 0 and newest is not None and [newest] != oldest:
            paused.scheduler.pause(newest)
    assert [paused.result(i).ids for i in range(5)] == expected
    assert paused.loop.stats.pauses > 3
    paused.check_empty()


RUNGS = [
    "drop idle media embeddings",
    "drop idle pages",
    "halve the encoders' slice",
    "halve the prefill chunk",
    "pause the newest request",
]


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_changes_no_answer(stage, expected, name):
    lowered = stage(crops_per_pass=4, step_tokens=64, rows=1 if "idle" in name else 8)
    rung = next(r for r in make_rungs(lowered.scheduler, lowered.pool, lowered.model.device) if r.name == name)
    lowered.ids(mixed_requests())  # So that something is idle.
    lowered.scheduler.reservations.pages.drop_idle(2)  # And something is computed anew.
    if "slice" in name:
        lowered.scheduler.media.drop_idle()
    limits, taken = lowered.scheduler.limits, 0
    run = lowered.loop.runner.run
    plans = []
    lowered.loop.runner.run = lambda plan: plans.append(plan) or run(plan)
    numbers = [lowered.submit(request) for request in mixed_requests()]
    while lowered.loop.has_work:
        taken += bool(plans and rung.take(plans[-1]))
        lowered.step()
    assert [lowered.result(number).ids for number in numbers] == expected
    assert taken
    if name not in RUNGS[:2]:
        for _ in range(taken):
            rung.undo()
    assert lowered.scheduler.limits == limits
    lowered.check_empty()


def test_no_rung_is_left_out(stage):
    whole = stage()
    names = [rung.name for rung in make_rungs(whole.scheduler, whole.pool, whole.model.device)]
    assert names == ["return cached blocks", *RUNGS[:2], "make no drafts", *RUNGS[2:]]


@pytest.fixture(scope="module")
def crossing_model():
    """It goes over into the rope factors for long sequences at 96 tokens."""
    return lively_model(tiny_config(short_tokens=96, max_tokens=512))


CROSSING = replace(GREEDY, max_tokens=70)


@pytest.fixture(scope="module")
def crossed(crossing_model, tokenizer):
    with torch.inference_mode():
        return [compute_plainly(crossing_model, tokenizer, request) for request in mixed_requests(CROSSING)]


@pytest.mark.parametrize(
    ("pages", "settings"),
    [
        (128, {}),
        (128, {"step_tokens": 9}),
        (14, {}),
        (24, {"rows": 3}),
        (None, {"kv_cache": False}),
    ],
)
def test_crossing_equals_starting_over_while_others_go_on(crossing_model, tokenizer, crossed, pages, settings):
    crossing = Stage(crossing_model, tokenizer, pages, **{"rows": 8, **settings})
    assert crossing.ids(mixed_requests(CROSSING)) == crossed
    prompts = [crossing.result(i).footprint.prompt_tokens for i in range(5)]
    assert min(prompts) < 96 < max(prompts)
    crossing.check_empty()


def test_pages_of_one_rope_regime_are_not_found_in_the_other(crossing_model, tokenizer, crossed):
    crossing = Stage(crossing_model, tokenizer, 128, rows=8)
    first = mixed_requests(CROSSING)[0]
    assert crossing.ids([first]) == crossed[:1]
    text = first.messages[0].content[0]
    longer = Request.ask(text + " And once more." * 20, sampling=GREEDY)
    with torch.inference_mode():
        wanted = compute_plainly(crossing_model, tokenizer, longer)
    assert crossing.ids([longer, first]) == [wanted, crossed[0]]


def test_a_request_cancelled_at_any_step_leaves_the_others_alone(stage, expected):
    settings = {"step_tokens": 30, "crops_per_pass": 2}
    undisturbed = stage(**settings)
    undisturbed.ids(mixed_requests())
    for step in range(undisturbed.steps):
        cancelled = step % 5
        disturbed = stage(**settings)
        for request in mixed_requests():
            disturbed.submit(request)
        for _ in range(step):
            disturbed.step()
        disturbed.cancel(cancelled)
        disturbed.scheduler.check()
        assert not disturbed.cancel(cancelled), "a request ends once"
        disturbed.run()
        for number, ids in enumerate(expected):
            result = disturbed.result(number)
            if number != cancelled or result.finish_reason is not FinishReason.CANCELLED:
                assert result.ids == ids
            else:
                assert result.ids == ids[: len(result.ids)]
        disturbed.check_empty()


def test_stop_strings_end_an_answer_among_others(model, tokenizer, stage):
    sampling = replace(GREEDY, max_tokens=30)
    texts = [r.text for r in alone(model, tokenizer, mixed_requests(sampling))]
    stops = [text[5:8] for text in texts]
    requests = [
        replace(request, sampling=replace(sampling, stop=(stop, "never said")))
        for request, stop in zip(mixed_requests(), stops, strict=True)
    ]
    results = stage().answer(requests)
    assert [r.text for r in results] == [text[: text.index(stop)] for text, stop in zip(texts, stops, strict=True)]
    assert all(r.finish_reason is FinishReason.STOP for r in results)


def test_an_answer_whose_text_cannot_be_made_fails_alone(model, tokenizer, stage, monkeypatch):
    expected = [result.ids for result in alone(model, tokenizer, mixed_requests())]
    together = stage()
    numbers = [together.submit(request) for request in mixed_requests()]
    struck = together.loop._answers[numbers[1]]
    advance = type(struck).advance

    def strike(answer):
        if answer is struck:
            raise TypeError("must be str, not int")
        return advance(answer)

    monkeypatch.setattr(type(struck), "advance", strike)
    together.run()
    with pytest.raises(TypeError, match="must be str"):
        together.result(numbers[1])
    others = [number for number in numbers if number != numbers[1]]
    assert [together.result(number).ids for number in others] == [expected[number] for number in others]
    together.check_empty()


def test_pieces_have_all_text_and_all_ids(stage):
    """Ids whose text is held back, as parts of a character or of a stop string, come later and are not lost."""
    streamed = stage()
    sampling = replace(GREEDY, max_tokens=60, temperature=1.5, seed=5, stop=("no such words", "\ufffd\ufffd\ufffd!"))
    for request in mixed_requests(sampling):
        number = streamed.submit(request)
        streamed.run()
        result, pieces = streamed.result(number), streamed.deltas[number]
        assert "".join(piece.text for piece in pieces) == result.text
        assert tuple(i for piece in pieces for i in piece.ids) == result.ids
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason is result.finish_reason
        assert any(len(piece.ids) > 1 for piece in pieces)
