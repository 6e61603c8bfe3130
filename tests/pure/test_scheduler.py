"""Whatever comes, goes, fails or shrinks meanwhile: every request gets the answer that it would get alone, and nobody
waits for ever."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memphi.engine import admission
from memphi.engine import drafts as drafting
from memphi.engine.scheduler import StepLimits
from memphi.engine.sequence import State
from memphi.engine.step import StepPlan
from memphi.request import FinishReason
from tests.pure.engine_simulation import (
    CLIPS,
    DOCUMENTS,
    IMAGES,
    LIMITS,
    MEDIA,
    PAGE_TOKENS,
    Case,
    Guesses,
    World,
    answer_alone,
    image_footprint,
    make_config,
    make_scheduler,
    text,
)

RUNGS = ("media", "pages", "drafts", "slice", "chunk", "pause")


@pytest.fixture(autouse=True, scope="module")
def short_stretch():
    """Stretches of answer as small as the pools here, so that growth is refused often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "FIRST_ANSWER_TOKENS", 12)
        yield


FAULTS = ("before", "after", "landing")


def world(flies=False, grounded=10**9, **settings):
    return World(make_scheduler(**settings), flies=flies, grounded=grounded)


# --- anything at any time -------------------------------------------------------------------------------------------

media_lists = st.lists(st.sampled_from(MEDIA), max_size=3).map(tuple)
lengths = st.integers(0, 24) | st.integers(0, 70)


@st.composite
def cases(draw):
    family = DOCUMENTS[draw(st.integers(0, 1))]
    return Case(
        tuple(family[: draw(lengths)]),
        draw(st.just(()) | media_lists),
        tuple(family[: draw(st.integers(1, 24))]),
        draw(st.none() | st.integers(1, 40)),
        draw(st.booleans()),
    )


def follow(case, answer, tokens):
    """The conversation goes on: prompt and answer, and more text."""
    more = (*case.after, *answer, *DOCUMENTS[2][:tokens])
    return replace(case, after=more)


drafts = st.sampled_from([0, 6, 30])
limits = st.builds(StepLimits, st.integers(1, 6), *[st.integers(1, n) for n in (60, 20, 5, 5)], drafts).map(
    lambda some: replace(some, shared_step_tokens=min(some.shared_step_tokens, some.step_tokens))
)


class SchedulerMachine(RuleBasedStateMachine):
    """Every operation in any order; `World` asserts what must hold after each and, at the end, the answers."""

    @initialize(
        pages=st.integers(8, 40),
        limits=limits,
        media_bytes=st.sampled_from([0, 30, 1000]),
        paged=st.sampled_from([True, True, True, False]),
        short_tokens=st.sampled_from([30, 32, 100]),
        flies=st.booleans(),
        grounded=st.sampled_from([2, 7, 10**9]),
    )
    def start(self, pages, limits, media_bytes, paged, short_tokens, flies, grounded):
        if not paged:
            limits = replace(limits, step_tokens=120)
        config = make_config(short_tokens)
        settings = {"config": config, "pages": pages, "limits": limits, "media_bytes": media_bytes, "paged": paged}
        self.world = world(flies and paged, grounded, **settings)

    def pick(self, data):
        return data.draw(st.sampled_from(self.world.scheduler.sequences))

    @rule(case=cases())
    def arrive(self, case):
        self.world.arrive(case)

    @precondition(lambda self: self.world.cases)
    @rule(data=st.data(), tokens=st.integers(1, 9))
    def arrive_again(self, data, tokens):
        number = data.draw(st.sampled_from(sorted(self.world.cases)))
        case, answer = self.world.cases[number], self.world.results.get(number, ((), None))[0]
        self.world.arrive(follow(case, answer, tokens) if answer else case)

    @rule(count=st.integers(1, 8), prepare=st.booleans())
    def step(self, count, prepare):
        for _ in range(count):
            self.world.step(prepare)

    @rule(fault=st.sampled_from(FAULTS), rung=st.sampled_from(RUNGS))
    def lose_a_step(self, fault, rung):
        if self.world.step(fault=fault):
            self.world.lower(rung)

    @rule()
    def climb(self):
        self.world.climb()

    @precondition(lambda self: self.world.preparing)
    @rule(data=st.data())
    def prepared(self, data):
        self.world.prepared(data.draw(st.integers(0, len(self.world.preparing) - 1)))

    @precondition(lambda self: self.world.scheduler.sequences)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data, fails):
        sequence = self.pick(data)
        self.world.fail(sequence) if fails else self.world.cancel(sequence)

    @precondition(lambda self: self.world.scheduler.paged)
    @rule(pages=st.integers(0, 50))
    def resize(self, pages):
        self.world.resize(pages)

    @invariant()
    def all_is_well(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def some_case(chance):
    family = chance.choice(DOCUMENTS[:2])
    media = tuple(chance.choices(MEDIA, k=chance.choice((0, 0, 1, 1, 2, 3))))
    tokens = chance.choice((0, 5, 16, 16, 32, 33, 60))
    most = chance.choice((None, None, 1, 4, 40, 60))
    return Case(tuple(family[:tokens]), media, tuple(family[: chance.randint(1, 20)]), most, chance.random() < 0.6)


def act(world, chance):
    """One operation, the likely ones often."""
    scheduler, draw = world.scheduler, chance.random()
    if draw < 0.15 and len(scheduler.sequences) < 12:
        done = [n for n, (_, reason) in world.results.items() if reason is FinishReason.LENGTH]
        some = chance.choice(done) if done and chance.random() < 0.3 else None
        case = some_case(chance) if some is None else follow(world.cases[some], world.results[some][0], 3)
        world.arrive(case)
    elif draw < 0.18 and scheduler.sequences:
        chance.choice((world.cancel, world.cancel, world.fail))(chance.choice(scheduler.sequences))
    elif draw < 0.24:
        if world.step(fault=chance.choice(FAULTS)):
            world.lower(chance.choice(RUNGS))
    elif draw < 0.25 and scheduler.paged:
        world.resize(chance.randint(0, world.capacity + 10))
    elif draw < 0.30:
        world.climb()
        world.resize(world.capacity)
    elif draw < 0.40 and world.preparing:
        world.prepared(chance.randrange(len(world.preparing)))
    else:
        world.step(prepare=chance.random() < 0.7)


def some_world(chance, paged, flies=False):
    tokens = chance.choice((3, 12, 40, 120)) if paged else 120
    shared, drafts = min(tokens, chance.choice((2, 8))), chance.choice((0, 12, 40))
    limits = StepLimits(chance.choice((3, 6, 9)), tokens, shared, 3, 2, drafts)
    config = make_config(short_tokens=chance.choice((30, 32)))
    pages, grounded = chance.choice((40, 64, 96)), chance.choice((3, 8, 10**9))
    return world(flies, grounded, config=config, pages=pages, limits=limits, media_bytes=40, paged=paged)


@pytest.mark.parametrize(
    ("paged", "flies"), [(True, False), (True, True), (False, False)], ids=["pages", "flights", "no pages"]
)
@pytest.mark.parametrize("seed", range(12))
def test_a_long_day(seed, paged, flies):
    chance = random.Random(seed)
    day = some_world(chance, paged, flies)
    for _ in range(700):
        act(day, chance)
    day.drain()
    assert len(day.results) > 20
    assert bool(day.ahead) == flies


# --- nobody waits for ever ------------------------------------------------------------------------------------------


def test_two_that_do_not_fit_together_both_end():
    """Each grows to 30 pages in a pool of 45: the newer one is paused, never the older one, and not again and again."""
    both = world(config=make_config(short_tokens=400, max_tokens=500), pages=45)
    for family in (0, 1):
        both.arrive(text(20, family, max_tokens=101, ignore_eos=True))
    both.drain()
    assert set(both.pauses) == {1}
    # As the older one goes on, each stretch of its growth may cost the newer one its place once.
    assert both.pauses[1] <= 100 // 12 + 1
    assert [reason for _, reason in both.results.values()] == [FinishReason.LENGTH] * 2
    assert both.device.computed_tokens < 3 * 2 * 120


def test_a_crossing_sequence_does_not_wait_for_newer_ones():
    """What it shares stays with the sharers when it starts over, and the pool is full: the newest makes room."""
    some = world(config=make_config(short_tokens=60))
    older = some.arrive(text(56, max_tokens=30, ignore_eos=True))
    some.step()
    for _ in range(2):
        some.arrive(text(50, max_tokens=9, ignore_eos=True))
    while len(older.ids) < 60:
        some.step()
    some.resize(some.scheduler.reservations.claimed_pages)
    some.step()
    assert older.long
    some.step()
    assert some.pauses.keys() == {1, 2}
    assert older.computed > 0
    some.drain()


def test_a_long_prompt_does_not_hold_up_answers():
    some = world(config=make_config(400, 500), pages=200)
    answering = some.arrive(text(10, max_tokens=40, ignore_eos=True))
    some.step()
    long = some.arrive(text(200, 1, max_tokens=1))
    while long.id not in some.results:
        before, computed = len(answering.answer), long.computed
        some.step()
        assert len(answering.answer) == before + 1
        assert long.computed - computed <= LIMITS.shared_step_tokens
    assert answering.id not in some.results


def test_a_short_prompt_passes_a_long_one_that_is_being_computed():
    some = world(config=make_config(400, 500), pages=200)
    long = some.arrive(text(200, max_tokens=9, ignore_eos=True))
    some.step()
    short = some.arrive(text(20, 1, max_tokens=9, ignore_eos=True))
    some.step()
    assert some.first_tokens.keys() == {short.id}
    assert long.pending > 60
    some.drain()


def test_half_a_step_is_the_oldest_prompt_s_and_the_rest_goes_to_the_shortest_first():
    some = world(config=make_config(400, 500), pages=200)
    for tokens in (200, 60, 20):
        some.arrive(text(tokens, max_tokens=9))
    assert [(row.sequence.id, row.tokens) for row in some.step().rows] == [(0, 32), (2, 20), (1, 12)]
    assert [(row.sequence.id, row.tokens) for row in some.step().rows] == [(2, 1), (0, 32), (1, 31)]
    assert sorted((row.sequence.id, row.tokens) for row in some.step().rows) == [(0, 46), (1, 17), (2, 1)]
    # More answer now than wait, so that less of a prompt is computed.
    assert sorted((row.sequence.id, row.tokens) for row in some.step().rows) == [(0, 16), (1, 1), (2, 1)]
    some.drain()


@pytest.mark.parametrize(
    ("prompts", "taken"), [((20, 20, 21, 30), [20, 20, 21]), ((20, 20, 15, 30), [20, 15, 20, 9])], ids=str
)
def test_what_little_is_left_of_a_step_begins_no_prompt(prompts, taken):
    """An eighth or less of its 64 tokens."""
    some = world(config=make_config(400, 500), pages=200)
    for tokens in prompts:
        some.arrive(text(tokens, max_tokens=1))
    assert [row.tokens for row in some.step().rows] == taken
    some.drain()


def test_the_pages_that_prompts_begin_next_are_foretold(monkeypatch):
    some = world(config=make_config(400, 500), pages=200)
    run, foretold, begun = some.device.run, [], []

    def run_and_foretell(plan):
        page_tokens = some.scheduler.reservations.pages.page_tokens
        begun.append({page for row in plan.rows for page in row.begun_pages(page_tokens)})
        foretold.append(set(some.scheduler.upcoming_pages(plan)))
        return run(plan)

    monkeypatch.setattr(some.device, "run", run_and_foretell)
    for number, tokens in enumerate((150, 40)):
        some.arrive(text(tokens, number, max_tokens=1))
    some.drain()
    assert len(begun) > 2
    assert all(later <= told for told, later in zip(foretold, begun[1:], strict=False))
    assert foretold[-1] == set()


def test_a_lone_prompt_has_the_whole_step():
    some = world(config=make_config(400, 500), pages=200)
    some.arrive(text(100, max_tokens=1))
    some.arrive(text(5, 1, max_tokens=1))
    assert [row.tokens for row in some.step().rows] == [59, 5]
    assert [row.tokens for row in some.step().rows] == [41]


@pytest.mark.parametrize(("tokens", "steps"), [(64, [64]), (65, [64, 1]), (67, [64, 3]), (130, [64, 64, 2])])
def test_a_step_takes_all_that_fits_and_leaves_the_rest(tokens, steps):
    """However little that is: a small step goes through a graph, and two of some size do not."""
    some = world(config=make_config(400, 500), pages=200)
    some.arrive(text(tokens, max_tokens=1))
    assert [sum(row.tokens for row in some.step().rows) for _ in steps] == steps
    some.drain()


def test_a_step_is_theirs_who_wait_while_they_are_more_than_those_who_answer():
    some = world(config=make_config(400, 500), pages=200)
    some.arrive(text(10, max_tokens=40, ignore_eos=True))
    some.step()
    for number in (1, 2):
        some.arrive(text(40, number, max_tokens=40, ignore_eos=True))
    first, *others = (row.tokens for row in some.step().rows)
    assert (first, sum(others)) == (1, LIMITS.step_tokens - 1)


@pytest.mark.parametrize(
    ("answers", "prompts", "whole"), [(12, 3, False), (12, 4, True), (31, 4, True), (32, 4, False), (32, 5, True)]
)
def test_a_burst_has_whole_steps_beside_more_answers_than_it_has_prompts(answers, prompts, whole):
    limits = replace(LIMITS, rows=40)
    some = world(config=make_config(400, 500), pages=1000, limits=limits)
    for number in range(answers):
        some.arrive(text(2, number % 2, max_tokens=40, ignore_eos=True))
    some.step()
    for number in range(prompts):
        some.arrive(text(40, number % 3, max_tokens=40, ignore_eos=True))
    tokens = [row.tokens for row in some.step().rows]
    assert tokens[:answers] == [1] * answers
    assert sum(tokens[answers:]) == (limits.step_tokens - answers if whole else limits.shared_step_tokens)
    some.drain()


def test_one_grows_page_by_page_before_another_is_paused_for_it():
    """There is no room for a stretch of 3 pages, but for the one that the next token needs."""
    some = world(pages=19, limits=replace(LIMITS, shared_step_tokens=1))
    growing = some.arrive(text(20, max_tokens=40, ignore_eos=True))
    some.step()
    other = some.arrive(text(40, 1, max_tokens=1))
    for _ in range(13):
        some.step()
    assert (len(growing.ids), growing.reserved_pages) == (34, 9)
    assert (other.state, some.pauses) == (State.RUNNING, {})
    some.drain()
    assert some.pauses == {1: 1}


def test_many_short_prompts_do_not_hold_up_a_long_one():
    some = world(config=make_config(400, 500), pages=200)
    long = some.arrive(text(200, max_tokens=2))
    while long.id not in some.first_tokens:
        for _ in range(4):
            some.arrive(text(60, 1, max_tokens=1))
        before = long.computed
        some.step()
        assert long.computed - before >= min(LIMITS.shared_step_tokens // 2, 200 - before)


def test_many_that_answer_do_not_hold_up_a_prompt():
    """More rows decode than a step has tokens: the prompt advances all the same."""
    some = world(config=make_config(400, 500), pages=200, limits=replace(LIMITS, step_tokens=8, shared_step_tokens=8))
    for _ in range(7):
        some.arrive(text(4, max_tokens=90, ignore_eos=True))
    for _ in range(9):
        some.step()
    some.scheduler.limits = replace(LIMITS, step_tokens=4, shared_step_tokens=4)
    prompt = some.arrive(text(20, 1, max_tokens=1))
    for _ in range(20):
        some.step()
    assert prompt.id in some.results


def test_without_pages_the_oldest_does_not_wait_for_newer_ones():
    some = world(paged=False, limits=replace(LIMITS, step_tokens=64))
    oldest = some.arrive(text(30, max_tokens=30, ignore_eos=True))
    while oldest.id not in some.results:
        some.arrive(text(20, 1, max_tokens=2))
        some.arrive(text(20, 2, max_tokens=2))
        before = len(oldest.answer)
        some.step()
        assert len(oldest.answer) == before + 1


def test_nobody_passes_one_that_waits():
    some = world(pages=20)
    some.arrive(text(40, max_tokens=20))
    some.step()
    large, small = some.arrive(text(60, 1, max_tokens=1)), some.arrive(text(1, 2, max_tokens=1))
    some.step()
    assert (large.state, small.state) == (State.WAITING, State.WAITING)
    while large.state is State.WAITING:
        assert small.state is State.WAITING
        some.step()
    assert small.state is not State.WAITING
    some.drain()


def test_no_more_run_than_there_are_rows():
    some = world(limits=replace(LIMITS, rows=3))
    sequences = [some.arrive(text(5, max_tokens=9, ignore_eos=True)) for _ in range(5)]
    some.step()
    assert [s.state is State.WAITING for s in sequences] == [False] * 3 + [True] * 2
    some.scheduler.limits = replace(LIMITS, rows=2)
    some.cancel(sequences[0])
    some.step()
    assert [s.state is State.WAITING for s in sequences[1:]] == [False] * 2 + [True] * 2


def test_rows_that_became_fewer_let_nobody_in():
    some = world()
    for _ in range(3):
        some.arrive(text(5, max_tokens=9, ignore_eos=True))
    some.step()
    some.scheduler.limits = replace(LIMITS, rows=2)
    waiting = some.arrive(text(5))
    some.step()
    assert waiting.state is State.WAITING


# --- pausing and starting over --------------------------------------------------------------------------------------


def test_a_paused_sequence_goes_on_where_it_was():
    some = world(config=make_config(400, 500))
    sequence = some.arrive(Case(text(30).before, (IMAGES[0], CLIPS[1]), (7, 8, 9), 20, True))
    for _ in range(8):
        some.step()
    answer, computed = sequence.answer, some.device.computed_tokens
    assert answer
    some.scheduler.pause(sequence)
    some.check()
    assert (sequence.state, sequence.reserved_pages, sequence.prompt) == (State.WAITING, 0, None)
    units = some.device.encoded_units
    some.step()
    assert sequence.answer[: len(answer)] == answer
    # Its pages and embeddings were idle: next to nothing is done again.
    assert some.device.computed_tokens - computed <= PAGE_TOKENS
    assert some.device.encoded_units == units
    some.drain()


def test_a_prompt_that_comes_late_is_taken_by_who_waits_for_one():
    some = world()
    sequence = some.arrive(text(9, max_tokens=3))
    some.step(prepare=False)
    some.scheduler.pause(sequence)
    some.prepared(0)  # Paused meanwhile.
    assert sequence.state is State.WAITING
    some.step(prepare=False)
    some.preparing *= 2
    some.prepared(1)
    assert sequence.state is State.RUNNING
    some.cancel(sequence)
    some.prepared(0)  # Ended meanwhile.
    assert sequence.state is State.ENDED
    some.drain()


@pytest.mark.parametrize("tokens", [31, 32, 33, 40])
def test_crossing_into_the_long_regime_starts_over_once(tokens):
    some = world(config=make_config(short_tokens=32))
    media = tuple(IMAGES[:1])
    before = tuple(DOCUMENTS[0][: tokens - 5 - image_footprint(media[0]).tokens])
    sequence = some.arrive(Case(before, media, (5,) * 5, 12, True))
    some.drain()
    whole = tokens + 12 - 1
    assert some.device.computed_tokens == whole + (32 if tokens <= 32 else 0)
    assert some.device.encoded_units == image_footprint(media[0]).crops
    assert sequence.long


def test_a_smaller_pool_pauses_the_newest_and_a_larger_one_lets_it_on():
    some = world(pages=60)
    sequences = [some.arrive(text(30, family, max_tokens=30, ignore_eos=True)) for family in range(3)]
    some.step()
    some.resize(20)
    assert [s.state is State.WAITING for s in sequences] == [False, True, True]
    some.step()
    some.resize(60)
    some.step()
    assert [s.state for s in sequences] == [State.RUNNING] * 3
    some.drain()


def test_a_stop_id_ends_an_answer_unless_ignored():
    config = make_config()
    stopping = next(
        case
        for case in (text(n, family) for n in range(2, 40) for family in range(3))
        if answer_alone(case, 40, config).reason is FinishReason.STOP
    )
    some = world(config=config)
    stopped, ignoring = some.arrive(stopping), some.arrive(replace(stopping, max_tokens=60, ignore_eos=True))
    some.drain()
    assert some.results[stopped.id][1] is FinishReason.STOP
    assert some.results[ignoring.id][1] is FinishReason.LENGTH
    assert some.results[ignoring.id][0][: len(stopped.answer)] == stopped.answer


def test_every_id_but_the_last_is_computed_once():
    some = world(config=make_config(400, 500), limits=replace(LIMITS, step_tokens=7))
    for family in range(3):
        some.arrive(text(30, family, max_tokens=20, ignore_eos=True))
    some.drain()
    assert some.device.computed_tokens == 3 * (30 + 20 - 1)


def test_a_failed_request_holds_nothing_and_the_others_go_on():
    some = world()
    failing, other = some.arrive(text(30, max_tokens=5)), some.arrive(text(30, max_tokens=5))
    some.step()
    some.fail(failing)
    assert (failing.state, failing.pages, failing.reserved_pages) == (State.ENDED, (), 0)
    some.drain()
    assert some.results[other.id][1] is not None


def test_nothing_to_do_is_no_plan():
    assert not world().step()
    assert not StepPlan(())


# --- drafts ---------------------------------------------------------------------------------------------------------


def guessing(right, pages=200, **settings):
    limits = replace(LIMITS, draft_tokens=settings.pop("draft_tokens", 40))
    return World(make_scheduler(limits=limits, pages=pages, **settings), right=right)


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("short_tokens", [30, 33, 400])
def test_drafts_change_no_answer(right, short_tokens):
    """`World` asserts the answers, the bounds, and at each step that the pages hold nothing of a wrong draft."""
    some = guessing(right, config=make_config(short_tokens, 500))
    sequences = [some.arrive(text(20, family % 3, max_tokens=60, ignore_eos=True)) for family in range(4)]
    some.drain()
    noted = [pair for s in sequences if isinstance(s.drafts, Guesses) for pair in s.drafts.noted]
    drafted, kept = map(sum, zip(*noted, strict=True))
    assert drafted > 50
    assert (kept > 0) == (right > 0)
    assert (kept == drafted) == (right == 1)
    assert some.scheduler.stats.accepted_tokens >= kept


def test_right_drafts_save_steps_and_cost_no_token():
    rounds = []
    for draft_tokens in (0, 16):
        some = guessing(1.0, draft_tokens=draft_tokens, config=make_config(400, 500))
        some.arrive(text(3, 1, max_tokens=1))
        some.arrive(text(20, max_tokens=41, ignore_eos=True))
        some.drain()
        assert some.device.computed_tokens == 3 + 20 + 40
        rounds.append(some.rounds)
    assert rounds[0] == 41
    assert rounds[1] < 10


def test_wrong_drafts_pause_nobody():
    """In a pool for one and a half, a step at a time the same as without: nothing waits for a guess."""
    worlds = [guessing(0.0, 45, draft_tokens=n, config=make_config(400, 500)) for n in (0, 40)]
    for some in worlds:
        for family in (0, 1, 2):
            some.arrive(text(20, family, max_tokens=101, ignore_eos=True))
        some.drain()
    plain, guessed = worlds
    assert (guessed.rounds, guessed.pauses) == (plain.rounds, plain.pauses)
    assert plain.pauses
    assert guessed.results == plain.results
    assert guessed.scheduler.stats.drafted_tokens > 100


def test_drafts_keep_to_the_pages_that_are_promised():
    """There is room for the pages that tokens need, and for no page more."""
    some = guessing(1.0, 9, config=make_config(400, 500))
    some.arrive(text(1, max_tokens=1))
    some.drain()
    sequence = some.arrive(text(20, max_tokens=17, ignore_eos=True))
    some.step()
    while some.scheduler.sequences:
        reserved = sequence.reserved_pages
        plan = some.step()
        assert all(len(row.pages) <= max(reserved, -(-(row.past + 1) // PAGE_TOKENS)) for row in plan.rows)
    assert some.scheduler.stats.accepted_tokens > 8


def test_many_rows_have_no_drafts():
    some = guessing(1.0, draft_tokens=9, config=make_config(400, 500))
    sequences = [some.arrive(text(20, family % 3, max_tokens=30, ignore_eos=True)) for family in range(5)]
    for _ in range(5):
        some.step()
    assert some.scheduler.stats.drafted_tokens == 0
    some.cancel(sequences[0])
    for _ in range(3):
        some.step()
    assert some.scheduler.stats.drafted_tokens > 0
    some.drain()


def test_a_prompt_is_learnt_while_it_is_computed(monkeypatch):
    monkeypatch.setattr(drafting, "LEARNT_AT_ONCE", 50)
    some = guessing(1.0, config=make_config(400, 500))
    sequence = some.arrive(text(190, max_tokens=20, ignore_eos=True))
    for known in (52, 102, 152):
        some.step()
        assert sequence.drafts._learnt == known
    assert len(sequence.answer) == 1
    some.step()
    assert sequence.drafts._learnt == len(sequence.ids) - 1
    some.drain()


def test_a_draft_that_ends_the_answer_ends_it_there():
    config = make_config(400, 500)
    stopping = next(
        case
        for case in (text(n, family) for n in range(2, 40) for family in range(3))
        if answer_alone(case, 40, config).reason is FinishReason.STOP
        and len(answer_alone(case, 40, config).ids) > len(case.before) + 6
    )
    some = guessing(1.0, config=config)
    for _ in range(2):
        some.arrive(replace(stopping, max_tokens=60))
    some.drain()
    assert some.results[1][1] is FinishReason.STOP
    assert some.scheduler.stats.accepted_tokens > 0


def test_a_conversation_goes_on_from_pages_that_had_drafts():
    case = text(10, max_tokens=20, ignore_eos=True)
    some = guessing(0.6)
    some.arrive(text(1, 1, max_tokens=1))
    some.arrive(case)
    some.drain()
    longer = follow(case, some.results[1][0], 3)
    assert computed_by(some, replace(longer, max_tokens=1)) == 33 - 28


# --- a step behind one in flight ------------------------------------------------------------------------------------


def flying(*cases, rounds=3, **settings):
    """A world in which these cases have computed prompts and a step in flight."""
    some = world(flies=True, **settings)
    sequences = [some.arrive(case) for case in cases]
    for _ in range(rounds):
        some.step()
    assert some.flight is not None
    return some, sequences


def planned_ahead(some):
    ahead = some.scheduler.plan_ahead(some.flight[0])
    return None if ahead is None else [row.sequence.id for row in ahead.rows]


def test_answers_fly_from_step_to_step():
    """Every step but the first, and none beyond an end that is known, is launched behind another."""
    lone = world(flies=True)
    lone.arrive(text(6, max_tokens=20, ignore_eos=True))
    lone.drain()
    assert lone.ahead == 19
    assert lone.device.computed_tokens == 6 + 19


def in_flight(some):
    """The rows of the step in flight: whose they are, where they begin, their tokens, and whether they follow."""
    return [(row.sequence.id, row.past, row.tokens, row.follows) for row in some.flight[0].rows]


def test_prompts_fly_beside_answers():
    """A long prompt in parts, another beside it, and what each chooses first: nothing waits for what was heard."""
    some = world(flies=True, limits=replace(LIMITS, step_tokens=16, shared_step_tokens=8))
    for n, case in enumerate((6, 27, 7)):
        some.arrive(text(case, n, max_tokens=9, ignore_eos=True))
    seen = []
    while some.scheduler.sequences:
        some.step()
        seen += [in_flight(some)] if some.flight else []
    assert seen[:4] == [
        [(0, 0, 6, False), (2, 0, 7, False), (1, 0, 3, False)],
        [(0, 6, 1, True), (2, 7, 1, True), (1, 3, 8, False)],
        [(0, 7, 1, True), (2, 8, 1, True), (1, 11, 8, False)],
        [(0, 8, 1, True), (2, 9, 1, True), (1, 19, 8, False)],
    ]
    assert len(seen) == some.ahead + 1
    some.check_end()


def test_an_answer_of_one_token_ends_with_its_prompt():
    some = world(flies=True)
    some.arrive(text(8, max_tokens=1))
    some.step()
    assert planned_ahead(some) is None
    second = some.arrive(text(8, 1, max_tokens=2, ignore_eos=True))
    some.step()
    assert in_flight(some) == [(second.id, 0, 8, False)]
    some.drain()
    assert some.device.computed_tokens == 8 + 8 + 1


def test_who_begins_alike_waits_for_what_it_will_find():
    """Two whole pages of what is computed in flight; who finds no more of that than is there does not wait."""
    some = world(flies=True)
    some.arrive(text(12, max_tokens=9, ignore_eos=True))
    some.step()
    alike = some.arrive(text(11, max_tokens=9, ignore_eos=True))
    some.step()
    assert alike.cached_tokens == 8
    assert some.ahead == 0
    other = some.arrive(text(12, 1, max_tokens=9, ignore_eos=True))
    some.step()
    assert in_flight(some)[-1] == (other.id, 0, 12, False)
    some.drain()
    assert some.device.computed_tokens == 12 + 3 + 12 + 3 * 8


def test_who_comes_back_to_where_a_row_in_flight_begins_gets_nothing_of_it():
    """It was paused meanwhile, and its pages are others."""
    some = world(flies=True)
    some.arrive(text(8, max_tokens=9, ignore_eos=True))
    some.step()
    second = some.arrive(text(8, 1, max_tokens=9, ignore_eos=True))
    some.step()
    assert in_flight(some) == [(0, 8, 1, True), (second.id, 0, 8, False)]
    assert some.flight[0].rows[1].stands
    some.scheduler.pause(second)
    some.preparing += [(s, some.cases[s.id].prompt) for s in some.scheduler.admit()]
    some.all_prepared()
    assert (second.state, second.computed) == (State.RUNNING, 0)
    assert not some.flight[0].rows[1].stands
    some.drain()


def test_an_answer_that_ends_by_its_length_has_no_row_in_vain():
    some, (first, second) = flying(text(5, max_tokens=3, ignore_eos=True), text(5, 1, max_tokens=9, ignore_eos=True))
    assert first.answer_tokens == 2
    assert planned_ahead(some) == [second.id]
    some.drain()


def test_an_answer_that_ends_by_an_id_has_one_row_in_vain():
    case = next(
        case
        for case in (text(n, family, max_tokens=40) for family in range(3) for n in range(4, 60))
        if len(ids := answer_alone(case, 40, make_config()).ids) < n_most(case) and ids[-1] == 10
    )
    lone = world(flies=True)
    lone.arrive(case)
    lone.drain()
    ids, reason = lone.results[0]
    assert reason is FinishReason.STOP
    assert lone.device.computed_tokens == len(case.prompt.ids) + len(ids) - 1 + 1


def n_most(case):
    """How long a case's answer may be for its stop not to fall on its last step, nor on its crossing."""
    return min(len(case.prompt.ids) + 38, 46)


def test_whoever_is_to_be_served_comes_next():
    some, (first,) = flying(text(5, max_tokens=30, ignore_eos=True))
    assert planned_ahead(some) == [first.id]
    some.arrive(text(8, 1, max_tokens=5))
    some.preparing += [(s, some.cases[s.id].prompt) for s in some.scheduler.admit()]
    assert planned_ahead(some) == [first.id]  # It is still being prepared.
    some.all_prepared()
    assert planned_ahead(some) == [first.id, 1]
    some.step()
    assert [row.tokens for row in some.flight[0].rows] == [1, 8]
    some.arrive(text(5, media=IMAGES[:1], max_tokens=5))
    some.preparing += [(s, some.cases[s.id].prompt) for s in some.scheduler.admit()]
    some.step(prepare=False)
    assert some.flight is not None
    some.all_prepared()
    assert planned_ahead(some) is None  # There is something to encode.
    some.drain()


def test_a_crossing_and_a_pause_are_planned_with_nothing_in_flight():
    crossing, (first,) = flying(text(43, max_tokens=20, ignore_eos=True), config=make_config(short_tokens=48))
    while crossing.flight is not None and planned_ahead(crossing) is not None:
        crossing.step()
    assert len(first.ids) == 48
    crossing.drain()
    tight, _ = flying(*(text(8, n, max_tokens=40, ignore_eos=True) for n in range(2)), pages=17)
    while tight.flight is not None and planned_ahead(tight) is not None:
        tight.step()
    pages = tight.scheduler.reservations.available_pages
    assert not tight.pauses
    tight.step()
    assert tight.pauses == {1: 1}
    assert pages < 2
    tight.drain()


def test_who_ends_or_is_paused_in_flight_gets_nothing_of_it():
    some, (first, second, third) = flying(*(text(5, n, max_tokens=30, ignore_eos=True) for n in range(3)))
    some.cancel(second)
    some.scheduler.pause(third)
    plan, _ = some.flight
    assert [row.sequence for row in plan.standing().rows] == [first]
    assert planned_ahead(some) == [first.id]
    answers = [list(s.answer) for s in (second, third)]
    some.step(prepare=False)
    assert [s.answer for s in (second, third)] == answers
    some.drain()


def test_what_was_chosen_in_vain_is_in_no_page_that_others_find():
    """One is cancelled with the step in flight that fills its page: the next one that begins alike computes it."""
    some, (first,) = flying(text(5, max_tokens=30, ignore_eos=True))
    while len(first.ids) % PAGE_TOKENS:
        some.step()
    pages = some.scheduler.reservations.pages
    kept = len(first.ids) - PAGE_TOKENS
    some.cancel(first)
    assert pages.idle_pages == kept // PAGE_TOKENS
    some.arrive(follow(some.cases[0], some.results[0][0], 4))
    some.drain()


def test_a_lost_step_costs_nothing_but_itself():
    for fault in FAULTS:
        some, _ = flying(*(text(5, n, max_tokens=12, ignore_eos=True) for n in range(2)))
        while some.scheduler.sequences:
            some.step(fault=fault if some.rounds % 3 == 0 else None)
        some.check_end()


def test_drafts_that_pay_are_not_flown_past():
    limits = replace(LIMITS, draft_tokens=16)
    some = world(flies=True, limits=limits)
    some.arrive(text(5, max_tokens=6, ignore_eos=True))  # Number 0 guesses for itself, and has nothing to go by.
    some.drain()
    assert some.ahead
    guessing, (_, second) = flying(text(5, max_tokens=1), text(5, 1, max_tokens=30, ignore_eos=True))
    assert planned_ahead(guessing) == [second.id]
    guessing.limits = guessing.scheduler.limits = limits
    assert planned_ahead(guessing) is None
    guessing.drain()
    assert second.drafts.noted


# --- shared by content ----------------------------------------------------------------------------------------------


def after_one(case, **settings):
    """A world in which this request has just been answered."""
    some = world(**settings)
    some.arrive(case)
    some.drain()
    return some


def computed_by(some, case):
    """How many tokens a request costs: those of its prompt that are not found, and its answer's."""
    before = some.device.computed_tokens
    some.arrive(case)
    some.drain()
    return some.device.computed_tokens - before


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 30])
def test_a_known_beginning_is_not_computed_again_but_for_one_token(tokens):
    case = text(tokens, max_tokens=1)
    known = (tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert computed_by(after_one(case), case) == tokens - known


def test_a_conversation_goes_on_from_the_pages_of_its_answer():
    case = text(10, max_tokens=20, ignore_eos=True)
    some = after_one(case)
    longer = follow(case, some.results[0][0], 3)
    # 29 tokens were computed, which fill 7 pages; the 33 of the new prompt are short of the regime's border.
    assert computed_by(some, replace(longer, max_tokens=1)) == 33 - 28


def test_a_beginning_in_use_is_shared_and_survives_its_first_user():
    some = world(config=make_config(400, 500))
    first = some.arrive(text(30, max_tokens=50, ignore_eos=True))
    some.step()
    second = some.arrive(text(30, max_tokens=50, ignore_eos=True))
    some.step()
    assert second.pages[:7] == first.pages[:7]
    assert not set(first.pages[7:]) & set(second.pages[7:])
    held = some.scheduler.reservations.pages.used_pages
    assert held == len(set(first.pages) | set(second.pages))
    some.cancel(first)
    some.drain()


IMAGE = Case(text(9).before, (IMAGES[2],), text(9, 1).before, 1)
CLIP = Case(text(9).before, (CLIPS[1],), text(9, 1).before, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (replace(IMAGE, media=(IMAGES[0],)), replace(IMAGE, media=(IMAGES[5],))),
        (replace(IMAGE, media=(IMAGES[2],)), replace(IMAGE, media=(IMAGES[3],))),
        (replace(IMAGE, media=(IMAGES[1],)), replace(IMAGE, media=(IMAGES[4],))),
        (text(30, max_tokens=1), replace(IMAGE, before=text(30).before)),
        (text(30, max_tokens=1), replace(CLIP, before=text(30).before)),
        (replace(CLIP, before=text(30).before), replace(IMAGE, before=text(30).before)),
        (text(30, max_tokens=1), text(50, max_tokens=1)),
    ],
    ids=["digest", "detail", "low detail", "vision adapter", "speech adapter", "two adapters", "regime"],
)
def test_what_differs_shares_no_page(one, other):
    """What is equal before an attachment is shared only under the same adapter and in the same regime."""
    equal = 8 if one.media and one.footprint.mode is other.footprint.mode else 0
    assert computed_by(after_one(one), other) == other.footprint.prompt_tokens - equal


@pytest.mark.parametrize("one_media", [IMAGES[:1], CLIPS[:1]], ids=["vision", "speech"])
def test_another_mode_shares_a_page_only_under_the_same_adapter(one_media):
    before = text(9).before
    one = Case(before, (*one_media,), before, 1)
    both = Case(before, (IMAGES[0], CLIPS[0]), before, 1)
    tokens = both.footprint.prompt_tokens
    assert computed_by(after_one(one, config=make_config(100)), both) == tokens


@pytest.mark.parametrize("name", ["cache_format", "scheme", "preprocessing"])
def test_what_is_kept_in_another_form_is_not_shared(name):
    """As if a pool and its embeddings were kept while the rest is exchanged."""
    case = replace(IMAGE, before=text(30).before)
    some = after_one(case)
    other = make_scheduler(naming=replace(some.scheduler.naming, **{name: "other"}))
    other.reservations, other.media = some.scheduler.reservations, some.scheduler.media
    computed, units = some.device.computed_tokens, some.device.encoded_units
    again = World(other, some.device)
    again.arrive(case)
    again.drain()
    pages, embeddings = name == "cache_format", name in ("scheme", "preprocessing")
    assert some.device.encoded_units - units == (case.footprint.crops if embeddings else 0)
    found = (case.footprint.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
    # Other embeddings are other content: only the text before them is known.
    found = 0 if pages else 28 if embeddings else found
    assert some.device.computed_tokens - computed == case.footprint.prompt_tokens - found


def test_equal_images_are_encoded_once():
    """In two requests of different modes at once, twice in one, and again when both have ended."""
    some = world(config=make_config(400, 500), limits=replace(LIMITS, crops=2))
    image, clip = IMAGES[2], CLIPS[0]
    some.arrive(Case((5,), (image,), (6,), 9))
    some.arrive(Case((5, 7), (image, clip, image), (6,), 9))
    some.drain()
    some.arrive(Case((8,), (image,), (6,), 1))
    some.drain()
    assert some.device.encoded_units == image_footprint(image).crops + 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((IMAGES[0],), (IMAGES[5],)),
        ((IMAGES[2],), (IMAGES[3],)),
        ((CLIPS[0],), (CLIPS[1],)),
        ((CLIPS[1],), (CLIPS[1], IMAGES[1])),
    ],
    ids=["digest", "detail", "clip", "head"],
)
def test_what_differs_is_encoded_by_itself(one, other):
    alone = [after_one(Case((5,), media, (6,), 1)).device.encoded_units for media in (one, other)]
    some = world()
    for media in (one, other):
        some.arrive(Case((5,), media, (6,), 1))
    some.drain()
    assert some.device.encoded_units == sum(alone)


def test_who_shares_an_encoding_goes_on_with_it_when_the_other_ends():
    some = world(limits=replace(LIMITS, crops=2))
    first, second = (some.arrive(Case((5, n), (IMAGES[2],), (6,), 3)) for n in (1, 2))
    some.step()
    assert some.device.encoded_units == 2
    some.cancel(first)
    some.drain()
    assert some.device.encoded_units == 5
    assert some.results[second.id][0]


def test_a_step_encodes_for_several_sequences_within_its_units():
    some = world(limits=replace(LIMITS, crops=4, windows=2))
    for number, media in enumerate([(IMAGES[0], CLIPS[2]), (IMAGES[5],), (IMAGES[1], CLIPS[0])]):
        some.arrive(Case((5, number), media, (6,), 1))
    plan = some.step()
    assert [(p.sequence.id, p.kind, p.first, p.units) for p in plan.slices] == [
        (0, "image", 0, 3),
        (0, "audio", 0, 2),
        (1, "image", 0, 1),
    ]
    some.drain()


def test_answers_are_the_same_without_pages():
    chance = random.Random(0)
    asked = [some_case(chance) for _ in range(30)]
    answers = []
    for paged in (True, False):
        some = world(pages=60, paged=paged, limits=replace(LIMITS, step_tokens=120))
        for case in asked:
            some.arrive(case)
        some.drain()
        answers.append(some.results)
    assert answers[0] == answers[1]


def test_deciding_imports_no_torch():
    code = "import sys, memphi.engine.scheduler, memphi.sampling.stop; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
