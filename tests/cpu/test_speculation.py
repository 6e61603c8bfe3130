"""Guessing the next tokens changes how many steps an answer takes, and nothing else: ids, text, log-probabilities, why
it ended, and what later requests find of it."""

import json
from dataclasses import replace
from itertools import count

import pytest
import torch

from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.config import EngineConfig
from memphi.engine.prices import draft_step_tokens, price_rows
from memphi.engine.rungs import make_rungs
from memphi.memory import costs
from memphi.memory.devices import DeviceFacts
from memphi.memory.planner import make_plan
from memphi.request import FinishReason, Grammar, Message, Request, SamplingParams
from tests.checkpoints import STOP_TOKEN_IDS, tiny_config, tiny_model
from tests.scenes import Stage, mixed_requests, plan_of

LONG = SamplingParams(max_tokens=80, ignore_eos=True)


def make_model(**sizes):
    """It repeats itself now and then, between what never does and what does nothing else."""
    model = tiny_model(tiny_config(**{"short_tokens": 4096, "max_tokens": 8192, **sizes}))
    for name, weight in model.language.layers.named_parameters():
        if weight.dim() == 2 and not name.endswith(".b"):
            weight.mul_(1.4)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def same(results, wanted):
    for result, other in zip(results, wanted, strict=True):
        assert (result.ids, result.text, result.finish_reason) == (other.ids, other.text, other.finish_reason)
        assert [told.id for told in result.logprobs] == [told.id for told in other.logprobs]
        for told, known in zip(result.logprobs, other.logprobs, strict=True):
            assert told.logprob == pytest.approx(known.logprob, abs=1e-3)
            assert dict(told.top) == pytest.approx(dict(known.top), abs=1e-3)


@pytest.fixture
def compare(model, stage):
    """Answer requests with and without drafts; returns the loop that had them, and its results."""

    def run(requests, pages=256, **settings):
        wanted = stage(pages, speculation=False, **settings)
        guessing = stage(pages, **settings)
        results = guessing.answer(requests)
        same(results, wanted.answer(requests))
        assert wanted.loop.stats.drafted_tokens == 0
        stats = guessing.loop.stats
        assert stats.answer_tokens >= sum(len(result.ids) for result in results)
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        guessing.check_empty()
        return guessing, results

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "seed": 3},
        {"temperature": 0.4, "top_k": 20, "min_p": 0.05, "seed": 8},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.05},
        {"temperature": 0.3, "frequency_penalty": 0.02, "logit_bias": ((101, 1.0), (102, 1.5))},
        {"top_logprobs": 3},
        {"top_logprobs": 0, "temperature": 0.5},
        {"ignore_eos": False, "logit_bias": tuple((number, 1.5) for number in STOP_TOKEN_IDS)},
        {"max_tokens": 33},
    ],
    ids=str,
)
def test_guesses_change_no_answer(compare, settings):
    compare(mixed_requests(replace(LONG, **settings)))


def test_guesses_save_steps(compare, stage, model):
    request = mixed_requests(LONG)[1]
    guessing, _ = compare([request])
    plain = stage(256, speculation=False)
    plain.answer([request])
    stats = guessing.loop.stats
    assert plain.steps - guessing.steps == stats.accepted_tokens
    assert (stats.prompt_tokens, stats.answer_tokens) == (
        plain.loop.stats.prompt_tokens,
        plain.loop.stats.answer_tokens,
    )


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_no_answer_is_longer_than_asked_for(model, stage, most):
    requests = mixed_requests(replace(LONG, max_tokens=most))
    results = stage(256).answer(requests)
    assert all((len(r.ids), r.finish_reason) == (most, FinishReason.LENGTH) for r in results)
    same(results, stage(256, speculation=False).answer(requests))


def test_the_context_s_end_is_kept_to(tokenizer):
    small = make_model(short_tokens=64, max_tokens=110)
    requests = [Request.ask("One and one and one and one.", sampling=replace(LONG, max_tokens=None)) for _ in range(2)]
    wanted, guessing = (Stage(small, tokenizer, 64, rows=8, speculation=on) for on in (False, True))
    results = guessing.answer(requests)
    same(results, wanted.answer(requests))
    assert guessing.loop.stats.accepted_tokens > 0
    assert all(r.footprint.prompt_tokens + len(r.ids) == 110 for r in results)


def test_stop_strings_within_accepted_guesses_end_the_answer_there(compare, stage):
    texts = [result.text for result in stage(256, speculation=False).answer(mixed_requests(LONG))]
    for place in (20, 40, 55):
        stops = [text[place : place + 3] for text in texts]
        requests = [
            replace(request, sampling=replace(LONG, stop=(stop, "never said"), top_logprobs=1))
            for request, stop in zip(mixed_requests(), stops, strict=True)
        ]
        guessing, results = compare(requests)
        assert all(result.finish_reason is FinishReason.STOP for result in results)
        for number, result in enumerate(results):
            pieces = guessing.deltas[number]
            assert "".join(piece.text for piece in pieces) == result.text
            assert tuple(i for piece in pieces for i in piece.ids) == result.ids
            assert tuple(told for piece in pieces for told in piece.logprobs) == result.logprobs


SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"enum": ["north", "south"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "size"],
        "additionalProperties": False,
    },
    "minItems": 8,
    "maxItems": 8,
}
GRAMMARS = [
    Grammar("regex", "(ab|cd|e[0-9]){30}"),
    Grammar("json_schema", json.dumps(SCHEMA)),
    Grammar("regex", r"(one two three four\. ){6}"),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_keep_to_a_grammar(compare, temperature):
    sampling = replace(LONG, max_tokens=900, temperature=temperature, seed=4)
    requests = [Request.ask("Go.", sampling=replace(sampling, grammar=grammar)) for grammar in GRAMMARS]
    _, results = compare([*requests, *mixed_requests(replace(LONG, temperature=temperature))])
    assert [result.finish_reason for result in results[:3]] == [FinishReason.STOP] * 3
    assert len(json.loads(results[1].text)) == 8


def test_a_grammar_is_read_once_whatever_is_guessed(stage, monkeypatch):
    """After a wrong guess it goes back, instead of reading all of the answer again."""
    from memphi.sampling.grammar import Matcher

    starts, start = [], Matcher._start
    monkeypatch.setattr(Matcher, "_start", lambda matcher: starts.append(matcher) or start(matcher))
    guessing = stage(256)
    guessing.answer([Request.ask("Go.", sampling=replace(LONG, max_tokens=900, grammar=GRAMMARS[1], temperature=1.0))])
    assert guessing.loop.stats.accepted_tokens < guessing.loop.stats.drafted_tokens
    assert len(starts) == 1


@pytest.mark.parametrize("every", [1, 3])
def test_a_pause_at_any_step_changes_nothing(stage, every):
    wanted = stage(256, speculation=False).answer(mixed_requests(LONG))
    paused = stage(256)
    for request in mixed_requests(LONG):
        paused.submit(request)
    while paused.loop.has_work:
        paused.step()
        active = paused.scheduler.active
        if len(active) > 1 and paused.steps % every == 0:
            paused.scheduler.pause(active[-1])
    same([paused.result(number) for number in range(5)], wanted)
    stats = paused.loop.stats
    assert min(stats.pauses, stats.accepted_tokens) > 3
    assert stats.shared_tokens > 100, "what steps with guesses computed is found again"
    paused.check_empty()


def test_a_full_pool_changes_nothing(stage):
    """Answers that outgrow the first stretch, in a pool for one and a half."""
    sampling = replace(LONG, max_tokens=400)
    requests = [Request.ask(text, sampling=sampling) for text in ("One.", "Two and three.", "Four?")]
    wanted, tight = stage(256, speculation=False), stage(46)
    same(tight.answer(requests), wanted.answer(requests))
    assert tight.loop.stats.pauses > 0
    assert tight.loop.stats.accepted_tokens > 0
    tight.check_empty()


@pytest.mark.parametrize("border", [90, 96, 97, 130])
def test_no_guess_crosses_into_long_positions(tokenizer, border):
    crossing = make_model(short_tokens=border, max_tokens=512)
    wanted, guessing = (Stage(crossing, tokenizer, 256, rows=8, speculation=on) for on in (False, True))
    results = guessing.answer(mixed_requests(LONG))
    same(results, wanted.answer(mixed_requests(LONG)))
    lengths = [(r.footprint.prompt_tokens, r.footprint.prompt_tokens + len(r.ids)) for r in results]
    assert any(first <= border < last for first, last in lengths)
    assert guessing.loop.stats.accepted_tokens > 0
    guessing.check_empty()


def test_who_goes_on_from_a_guessed_answer_finds_it_and_reads_the_same(stage):
    request = Request.ask("What is the sum of one and two?", sampling=LONG)
    guessing = stage(256)
    (first,) = guessing.answer([request])
    assert 0 < guessing.loop.stats.accepted_tokens < guessing.loop.stats.drafted_tokens
    computed = first.footprint.prompt_tokens + len(first.ids) - 1
    assert guessing.scheduler.reservations.pages.idle_pages == computed // guessing.plan.page_tokens
    following = Request((*request.messages, Message("assistant", (first.text,)), Message("user", ("And then?",))), LONG)
    same(guessing.answer([request, following]), stage(256, speculation=False).answer([request, following]))
    assert guessing.loop.stats.shared_tokens > 0


def test_a_step_that_is_done_again_changes_no_answer(stage):
    """Memory runs out after all that a step with guesses has done."""
    wanted = stage(256, speculation=False).answer(mixed_requests(LONG))
    struck = stage(256)
    run, steps = struck.loop.runner.run, count()

    def strike(plan):
        result = run(plan)
        if any(row.drafts for row in plan.rows) and next(steps) % 5 == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    struck.loop.runner.run = strike
    same(struck.answer(mixed_requests(LONG)[:3]), wanted[:3])
    assert struck.loop.stats.rungs
    assert struck.loop.stats.accepted_tokens > 0
    struck.check_empty()


def test_where_memory_is_short_guesses_go_first_and_come_back(stage):
    lowered = stage(256)
    rung = next(r for r in make_rungs(lowered.scheduler, lowered.pool, lowered.model.device) if "drafts" in r.name)
    run, plans = lowered.loop.runner.run, []
    lowered.loop.runner.run = lambda plan: plans.append(plan) or run(plan)
    limits = lowered.scheduler.limits
    for request in mixed_requests(LONG):
        lowered.submit(request)
    while not (plans and rung.take(plans[-1])):
        lowered.step()
    drafted = lowered.loop.stats.drafted_tokens
    for _ in range(20):
        lowered.step()
    assert lowered.loop.stats.drafted_tokens == drafted
    rung.undo()
    assert lowered.scheduler.limits == limits
    lowered.run()
    assert lowered.loop.stats.drafted_tokens > drafted
    same([lowered.result(i) for i in range(5)], stage(256, speculation=False).answer(mixed_requests(LONG)))


def test_a_step_with_guesses_stays_within_the_plan(stage):
    """Its price is no more than that of the largest step that the plan made room for."""
    guessing = stage(256)
    run, plans = guessing.loop.runner.run, []

    def note(plan):
        plans.append((plan, price_rows(plan, guessing.model.config, 4, True)[1], sum(row.scored for row in plan.rows)))
        return run(plan)

    guessing.loop.runner.run = note
    guessing.answer(mixed_requests(LONG))
    largest = next(cost.bytes for cost in guessing.plan.costs if cost.name == "largest step")
    drafted = [(price, scored) for plan, price, scored in plans if any(row.drafts for row in plan.rows)]
    assert len(drafted) > 5
    assert all(price <= largest for price, _ in drafted)
    assert max(scored for _, scored in drafted) <= guessing.scheduler.limits.draft_tokens <= 64


def test_a_small_plan_has_room_for_fewer_guesses(model):
    large = plan_of(model)
    assert draft_step_tokens(large, model.config, 4) == 64
    bounds = [cost for cost in large.costs if cost.name == "largest step"]
    logits = costs.logits(model.config, 9, 9, 4).bytes
    small = replace(large, costs=tuple(replace(cost, bytes=logits) for cost in bounds))
    assert draft_step_tokens(small, model.config, 4) < 10
    assert draft_step_tokens(replace(large, step_tokens=8), model.config, 4) == 8


def test_guesses_through_the_kernels_have_their_own_price():
    """The kernels take less for activations, and something for the pieces of attention that they put together."""
    config = read_config(official.folder())
    card = DeviceFacts("cuda", "a card", 24 * costs.GIB, 24 * costs.GIB)
    plan = make_plan(config, card, EngineConfig(memory_bytes=13 * costs.GIB, kernels="auto", scheme="bf16"))
    assert draft_step_tokens(plan, config, 2, kernels=True) == 64
    keys, all_keys = plan.context_tokens, plan.pages * plan.page_tokens
    pasts = costs.Pasts(keys, plan.rows, keys, all_keys, keys, plan.rows, 4)
    priced = costs.kernel_step(config, 9, pasts, 2, plan.adapters, plan.cache_format).bytes
    small = replace(plan, costs=(replace(plan.costs[0], name="largest step", bytes=priced),))
    assert 0 < draft_step_tokens(small, config, 2, kernels=True) <= 9


@pytest.mark.parametrize("settings", [{"speculation": False}, {"kv_cache": False, "pages": None}], ids=str)
def test_guesses_may_be_left_out(stage, settings):
    plain = stage(**{"pages": 256, **settings})
    plain.answer(mixed_requests(LONG)[:1])
    assert plain.loop.stats.drafted_tokens == 0
    assert plain.scheduler.limits.draft_tokens == 0
    assert EngineConfig().speculation
