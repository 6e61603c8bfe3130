"""A device made of integers: what it keeps of a token tells everything before it, so any mix-up changes an answer.

A request answered alone (`answer_alone`) gives the ids that the scheduler must bring about, whatever happens meanwhile.
"""

import random
from dataclasses import dataclass, field, replace

from memphi.cache.media import MediaCache
from memphi.cache.pages import Pages
from memphi.config import AdapterConfig, AudioConfig, LanguageConfig, ModelConfig, VisionConfig
from memphi.engine.admission import computed_at_most, refuse, stretched
from memphi.engine.reservations import Reservations
from memphi.engine.scheduler import Naming, Scheduler, StepLimits
from memphi.engine.sequence import Sequence, State
from memphi.engine.step import StepPlan, StepResult
from memphi.memory.budget import Budget
from memphi.request import (
    ClipFootprint,
    FinishReason,
    Footprint,
    ImageFootprint,
    Media,
    MediaSpan,
    Message,
    Prompt,
    Request,
    SamplingParams,
)

PAGE_TOKENS, PAGE_BYTES, EMBEDDING_BYTES = 4, 10, 1
STOP_ID, FIRST_ID, ANSWER_IDS = 10, 10, 40
MEDIA_IDS = {"image": 1, "audio": 2}
ADAPTERS, HEADS = {None: 0, "vision": 1, "speech": 2}, {"": 0, "vision": 1, "speech": 2}
DOCUMENTS = [[100 + (7 * place * (place + family)) % 90 for place in range(200)] for family in range(3)]
"""Texts that prompts are cut from: those of one family begin alike."""

IMAGES = [
    Media("image", f"{digest}", b"", digest, detail)
    for digest, detail in [("i0", "auto"), ("i0", "low"), ("i1", "auto"), ("i1", 9), ("i2", "low"), ("i3", "auto")]
]
CROPS = [(1, 2), (0, 0), (2, 2), (2, 2), (0, 0), (1, 2)]
CLIPS = [Media("audio", digest, b"", digest) for digest in ("a0", "a1", "a2")]
FRAMES = [20, 50, 130]
MEDIA = [*IMAGES, *CLIPS]


def make_config(short_tokens=48, max_tokens=120):
    language = LanguageConfig(300, 8, 8, 1, 2, 1, 1e-5, 1e4, 4, (1.0,) * 2, (2.0,) * 2, short_tokens, max_tokens)
    audio = AudioConfig(8, 8, 1, 2, 4, window_tokens=5)
    return ModelConfig(language, VisionConfig(), audio, AdapterConfig(4, 8.0), AdapterConfig(4, 8.0), (STOP_ID,))


def image_footprint(medium):
    rows, columns = CROPS[IMAGES.index(medium)]
    return ImageFootprint(100, 100, rows, columns, 3 * (rows * columns + 1) + 1)


def clip_footprint(medium):
    frames = FRAMES[CLIPS.index(medium)]
    return ClipFootprint(frames / 100, frames, -(-frames // 8))


@dataclass(frozen=True)
class Case:
    """A request with its prompt: text, attachments, text."""

    before: tuple[int, ...] = ()
    media: tuple[Media, ...] = ()
    after: tuple[int, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False

    @property
    def request(self):
        sampling = SamplingParams(max_tokens=self.max_tokens, ignore_eos=self.ignore_eos)
        return Request((Message("user", ("before", *self.media, "after")),), sampling)

    @property
    def footprint(self):
        images = tuple(image_footprint(medium) for medium in self.media if medium.kind == "image")
        clips = tuple(clip_footprint(medium) for medium in self.media if medium.kind == "audio")
        return Footprint(self.request.mode, len(self.before) + len(self.after), images, clips)

    @property
    def prompt(self):
        """The prompt, with each medium's number in MEDIA in place of its pixels or features."""
        footprint, ids, spans = self.footprint, list(self.before), []
        sizes = {"image": iter(footprint.images), "audio": iter(footprint.clips)}
        for medium in self.media:
            index = sum(span.kind == medium.kind for span in spans)
            tokens = next(sizes[medium.kind]).tokens
            spans.append(MediaSpan(medium.kind, index, len(ids), tokens))
            ids += [MEDIA_IDS[medium.kind]] * tokens
        numbers = {kind: tuple(MEDIA.index(m) for m in self.media if m.kind == kind) for kind in ("image", "audio")}
        return Prompt((*ids, *self.after), tuple(spans), numbers["image"], numbers["audio"], footprint)


def text(tokens, family=0, **settings):
    return Case(tuple(DOCUMENTS[family][:tokens]), **settings)


class Chain:
    """What a device keeps of each token of a sequence: a hash of it, of all before, of adapter and regime."""

    def __init__(self, adapter, long):
        self.last = hash((ADAPTERS[adapter], long))

    def add(self, content):
        self.last = hash((self.last, content))
        return self.last


def embedding(number, head, offset):
    """What stands for a token of an attachment: a row of its embeddings."""
    return (number, HEADS[head], offset)


def choose(link):
    return FIRST_ID + link % ANSWER_IDS


def foretold(chosen, drafts):
    """The ids that drafts were right about, and the next."""
    for place, draft in enumerate(drafts):
        if chosen[place] != draft:
            return chosen[: place + 1]
    return chosen


class Guesses:
    """Drafts by somebody who knows the answer, and errs; also the ids that end it are among them."""

    def __init__(self, expected, seed=0, right=0.8):
        self.expected, self.right = expected, right
        self.chance = random.Random(seed)
        self.noted = []

    def learn(self, ids):
        """It knows already."""

    def propose(self, ids, most):
        most = max(self.chance.randint(most // 2, most), 0) if most > 0 else 0
        known = [*self.expected.ids[len(ids) : len(ids) + most], *[FIRST_ID + 1] * most][:most]
        return tuple(i if self.chance.random() < self.right else self._other(i) for i in known)

    def note(self, proposed, kept, length):
        assert 0 <= kept <= proposed
        self.noted.append((proposed, kept))

    def _other(self, number):
        return FIRST_ID + (number - FIRST_ID + self.chance.randint(1, ANSWER_IDS - 1)) % ANSWER_IDS


def head_of(medium_kind, mode):
    return mode.audio_head if medium_kind == "audio" else ""


@dataclass
class Expected:
    """The answer of a request alone, and what a device should keep of its tokens in either regime."""

    ids: list[int]
    prompt_tokens: int
    reason: FinishReason
    links: dict[bool, list[int]]


def answer_alone(case, max_tokens, config):
    """Generate token by token, without pages, rows or slices."""
    prompt = case.prompt
    contents = list(prompt.ids)
    for span in prompt.spans:
        number = (prompt.images if span.kind == "image" else prompt.clips)[span.index]
        head = head_of(span.kind, prompt.mode)
        for offset in range(span.tokens):
            contents[span.start + offset] = embedding(number, head, offset)
    chains = {long: Chain(prompt.mode.adapter, long) for long in (False, True)}
    links = {long: [chain.add(content) for content in contents] for long, chain in chains.items()}
    ids = list(prompt.ids)
    while True:
        ids.append(choose(links[config.language.is_long(len(ids))][-1]))
        if ids[-1] == STOP_ID and not case.ignore_eos:
            return Expected(ids, len(prompt.ids), FinishReason.STOP, links)
        if len(ids) - len(prompt.ids) == max_tokens:
            return Expected(ids, len(prompt.ids), FinishReason.LENGTH, links)
        for long, chain in chains.items():
            links[long].append(chain.add(ids[-1]))


class Device:
    """Pages of chain links; computes a step from them as a model would from keys and values."""

    def __init__(self):
        self.pages = {}  # page -> links, one per slot
        self.mapped = set()  # The pages with memory behind them.
        self.encoded_units = 0
        self.computed_tokens = 0

    def run(self, plan, before=None):
        """Do a step; before is what the step before it brought where nobody else knows that yet."""
        for piece in plan.slices:
            self._encode(piece)
        for row in plan.rows:
            self.mapped.update(row.begun_pages(PAGE_TOKENS))
            used = row.pages[: -(-(row.past + row.tokens) // PAGE_TOKENS)]
            assert self.mapped.issuperset(used), "a page has no memory"
        # Everything is read before anything is written: a step's rows do not see each other.
        starts = [self._chain(row) for row in plan.rows]
        chosen = [before.sampled[row.sequence.id] if row.follows else () for row in plan.rows]
        known = [[*row.sequence.ids, *some, *row.drafts] for row, some in zip(plan.rows, chosen, strict=True)]
        links = [self._compute(*some) for some in zip(plan.rows, starts, known, strict=True)]
        return StepResult(
            {
                row.sequence.id: foretold([choose(link) for link in some[-1 - len(row.drafts) :]], row.drafts)
                for row, some, ids in zip(plan.rows, links, known, strict=True)
                if row.past + row.tokens == len(ids)
            }
        )

    def links(self, row):
        """What is kept of the tokens before a row."""
        kept = [link for page in row.pages[: -(-row.past // PAGE_TOKENS)] for link in self.pages[page]]
        return kept[: row.past]

    def forget(self, kept):
        self.pages = {page: links for page, links in self.pages.items() if page in kept}
        self.mapped &= kept

    def _encode(self, piece):
        prompt, entry = piece.sequence.prompt, piece.entry
        number = (prompt.images if piece.kind == "image" else prompt.clips)[piece.index]
        entry.value = entry.value or {}
        for unit in range(piece.first, piece.first + piece.units):
            entry.value[unit] = (number, head_of(piece.kind, prompt.mode))
        self.encoded_units += piece.units

    def _chain(self, row):
        chain = Chain(row.sequence.adapter, row.sequence.long)
        if row.past:
            chain.last = self.links(row)[-1]
        return chain

    def _compute(self, row, chain, ids):
        sequence = row.sequence
        contents, links = list(ids), []
        for span, entry in zip(sequence.prompt.spans, sequence.entries, strict=True):
            for place in range(max(span.start, row.past), min(span.start + span.tokens, row.past + row.tokens)):
                assert sorted(entry.value) == list(range(entry.units)), "an attachment is not encoded"
                (source,) = set(entry.value.values())
                contents[place] = embedding(*source, place - span.start)
        for place in range(row.past, row.past + row.tokens):
            link = chain.add(contents[place])
            links.append(link)
            if row.pages:
                page = self.pages.setdefault(row.pages[place // PAGE_TOKENS], [None] * PAGE_TOKENS)
                page[place % PAGE_TOKENS] = link
        self.computed_tokens += row.tokens
        return links


NAMING = Naming("bf16", "bf16", 1)
LIMITS = StepLimits(rows=8, step_tokens=64, shared_step_tokens=16, crops=4, windows=4)


def make_scheduler(config=None, pages=50, limits=LIMITS, media_bytes=1000, paged=True, naming=NAMING):
    reservations = Reservations(Pages(pages, PAGE_TOKENS), Budget(pages * PAGE_BYTES), PAGE_BYTES)
    cache = MediaCache(media_bytes)
    return Scheduler(config or make_config(), limits, reservations, cache, naming, EMBEDDING_BYTES, paged)


@dataclass
class World:
    """A scheduler, a device and callers; what is asked of a plan and of an answer is asserted as they come."""

    scheduler: Scheduler
    device: Device = field(default_factory=Device)
    cases: dict[int, Case] = field(default_factory=dict)
    expected: dict[int, Expected] = field(default_factory=dict)
    results: dict[int, tuple[list[int], FinishReason | None]] = field(default_factory=dict)
    preparing: list[tuple[Sequence, Prompt]] = field(default_factory=list)
    first_tokens: dict[int, int] = field(default_factory=dict)
    """The round in which each sequence got its first token."""
    pauses: dict[int, int] = field(default_factory=dict)
    rounds: int = 0
    operations: int = 0
    ahead: int = 0
    """Steps that were planned behind another in flight."""
    flies: bool = False
    """Whether steps are launched, and heard of a round later with the next one on its way."""
    grounded: int = 10**9
    """One in so many of these steps is not launched: there is no graph for it."""
    flight: tuple[StepPlan, StepResult] | None = None
    right: float = 0.8
    """How often a guess is right, where there are drafts."""

    def __post_init__(self):
        self.capacity = self.scheduler.reservations.pages.capacity
        self.limits = self.scheduler.limits
        pause = self.scheduler.pause

        def count(sequence):
            self.pauses[sequence.id] = self.pauses.get(sequence.id, 0) + 1
            pause(sequence)

        self.scheduler.pause = count

    # --- what callers, threads and memory do

    def arrive(self, case):
        """Accept a request as the engine does; None where it can never fit."""
        self.operations += 1
        language, wanted, prompt = self.scheduler.config.language, case.max_tokens, case.footprint.prompt_tokens
        tokens = min(self.capacity * PAGE_TOKENS, language.max_tokens)
        tokens = tokens if self.scheduler.paged else min(tokens, self.limits.step_tokens)
        room = min(tokens + 1, language.max_tokens) - prompt
        if refuse(prompt, wanted, tokens) is not None or room < 1:
            return None
        max_tokens = room if wanted is None else min(wanted, room)
        sequence = Sequence(len(self.cases), case.request, case.footprint, max_tokens)
        self.cases[sequence.id] = case
        self.expected[sequence.id] = answer_alone(case, max_tokens, self.scheduler.config)
        if sequence.id % 3:  # The others guess for themselves.
            sequence.drafts = Guesses(self.expected[sequence.id], sequence.id, self.right)
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, sequence):
        self.operations += 1
        self._end(sequence, FinishReason.CANCELLED)

    def fail(self, sequence):
        self.operations += 1
        self.results[sequence.id] = (list(sequence.answer), None)
        self.scheduler.end(sequence)

    def prepared(self, place):
        """One prompt becomes ready, whoever waits for it."""
        self.operations += 1
        sequence, prompt = self.preparing.pop(place)
        before = sequence.state
        self.scheduler.begin(sequence, prompt)
        assert (sequence.state is before) == (before is not State.PREPARING)

    def all_prepared(self):
        while self.preparing:
            self.prepared(0)

    def resize(self, pages):
        self.operations += 1
        active = [s for s in self.scheduler.sequences if s.state is not State.WAITING]
        self.scheduler.resize(pages)
        assert self.scheduler.reservations.pages.capacity == pages
        still = [s for s in active if s.state is not State.WAITING]
        assert still == active[: len(still)], "older ones were paused before newer ones"
        self.device.forget(self.scheduler.reservations.pages.kept())

    def lower(self, rung):
        """What the ladder does between a step that failed and the next."""
        self.operations += 1
        scheduler, limits = self.scheduler, self.scheduler.limits
        active = [s for s in scheduler.sequences if s.state is not State.WAITING]
        if rung == "media":
            scheduler.media.drop_idle()
        elif rung == "pages":
            scheduler.reservations.pages.drop_idle()
            self.device.forget(scheduler.reservations.pages.kept())
        elif rung == "drafts":
            scheduler.limits = replace(limits, draft_tokens=0)
        elif rung == "slice":
            scheduler.limits = replace(limits, crops=-(-limits.crops // 2), windows=-(-limits.windows // 2))
        elif rung == "chunk" and scheduler.paged:
            tokens = -(-limits.step_tokens // 2)
            scheduler.limits = replace(
                limits, step_tokens=tokens, shared_step_tokens=min(limits.shared_step_tokens, tokens)
            )
        elif rung == "pause" and len(active) > 1:
            scheduler.pause(active[-1])
            scheduler.limits = replace(limits, rows=len(active) - 1)

    def climb(self):
        self.operations += 1
        self.scheduler.limits = self.limits

    # --- the loop

    def _plan(self, ended=False):
        """Plan a step; who waited for one that has ended in this round is let in in the next."""
        plan = self.scheduler.plan_step()
        self.check()
        self._check_plan(plan)
        if not ended:
            self._check_oldest(plan)
        return plan

    def step(self, prepare=True, fault=None):
        """One round; a fault loses the step: "before" the device did anything, or "after" it did everything.

        With a step in flight the fault hits the one launched behind it or, "landing", what it brought itself. Returns
        the plan that was made last, an empty one where a step went ahead.
        """
        self.operations += 1
        self.preparing += [(s, self.cases[s.id].prompt) for s in self.scheduler.admit()]
        self.check()
        if prepare:
            self.all_prepared()
        self.rounds += 1
        results = len(self.results)
        if self.flight is not None:
            self._land(fault)
            if self.flight is not None:
                return StepPlan(())
        plan = self._plan(ended=len(self.results) > results)
        if fault in ("before", "landing"):
            return plan
        result = self.device.run(plan)
        if fault == "after":
            return plan
        if self._can_launch(plan):
            self.flight = plan, result
        else:
            self._commit(plan, result)
        return plan

    def _land(self, fault):
        """Launch the step behind the one in flight, then hear what that brought."""
        (plan, result), self.flight = self.flight, None
        ahead = self.scheduler.plan_ahead(plan)
        self.check()
        if ahead is not None:
            self._check_ahead(plan, ahead)
        if ahead is not None and self._can_launch(ahead):
            self.ahead += 1
            ran = self.device.run(ahead, result) if fault != "before" else None
            if fault not in ("before", "after"):
                self.flight = ahead, ran
        if fault != "landing":
            self._commit(plan.standing(), result)

    def _can_launch(self, plan):
        if not (self.flies and plan.rows and self.scheduler.paged) or plan.slices:
            return False
        return self.operations % self.grounded != 0 and not any(row.drafts for row in plan.rows)

    def _commit(self, plan, result):
        sampling = {row.sequence.id for row in plan.rows if row.samples}
        advanced = self.scheduler.commit(plan, result)
        assert {s.id for s in advanced} == sampling
        for sequence in advanced:
            self.first_tokens.setdefault(sequence.id, self.rounds)
            if sequence.finish_reason is not None:
                self._end(sequence, sequence.finish_reason)
        self.check()

    def drain(self):
        """Let everything end undisturbed; the oldest advances in every round, which bounds their number."""
        self.climb()
        self.resize(max(self.capacity, self.scheduler.reservations.pages.capacity))
        most = sum(2 * computed_at_most(s) + s.footprint.crops + 20 for s in self.scheduler.sequences)
        rounds = self.rounds
        while self.scheduler.sequences:
            self.step()
            assert self.rounds - rounds <= most, "the engine does not end"
        self.check_end()

    def _end(self, sequence, reason):
        assert sequence.id not in self.results, "a request ends twice"
        self.results[sequence.id] = (list(sequence.answer), reason)
        self.scheduler.finish(sequence, reason)

    # --- what must hold

    def check(self):
        scheduler = self.scheduler
        reservations = scheduler.reservations
        scheduler.check()
        assert reservations.claimed_pages <= reservations.pages.capacity
        assert reservations.budget.held_bytes <= reservations.budget.total_bytes
        waits = [s.state is State.WAITING for s in scheduler.sequences]
        assert waits == sorted(waits), "a newer one is in while an older one waits"
        users = sum(entry.users for entry in {id(e): e for s in scheduler.sequences for e in s.entries}.values())
        assert users == sum(len(s.entries) for s in scheduler.sequences)

    def check_end(self):
        reservations = self.scheduler.reservations
        assert not self.scheduler.sequences
        assert (reservations.claimed_pages, reservations.budget.held_bytes) == (0, 0)
        assert self.scheduler.media.held_bytes == self.scheduler.media.idle_bytes
        assert self.results.keys() == self.cases.keys()
        for number, (ids, reason) in self.results.items():
            alone = self.expected[number]
            answer = alone.ids[alone.prompt_tokens :]
            whole = reason not in (FinishReason.CANCELLED, None)
            assert ids == (answer if whole else answer[: len(ids)])
            assert not whole or reason is alone.reason

    def _check_plan(self, plan):
        self._check_rows(plan)
        self._check_slices(plan)

    def _check_ahead(self, plan, ahead):
        """Each row begins where the step in flight leaves it; no answer is left out but for an end that is known."""
        places = self._places_behind(plan)
        assert next(iter(places)) in [row.sequence for row in ahead.rows], "the oldest waits"
        for row in ahead.rows:
            sequence, alone = row.sequence, self.expected[row.sequence.id]
            computed, tokens = places[sequence]
            assert (row.past, row.drafts, row.follows) == (computed, (), tokens > len(sequence.ids))
            assert 1 <= row.tokens <= tokens - computed
            assert sequence.long == self.scheduler.config.language.is_long(tokens)
            self._check_pages(row, alone)
        self._check_room(ahead, {sequence: tokens - computed for sequence, (computed, tokens) in places.items()})

    def _places_behind(self, plan):
        """How much of each sequence is computed, and known, once a step has landed; of those that then go on."""
        rows, places = {row.sequence: row for row in plan.standing().rows}, {}
        for sequence in (s for s in self.scheduler.sequences if s.state is State.RUNNING):
            row, known = rows.get(sequence), len(sequence.ids)
            computed = sequence.computed if row is None else row.past + row.tokens
            ends = computed == known and sequence.answer_tokens + 1 == sequence.max_tokens
            if not ends:
                places[sequence] = computed, known + (computed == known)
        return places

    def _check_rows(self, plan):
        running = [s for s in self.scheduler.sequences if s.state is State.RUNNING]
        for row in plan.rows:
            self._check_row(row)
        if not self.scheduler.paged:
            assert sum(row.tokens for row in plan.rows) <= self.scheduler.limits.step_tokens
        else:
            self._check_drafts(plan, running)
            self._check_room(plan, {sequence: sequence.pending for sequence in running})

    def _check_room(self, plan, pending):
        """Every answer has a row, and prompts have the room that there is; pending: the ids of each to be computed."""
        limits, served = self.scheduler.limits, [row.sequence for row in plan.rows]
        assert len({s.id for s in served}) == len(served)
        assert all(s in pending for s in served)
        decoding = {s.id for s, tokens in pending.items() if tokens == 1}
        assert decoding <= {s.id for s in served}
        prefilled = sum(row.tokens for row in plan.rows if row.sequence.id not in decoding)
        prompts = len(pending) - len(decoding)
        shares = len(decoding) >= prompts * (8 if prompts >= 4 else 1)
        room = limits.shared_step_tokens if shares else limits.step_tokens
        # One at least, however many decode: the oldest waits for nobody.
        assert prefilled <= max(min(room, limits.step_tokens - len(decoding)), 1)

    def _check_drafts(self, plan, running):
        limits, rows = self.scheduler.limits, [row for row in plan.rows if row.drafts]
        if not rows:
            return
        assert all(s.pending == 1 for s in running), "drafts hold up a prompt"
        assert sum(row.scored for row in plan.rows) <= min(limits.draft_tokens, limits.step_tokens)
        for row in rows:
            sequence, tokens = row.sequence, len(row.sequence.ids) + len(row.drafts)
            assert (row.tokens, row.scored) == (1 + len(row.drafts),) * 2
            assert tokens < sequence.footprint.prompt_tokens + sequence.max_tokens
            assert self.scheduler.config.language.is_long(tokens) == sequence.long

    def _check_row(self, row):
        sequence, alone = row.sequence, self.expected[row.sequence.id]
        assert sequence.ids == alone.ids[: len(sequence.ids)]
        assert sequence.long == self.scheduler.config.language.is_long(len(sequence.ids))
        assert 1 <= row.tokens <= len(sequence.ids) + len(row.drafts) - row.past
        if not self.scheduler.paged:
            assert (row.past, row.tokens, row.pages) == (0, len(sequence.ids), ())
            return
        assert row.past == sequence.computed
        self._check_pages(row, alone)

    def _check_pages(self, row, alone):
        sequence = row.sequence
        needed = -(-(row.past + row.tokens) // PAGE_TOKENS)
        assert len(row.pages) == len(set(row.pages)) >= needed
        assert row.pages is sequence.pages, "rows with the same pages are not known to have them"
        written = set(row.pages[row.past // PAGE_TOKENS : needed])
        others = {page for s in self.scheduler.sequences if s is not sequence for page in s.pages}
        assert not written & others, "a page is written that somebody else uses"
        assert all(self.scheduler.reservations.pages.users(page) == 1 for page in written)
        assert self.device.links(row) == alone.links[sequence.long][: row.past], "the pages hold something else"

    def _check_slices(self, plan):
        limits = self.scheduler.limits
        for kind, most in (("image", limits.crops), ("audio", limits.windows)):
            assert sum(piece.units for piece in plan.slices if piece.kind == kind) <= most
        assert len({id(piece.entry) for piece in plan.slices}) == len(plan.slices), "something is encoded twice"
        for piece in plan.slices:
            assert piece.sequence.state is State.ENCODING
            assert piece.first == piece.entry.done
            assert 1 <= piece.units <= piece.entry.units - piece.entry.done

    def _check_oldest(self, plan):
        """The oldest is served in every step, unless the pool has become too small even for it alone."""
        if not self.scheduler.sequences:
            return
        oldest = self.scheduler.sequences[0]
        if oldest.state is State.WAITING:
            reservations = self.scheduler.reservations
            assert self.scheduler.paged
            assert reservations.pages_for(stretched(oldest)) > reservations.pages.capacity
        elif oldest.state is State.PREPARING:
            assert any(s is oldest for s, _ in self.preparing)
        elif oldest.state is State.ENCODING:
            assert oldest in [piece.sequence for piece in plan.slices]
        else:
            assert oldest in [row.sequence for row in plan.rows]
