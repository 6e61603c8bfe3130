"""Decide one step and book its outcome: arithmetic on integers, no torch.

One rule for prefill and decode: a row computes its next n uncomputed tokens; decode is n = 1. Older sequences come
first everywhere: the oldest never waits for a newer one, and the newest is the one that is paused, so nobody starves.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memphi.cache.media import MediaCache, MediaKey
from memphi.cache.pages import MediaMark, page_key, page_keys, root_key
from memphi.config import ModelConfig
from memphi.engine.admission import stretched
from memphi.engine.drafts import Drafts
from memphi.engine.reservations import Reservations
from memphi.engine.sequence import Sequence as Running
from memphi.engine.sequence import State
from memphi.engine.stats import Stats
from memphi.engine.step import EncodeSlice, PlannedRow, StepPlan, StepResult
from memphi.request import FinishReason, Media, MediaKind, Prompt

BURST, FEW_ANSWERS = 4, 8
"""Prompts that make a burst, and how many answers for each of them still count as few beside it."""
LITTLE_SHARE = 8
"""One in so many of a step's prompt tokens is too little to begin a prompt with that does not end there."""


@dataclass(frozen=True)
class StepLimits:
    """How much one step does at most."""

    rows: int
    step_tokens: int
    shared_step_tokens: int
    """Prompt tokens in a step that also decodes, unless those that wait for their first token are a burst."""
    crops: int
    windows: int
    draft_tokens: int = 0
    """Tokens in a step of answers, drafts of theirs included; 0: there are none."""

    def units(self, kind: MediaKind) -> int:
        return self.crops if kind == "image" else self.windows


@dataclass  # Not frozen, though nobody changes it: one is made for every row of every step, three times as fast so.
class _Place:
    """How far a sequence is, or will be once the step in flight has landed."""

    sequence: Running
    computed: int
    pending: int
    """Ids that are known, or will be by then, and not computed."""
    follows: bool = False
    """Whether its newest id is what that step chooses."""

    @property
    def tokens(self) -> int:
        return self.computed + self.pending


@dataclass(frozen=True)
class Naming:
    """What the keys of cached pages and embeddings hold besides their content; of what weights they are, nobody asks: a
    cache lives with those that were loaded."""

    cache_format: str
    scheme: str
    preprocessing: int


class Scheduler:
    """All sequences of one engine, from their arrival to their end."""

    def __init__(
        self,
        config: ModelConfig,
        limits: StepLimits,
        reservations: Reservations,
        media: MediaCache[Any],
        naming: Naming,
        embedding_bytes: int,
        paged: bool = True,
    ) -> None:
        """embedding_bytes is what one token's embedding takes; with paged False nothing is kept between steps."""
        self.config = config
        self.limits = limits
        self.reservations = reservations
        self.media = media
        self.naming = naming
        self.paged = paged
        self.stats = Stats()
        self._embedding_bytes = embedding_bytes
        self._sequences: dict[int, Running] = {}  # Oldest first.

    # --- coming and going ---------------------------------------------------------------------------------------

    @property
    def sequences(self) -> Sequence[Running]:
        """All that have not ended, oldest first."""
        return list(self._sequences.values())

    def add(self, sequence: Running) -> None:
        """Take a sequence that fits alone; it is newer than all that came before, whatever its id."""
        self._sequences[sequence.id] = sequence

    def admit(self) -> list[Running]:
        """Let waiting sequences in, in order of arrival, as far as there is room; they are to be prepared now."""
        admitted, waiting = [], self._in(State.WAITING)
        active = len(self._sequences) - len(waiting)
        for sequence in waiting:
            if active >= self.limits.rows or not self._reserve_first(sequence):
                break  # Nobody passes one that waits: it would wait for ever.
            sequence.state = State.PREPARING
            admitted.append(sequence)
            active += 1
        return admitted

    def begin(self, sequence: Running, prompt: Prompt) -> None:
        """Go on with a sequence whose prompt is ready; one that was paused or has ended meanwhile is left alone."""
        if sequence.state is not State.PREPARING:
            return
        sequence.prompt = prompt
        sequence.ids = sequence.ids or list(prompt.ids)
        sequence.long = self.config.language.is_long(len(sequence.ids))
        sequence.entries = [self._entry(sequence, place) for place in range(len(prompt.spans))]
        sequence.drafts = sequence.drafts or Drafts(_never_drafted(prompt, self.config))
        sequence.state = State.ENCODING
        self._run_if_encoded(sequence)

    def finish(self, sequence: Running, reason: FinishReason) -> None:
        """End a sequence that is answered."""
        sequence.finish_reason = reason
        self.end(sequence)

    def end(self, sequence: Running) -> None:
        """End a sequence, answered or not, and free all that it holds."""
        self._let_go(sequence)
        sequence.state = State.ENDED
        self._sequences.pop(sequence.id, None)

    def pause(self, sequence: Running) -> None:
        """Free all that a sequence holds; it waits for its turn and goes on where it was."""
        self.stats.pauses += 1
        self._let_go(sequence)
        sequence.state = State.WAITING

    @property
    def waiting(self) -> int:
        """How many are not let in yet, or are paused."""
        return len(self._in(State.WAITING))

    @property
    def active(self) -> list[Running]:
        """All that were let in, oldest first: where memory is short the last one is paused."""
        return [sequence for sequence in self._sequences.values() if sequence.state is not State.WAITING]

    def resize(self, pages: int) -> None:
        """Set the size of the pool, pausing the newest sequences while more of it is claimed."""
        while self.reservations.claimed_pages > pages and (active := self.active):
            self.pause(active[-1])
        self.reservations.resize(pages)

    def check(self) -> None:
        """Raise AssertionError unless every claim is accounted for."""
        self.reservations.check(self.sequences)
        self.media.check()
        for sequence in self._in(State.WAITING):
            assert not sequence.reserved_pages, "a waiting sequence claims pages"
            assert not sequence.entries, "a waiting sequence holds embeddings"

    # --- a step ---------------------------------------------------------------------------------------------------

    def plan_step(self) -> StepPlan:
        """Choose the rows and the attachments of the next step; pauses the newest sequences where pages run out."""
        if not self.paged:
            return StepPlan(tuple(self._plan_whole_rows()), tuple(self._plan_slices()))
        self._reserve_growth()
        running = self._in(State.RUNNING)
        for sequence in running:
            if not sequence.pages:
                self._share_prefix(sequence)
        places = [_Place(sequence, sequence.computed, sequence.pending) for sequence in running]
        return StepPlan(tuple(self._plan_rows(places, self._most_drafts(places))), tuple(self._plan_slices()))

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step behind one that is still computed, whose rows that reach their ends choose an id each.

        None where integers do not tell it: something is to be encoded, drafts may pay, a sequence crosses into the long
        regime, one would have to be paused, or begins with what is computed just now. An answer that ends by what it
        says has a row here in vain, which `StepPlan.standing` leaves out.
        """
        flying = {row.sequence: row for row in plan.rows if row.stands}
        running, filling = self._in(State.RUNNING), self._filling(flying.values())
        fresh = [sequence for sequence in running if not sequence.pages]
        if self._in(State.ENCODING) or any(self._next_key(sequence) in filling for sequence in fresh):
            return None
        for sequence in fresh:
            self._share_prefix(sequence)
        places = [_place_behind(sequence, flying.get(sequence)) for sequence in running]
        going = [place for place in places if not (place.follows and _is_last(place.sequence))]
        if any(place.follows and self._crosses(place.sequence, place.tokens) for place in going):
            return None
        most_drafts = self._most_drafts(going)
        if not going or any(self._draft(place.sequence, most_drafts) for place in going):
            return None
        if not all(self._grow(place.sequence, place.tokens) for place in going):
            return None
        return StepPlan(tuple(self._plan_rows(going, most_drafts=0)))

    def upcoming_pages(self, plan: StepPlan) -> list[int]:
        """The pages that the prompts in the step behind one that is still computed are likely to begin."""
        running = self._in(State.RUNNING)
        left = sum(s.pending for s in running) - sum(row.tokens - len(row.drafts) for row in plan.rows)
        tokens = min(left, self.limits.step_tokens) if self.paged else 0
        return self.reservations.pages.upcoming(self.reservations.pages_for(max(tokens, 0)))

    def commit(self, plan: StepPlan, result: StepResult) -> list[Running]:
        """Book what a step did; returns the sequences that got a token. Those that end are still to be finished."""
        for piece in plan.slices:
            piece.entry.done += piece.units
        for sequence in self._in(State.ENCODING):
            self._run_if_encoded(sequence)
        return [row.sequence for row in plan.rows if self._commit_row(row, result)]

    # --- admission and growth ---------------------------------------------------------------------------------------

    def _reserve_first(self, sequence: Running) -> bool:
        reservations = self.reservations
        if self.paged:
            return reservations.reserve(sequence, reservations.pages_for(stretched(sequence)))
        # Where there are no pages, nothing else bounds the embeddings that are held; alone each request fits.
        active = self.active
        tokens = sum(_media_tokens(each) for each in (*active, sequence))
        return not active or tokens * self._embedding_bytes <= self.media.limit_bytes

    def _reserve_growth(self) -> None:
        """Promise every running sequence the pages that its next tokens need, oldest first."""
        for sequence in self._in(State.RUNNING):
            while sequence.state is State.RUNNING and not self._grow(sequence, len(sequence.ids)):
                self.pause(self.active[-1])

    def _grow(self, sequence: Running, tokens: int) -> bool:
        reservations = self.reservations
        least = reservations.pages_for(tokens)
        if least <= sequence.reserved_pages:
            return True
        stretch = reservations.pages_for(stretched(sequence))
        return reservations.reserve(sequence, stretch) or reservations.reserve(sequence, least)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _plan_rows(self, places: Sequence[_Place], most_drafts: int) -> Iterator[PlannedRow]:
        decoding = [place for place in places if place.pending == 1]
        prefilling = [place for place in places if place.pending > 1]
        for place in decoding:
            yield self._row(place, 1, self._draft(place.sequence, most_drafts))
        shares = not _is_burst(len(prefilling), len(decoding))
        room = self.limits.shared_step_tokens if shares else self.limits.step_tokens
        # One token at least: however many decode, the oldest prompt waits for none of them.
        room = max(min(room, self.limits.step_tokens - len(decoding)), 1)
        for place, tokens in _divide(prefilling, room):
            yield self._row(place, tokens)

    def _plan_whole_rows(self) -> Iterator[PlannedRow]:
        """Rows computed from their beginning, as many as a step holds: the oldest, then those with the least answer."""
        running, room = self._in(State.RUNNING), self.limits.step_tokens
        for sequence in [*running[:1], *sorted(running[1:], key=lambda s: (s.answer_tokens, s.id))]:
            if len(sequence.ids) <= room:
                room -= len(sequence.ids)
                yield PlannedRow(sequence, 0, len(sequence.ids), losses=sequence.losses)

    def _row(self, place: _Place, tokens: int, drafts: tuple[int, ...] = ()) -> PlannedRow:
        tokens += len(drafts)
        sequence, past = place.sequence, place.computed
        self.reservations.hold(sequence, self.reservations.pages_for(past + tokens))
        return PlannedRow(sequence, past, tokens, sequence.pages, drafts, place.follows, sequence.losses)

    def _commit_row(self, row: PlannedRow, result: StepResult) -> bool:
        sequence = row.sequence
        advanced = self._append(sequence, result)
        if self.paged:
            # Right drafts are computed as any id; what the pages hold of wrong ones is written over.
            sequence.computed += row.tokens - len(row.drafts) + max(advanced - 1, 0)
            self._register_pages(sequence, row.past)
        if not advanced:
            return False
        if row.drafts:
            self._note_drafts(row, advanced - 1)
        if sequence.finish_reason is None and self._crosses(sequence, len(sequence.ids)):
            self._cross(sequence)
        return True

    def _append(self, sequence: Running, result: StepResult) -> int:
        """Add the ids that were chosen, up to one that ends the answer; returns how many."""
        before = len(sequence.ids)
        for number in result.sampled.get(sequence.id, ()):
            sequence.ids.append(number)
            sequence.finish_reason = self._finish_reason(sequence)
            if sequence.finish_reason is not None:
                break
        advanced = len(sequence.ids) - before
        if result.logprobs:
            sequence.logprobs += result.logprobs.get(sequence.id, ())[:advanced]
        return advanced

    def _crosses(self, sequence: Running, tokens: int) -> bool:
        """Whether a sequence leaves its rope regime with so many tokens."""
        return self.config.language.is_long(tokens) != sequence.long

    def _cross(self, sequence: Running) -> None:
        """Go over to the long rope factors: what the pages hold is void, so the sequence is computed anew."""
        sequence.long, sequence.computed, sequence.keys = True, 0, []
        sequence.losses += 1
        if self.paged:
            self.reservations.give_back(sequence)

    def _finish_reason(self, sequence: Running) -> FinishReason | None:
        sampling = sequence.sampling
        # A grammar allows a stop only at its end: after it there is nothing to go on with.
        stops = sampling.grammar is not None or not sampling.ignore_eos
        if stops and sequence.ids[-1] in self.config.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.answer_tokens >= sequence.max_tokens else None

    # --- drafts -----------------------------------------------------------------------------------------------------

    def _most_drafts(self, places: Sequence[_Place]) -> int:
        """How many each row may have; none while prompts are computed, which keep a device busy and are learnt."""
        most = min(self.limits.draft_tokens, self.limits.step_tokens) // max(len(places), 1) - 1
        prefilling = [place.sequence for place in places if place.pending > 1]
        for sequence in prefilling if most > 0 else ():
            assert sequence.drafts is not None
            sequence.drafts.learn(sequence.ids)
        return 0 if prefilling else most

    def _draft(self, sequence: Running, most: int) -> tuple[int, ...]:
        """Guesses within all bounds of a sequence: its end, its rope regime, and the pages that it was promised.

        More pages are never asked for: nobody is to wait for a guess.
        """
        if most < 1:
            return ()
        assert sequence.drafts is not None
        tokens, language = len(sequence.ids), self.config.language
        promised_tokens = sequence.reserved_pages * self.reservations.pages.page_tokens
        most = min(most, sequence.max_tokens - sequence.answer_tokens - 1, promised_tokens - tokens)
        if not sequence.long:
            most = min(most, language.short_tokens - tokens)
        return sequence.drafts.propose(sequence.ids, most)

    def _note_drafts(self, row: PlannedRow, kept: int) -> None:
        assert row.sequence.drafts is not None
        row.sequence.drafts.note(len(row.drafts), kept, len(row.sequence.ids))
        self.stats.drafted_tokens += len(row.drafts)
        self.stats.accepted_tokens += kept

    # --- pages by content -------------------------------------------------------------------------------------------

    def _share_prefix(self, sequence: Running) -> None:
        """Take the pages of a known beginning."""
        shared = self._sharable(sequence)
        known = shared[: self.reservations.pages.match(shared)]
        if known:
            self.reservations.share(sequence, known)
            sequence.computed = len(known) * self.reservations.pages.page_tokens
            self.stats.shared_tokens += sequence.computed
        if sequence.cached_tokens is None:  # Later it may find what it left itself, when it was paused.
            sequence.cached_tokens = sequence.computed

    def _sharable(self, sequence: Running) -> Sequence[bytes]:
        """The names of the pages that it may find; at least one token is left, since only computing gives logits."""
        if not sequence.keys:
            marks = _marks(sequence)
            sequence.keys = page_keys(self._root(sequence), sequence.ids, marks, self.reservations.pages.page_tokens)
        return sequence.keys[: (len(sequence.ids) - 1) // self.reservations.pages.page_tokens]

    def _next_key(self, sequence: Running) -> bytes | None:
        """The name of the first page that it does not find now; None: it finds all."""
        shared = self._sharable(sequence)
        found = self.reservations.pages.match(shared)
        return shared[found] if found < len(shared) else None

    def _filling(self, rows: Iterable[PlannedRow]) -> set[bytes]:
        """The names of the pages that rows fill, as far as they are known."""
        size = self.reservations.pages.page_tokens
        return {key for row in rows for key in row.sequence.keys[row.past // size : (row.past + row.tokens) // size]}

    def _register_pages(self, sequence: Running, past: int) -> None:
        """Offer the pages that a row has filled to sequences that begin alike."""
        size = self.reservations.pages.page_tokens
        for place in range(past // size, sequence.computed // size):
            if place == len(sequence.keys):
                parent = sequence.keys[-1] if place else self._root(sequence)
                ids = sequence.ids[place * size : (place + 1) * size]
                sequence.keys.append(page_key(parent, place * size, ids, _marks(sequence)))
            self.reservations.pages.register(sequence.pages[place], sequence.keys[place])

    def _root(self, sequence: Running) -> bytes:
        mode = sequence.footprint.mode
        return root_key(mode.adapter, mode.audio_head, sequence.long, self.naming.cache_format)

    # --- attachments ------------------------------------------------------------------------------------------------

    def _plan_slices(self) -> Iterator[EncodeSlice]:
        """Units of attachments to encode, oldest sequences first; what several sequences need is encoded once."""
        room = {kind: self.limits.units(kind) for kind in ("image", "audio")}
        planned = set[int]()
        for sequence in self._in(State.ENCODING):
            assert sequence.prompt is not None
            for entry, span in zip(sequence.entries, sequence.prompt.spans, strict=True):
                units = min(entry.units - entry.done, room[span.kind])
                if units and id(entry) not in planned:
                    planned.add(id(entry))
                    room[span.kind] -= units
                    yield EncodeSlice(sequence, entry, span.kind, span.index, entry.done, units)

    def _run_if_encoded(self, sequence: Running) -> None:
        if all(entry.ready for entry in sequence.entries):
            assert sequence.prompt is not None
            # What was encoded is not needed on the host any more.
            sequence.prompt = replace(sequence.prompt, images=(), clips=())
            sequence.state = State.RUNNING

    def _entry(self, sequence: Running, place: int) -> Any:  # noqa: ANN401
        assert sequence.prompt is not None
        span, medium = sequence.prompt.spans[place], sequence.request.media[place]
        units = media_units(sequence, span.kind, span.index, self.config)
        key = self._media_key(medium, sequence)
        entry = self.media.acquire(key, span.tokens, span.tokens * self._embedding_bytes, units)
        self.stats.shared_media += entry.users > 1 or entry.ready
        return entry

    def _media_key(self, medium: Media, sequence: Running) -> MediaKey:
        head = sequence.footprint.mode.audio_head if medium.kind == "audio" else ""
        return MediaKey(medium.digest, medium.detail, self.naming.preprocessing, self.naming.scheme, head)

    # --- book-keeping -------------------------------------------------------------------------------------------------

    def _in(self, state: State) -> list[Running]:
        return [sequence for sequence in self._sequences.values() if sequence.state is state]

    def _let_go(self, sequence: Running) -> None:
        self.reservations.release(sequence)
        for entry in sequence.entries:
            self.media.release(entry)
        sequence.entries, sequence.prompt, sequence.keys, sequence.computed = [], None, [], 0
        sequence.losses += 1


def media_units(sequence: Running, kind: MediaKind, index: int, config: ModelConfig) -> int:
    """Crops of an image, or windows of a clip."""
    if kind == "image":
        return sequence.footprint.images[index].crops
    frames = sequence.footprint.clips[index].frames
    return -(-frames // (config.audio.window_tokens * config.audio.compression))


def _place_behind(sequence: Running, row: PlannedRow | None) -> _Place:
    """Where a sequence will be behind a step in which it has this row, if any."""
    if row is None:
        return _Place(sequence, sequence.computed, sequence.pending)
    computed = row.past + row.tokens
    pending = 1 if row.samples else len(sequence.ids) - computed
    return _Place(sequence, computed, pending, follows=row.samples)


def _is_last(sequence: Running) -> bool:
    """Whether the next id ends an answer by its length."""
    return sequence.answer_tokens + 1 >= sequence.max_tokens


def _is_burst(prompts: int, answers: int) -> bool:
    """Whether a step is the prompts' that wait for their first token, whatever answers run beside them.

    Prompts take a device as long in few steps as in many: so a burst of them ends sooner, and for the answers too.
    """
    return answers < prompts * (FEW_ANSWERS if prompts >= BURST else 1)


def _never_drafted(prompt: Prompt, config: ModelConfig) -> frozenset[int]:
    """Ids that end an answer, and those that attachments stand on."""
    return frozenset(config.stop_token_ids) | {prompt.ids[span.start] for span in prompt.spans}


def _media_tokens(sequence: Running) -> int:
    return sequence.footprint.image_tokens + sequence.footprint.audio_tokens


def _marks(sequence: Running) -> list[MediaMark]:
    assert sequence.prompt is not None
    return [
        MediaMark(span.start, span.tokens, entry.key.fingerprint())
        for span, entry in zip(sequence.prompt.spans, sequence.entries, strict=True)
    ]


def _divide(prefilling: Sequence[_Place], room: int) -> Iterator[tuple[_Place, int]]:
    """Share a step's prompt tokens: half for the oldest at least, the rest for the shortest, which end soon.

    What little is left at the end begins no prompt: attention over a past, and reading it again, would cost more.
    """
    if not prefilling:
        return
    oldest, *others = prefilling
    little = room // LITTLE_SHARE
    others.sort(key=lambda place: (place.pending, place.sequence.id))
    wanted = sum(place.pending for place in others)
    first = min(oldest.pending, max(room - wanted, -(-room // 2)))
    yield oldest, first
    room -= first
    for place in others:
        tokens = min(place.pending, room)
        if tokens == place.pending or tokens > little:
            yield place, tokens
            room -= tokens
