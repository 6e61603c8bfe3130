"""Do one step on the device: encode slices, compute the rows in one packed forward pass, choose the next ids.

What a step does the scheduler has decided; doing the same step again changes nothing, so a failed one may be repeated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from itertools import accumulate, takewhile

import numpy as np
import torch
from torch import Tensor

from memphi.cache.pool import PagePool
from memphi.engine.device import current
from memphi.engine.encoders import Encoders
from memphi.engine.gauge import Gauge
from memphi.engine.graphs import Graphs
from memphi.engine.prices import price_choice, price_graphs, price_rows, price_slices
from memphi.engine.recovery import is_out_of_memory
from memphi.engine.sequence import Sequence as Running
from memphi.engine.step import PlannedRow, StepPlan, StepResult
from memphi.errors import RequestError
from memphi.model.decode import Chosen
from memphi.model.kernels.launch import compile_ahead
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.model.upload import upload
from memphi.request import SamplingParams
from memphi.sampling.grammar import allows
from memphi.sampling.sampler import Choice, Draw, likeliest, sample

UNKNOWN = (0,)
"""Stands for an id that the step before chooses."""
READY_ROWS = (14, 0), (30, 0), (50, 0), (300, 0), (5, 40)
"""New tokens and past of rows whose kernels an idle engine gets ready: most others without an adapter have the same,
prompts of up to 16, 32, 64 and more tokens, and drafts. None has a past that torch would read."""
UNREACHED = Draw(SamplingParams(), ())
"""Stands for a place that no answer gets to."""


@dataclass(frozen=True, eq=False)
class Flight:
    """A step that was launched, and that the host goes on without."""

    plan: StepPlan
    choosing: Sequence[PlannedRow]
    """The rows that an id is chosen for."""
    chosen: Tensor
    """[choosing rows] int64 on the host, in memory of its own."""
    arrived: torch.cuda.Event | None
    """When it is there; None: it is."""

    def land(self) -> StepResult:
        """Wait for the ids that were chosen; those of rows that stand no more are left out."""
        if self.arrived is not None:
            self.arrived.synchronize()
        chosen = zip(self.choosing, self.chosen.tolist(), strict=True)
        return StepResult({row.sequence.id: [number] for row, number in chosen if row.stands})

    @cached_property
    def places(self) -> Mapping[Running, int]:
        """Where the id of each sequence is chosen, for the step behind it."""
        return {row.sequence: place for place, row in enumerate(self.choosing)}


class Runner:
    """The model and the pool that its rows' pages lie in; without a pool every row is whole."""

    def __init__(
        self,
        model: Phi4MM,
        pool: PagePool | None,
        forbidden: Tensor,
        gauge: Gauge,
        graphs: Graphs | None = None,
        upcoming: Callable[[StepPlan], Sequence[int]] = lambda plan: (),
    ) -> None:
        """Without graphs every step is launched operation by operation.

        upcoming tells the pages that the step after one may begin: while the device computes the one, memory is put
        behind them.
        """
        self.model = model
        self.pool = pool
        self.forbidden = forbidden  # [vocab_size] bool: ids without a token
        self.gauge = gauge
        self.graphs = graphs
        self._upcoming = upcoming
        self._encoders = Encoders(model)
        self._unready = list(READY_ROWS)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step; raises whatever the device raises."""
        with current(self.model.device):
            self._encode(plan)
            if not plan.rows:
                return StepResult({})
            plan = _by_adapter(plan)
            self._map_pages(plan)
            return reduce(_join, (self._run_rows(part) for part in _parts(plan, self.model.adapters_at_once)))

    def _run_rows(self, plan: StepPlan) -> StepResult:
        divided = self._divide(plan.rows)
        if divided is None:
            self._miss(plan.rows)
        else:
            plan = replace(plan, rows=(*divided.answers, *divided.prompts))
            self._capture(divided)  # What that takes is no part of a step's.
        with self.gauge.watching(*self._price(plan, divided)):
            return self._compute(plan, divided)

    def divide_for_launch(self, plan: StepPlan) -> "Divided | None":
        """A step's rows for `launch`, where nobody but the device is needed to choose its ids, or None: graphs that are
        there do it, and all rows that choose are plain, and without drafts.
        """
        divided = None if plan.slices else self._divide(_by_adapter(plan).rows)
        if divided is None or self.graphs is None or len(divided.choosing) > self.graphs.most_rows:
            return None
        are_plain = all(row.follows or (_is_plain(row) and not row.drafts) for row in divided.choosing)
        return divided if are_plain and self._are_there(self.graphs, divided) else None

    def _are_there(self, graphs: Graphs, divided: "Divided") -> bool:
        """Whether graphs of prompts are there; and those of answers behind a step in flight, with what it chose.

        So nobody who is in that waits for a capture.
        """
        answers, prompts = divided.answers, divided.prompts
        if prompts and not graphs.prefills.is_ready(_rows(prompts)):
            return False
        if not any(row.follows for row in divided.choosing):
            return True
        return graphs.is_ready(_rows(answers)) if answers else graphs.has_chosen

    @torch.inference_mode()
    def launch(self, plan: StepPlan, divided: "Divided", before: Flight | None = None) -> Flight:
        """Begin a step that `divide_for_launch` divided and do not wait for it; raises whatever the device raises.

        `before` is the step that is still in flight where this one goes on from what that chooses. All of it is on
        one stream: pages that are freed meanwhile may be written once more, and whoever gets them writes after that.
        """
        with current(self.model.device):
            self._map_pages(plan)
            self._capture(divided)
            with self.gauge.watching(*self._price_flight(plan, divided)):
                chosen = self._chosen_of_graphs(divided, before)
            told = chosen.to("cpu", non_blocking=True, copy=True)  # Pinned, where there is a GPU.
            arrived = torch.cuda.Event() if chosen.is_cuda else None
            if arrived is not None:
                arrived.record()
            return Flight(plan, divided.choosing, told, arrived)

    @torch.inference_mode()
    def rehearse(self) -> bool:
        """Get the kernels of a kind of row or of a graph that no step has needed yet ready; whether there was one.

        Raises whatever the device raises.
        """
        if self.graphs is None:
            return False
        with current(self.model.device):
            if not self._unready:
                return self.graphs.rehearse()
            compile_ahead(partial(self._compute_row, *self._unready.pop(0)), self.model.device)
            return True

    def _compute_row(self, tokens: int, past: int) -> None:
        """A row of any ids, in any pages."""
        assert self.pool is not None
        pages = tuple(range(-(-(past + tokens) // self.pool.page_tokens)))
        row = Row(tokens, past, self.model.merged, pages=pages)
        self.model(self._upload([0] * tokens), [row], cache=self.pool)

    def _encode(self, plan: StepPlan) -> None:
        for kind in ("image", "audio"):
            slices = [piece for piece in plan.slices if piece.kind == kind]
            if slices:
                with self.gauge.watching(*price_slices(slices, self.model.config, self.model.dtype.itemsize)):
                    self._encoders.run(slices)

    def _price(self, plan: StepPlan, divided: "Divided | None") -> tuple[str, int]:
        model, masked = self.model, self.model.device.type != "cuda"
        kept = self.pool.cache_format if self.pool else "plain"
        if divided is not None:
            return price_graphs(divided.answers, divided.prompts, model.config, model.dtype.itemsize, kept)
        kernels = model.uses_kernels and self.pool is not None
        return price_rows(plan, model.config, model.dtype.itemsize, masked, model.adapter_form, kernels, kept)

    def _price_flight(self, plan: StepPlan, divided: "Divided") -> tuple[str, int]:
        """The same of a step that is only launched: graphs choose answers' ids themselves."""
        return self._price(plan, replace(divided, answers=())) if divided.prompts else price_choice()

    def _divide(self, rows: Sequence[PlannedRow]) -> "Divided | None":
        """The rows as graphs take them; None where they do not.

        Answers go along with prompts where that graph has room for them, since each reads all weights.
        """
        graphs = self.graphs
        if graphs is None:
            return None
        if self._can_decode(rows):
            return Divided(rows, ())
        if graphs.can_prefill(_rows(rows)):
            return Divided((), rows)
        answers, prompts = _apart(rows)
        if answers and prompts and self._can_decode(answers) and graphs.can_prefill(_rows(prompts)):
            return Divided(answers, prompts)
        return None

    def _miss(self, rows: Sequence[PlannedRow]) -> None:
        """Have graphs note what they did not take."""
        if self.graphs is not None and not self.graphs.miss(_rows(rows)):
            self.graphs.miss(_rows(_apart(rows)[1]))

    def _capture(self, divided: "Divided") -> None:
        """Have the graphs that a step needs."""
        assert self.graphs is not None
        if divided.answers:
            self.graphs.ready(_rows(divided.answers))
        if divided.prompts:
            self.graphs.prefills.ready(_rows(divided.prompts))

    def _can_decode(self, rows: Sequence[PlannedRow]) -> bool:
        """Whether a graph of answers can do these rows: all are answers that go on by one id."""
        # A prompt among them is seen at once, whatever comes before it.
        if self.graphs is None or any(row.tokens > 1 for row in rows) or not all(map(_goes_on, rows)):
            return False
        return self.graphs.can_decode({row.sequence.adapter for row in rows}, len(rows))

    def _map_pages(self, plan: StepPlan) -> None:
        """Put memory behind the pages that the rows begin; behind all others that they use there is some."""
        if self.pool is None:
            return
        page_tokens = self.pool.page_tokens
        pages = [page for row in plan.rows for page in row.begun_pages(page_tokens)]
        held_bytes = self.pool.mapped_bytes
        self.gauge.make_room(self.pool.missing_bytes(pages))
        self.pool.ensure(pages)
        if self.pool.mapped_bytes != held_bytes:
            self.gauge.cap()

    def _map_ahead(self, pages: Sequence[int]) -> None:
        """Put memory behind pages that may be begun soon, where there is room: who needs them says if there is none."""
        missing_bytes = self.pool.missing_bytes(pages) if self.pool else 0
        if self.pool is None or not missing_bytes or not self.gauge.has_room(missing_bytes):
            return
        try:
            self.pool.ensure(pages)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        self.gauge.cap()

    def _compute(self, plan: StepPlan, divided: "Divided | None") -> StepResult:
        logits = self._logits(plan) if divided is None else self._logits_of_graphs(divided)
        self._map_ahead(self._upcoming(plan))
        sampling = [row for row in plan.rows if row.samples]
        if not sampling:
            return StepResult({})
        failed, draws = dict[int, RequestError](), list[Draw]()
        places = list[tuple[PlannedRow, int, int]]()  # Each row's first draw, and how many of its own there are.
        for row in sampling:
            own = _draws(row, failed)  # Masks are made while the device computes.
            places.append((row, len(draws), len(own)))
            draws += own
            draws += [UNREACHED] * (row.scored - len(own))
        choices = sample(logits, draws, self.forbidden)
        kept = {row.sequence.id: _kept(row.drafts, choices[first : first + count]) for row, first, count in places}
        return StepResult(
            {number: [choice.id for choice in some] for number, some in kept.items() if some},
            {number: told for number, some in kept.items() if (told := [c.logprob for c in some if c.logprob])},
            failed,
        )

    def _logits(self, plan: StepPlan) -> Tensor:
        """Scores at the places where rows choose an id: [places, vocab_size]."""
        media = _media(plan.rows)
        logits: Tensor = self.model(self._ids(plan.rows), _rows(plan.rows), media, self.pool, _places(plan.rows))
        return logits

    def _logits_of_graphs(self, divided: "Divided") -> Tensor:
        """The same, those of answers first."""
        graphs, found = self.graphs, list[Tensor]()
        assert graphs is not None
        if answers := divided.answers:
            found.append(graphs.decode(_rows(answers), [number for row in answers for number in row.ids]).logits)
        if divided.prompts:
            found.append(self._logits_of_prompts(divided.prompts))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _chosen_of_graphs(self, divided: "Divided", before: Flight | None) -> Tensor:
        """The likeliest ids there, [places], where the next step finds them."""
        graphs, answers = self.graphs, divided.answers
        assert graphs is not None
        if answers:
            chosen = graphs.decode(_rows(answers), _first_ids(answers, before)).chosen
        if divided.prompts:
            firsts = likeliest(self._logits_of_prompts(divided.prompts, before), self.forbidden)
            chosen = graphs.note_chosen(firsts, behind=len(answers))
        return chosen

    def _logits_of_prompts(self, prompts: Sequence[PlannedRow], before: Flight | None = None) -> Tensor:
        graphs, model = self.graphs, self.model
        assert graphs is not None
        hidden = graphs.prefills.compute(_rows(prompts), model.embed(self._ids(prompts, before), _media(prompts)))
        logits: Tensor = model.language.logits(hidden[self._upload(_places(prompts))])
        return logits

    def _ids(self, rows: Sequence[PlannedRow], before: Flight | None = None) -> Tensor:
        """All that the rows compute; of those that follow a step in flight, what that chooses."""
        ids = self._upload([number for row in rows for number in (UNKNOWN if row.follows else row.ids)])
        following = {end - 1: row for row, end in zip(rows, _ends(rows), strict=True) if row.follows}
        if following:
            assert self.graphs is not None
            assert before is not None, "nobody knows such ids"
            places = [before.places[row.sequence] for row in following.values()]
            ids[self._upload(list(following))] = self.graphs.chosen(self._upload(places))
        return ids

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        return upload(np.array(numbers, dtype=np.int64), self.model.device)


@dataclass(frozen=True)
class Divided:
    """The rows of a step that graphs do."""

    answers: Sequence[PlannedRow]
    """Each goes on by one id."""
    prompts: Sequence[PlannedRow]
    """Answers may be among them."""

    @property
    def choosing(self) -> Sequence[PlannedRow]:
        """The rows that an id is chosen for, in their order."""
        return [*self.answers, *(row for row in self.prompts if row.samples)]


def _goes_on(row: PlannedRow) -> bool:
    """Whether a row computes the newest id of an answer and nothing else."""
    return row.follows or (row.tokens == row.scored == 1 and row.past >= row.sequence.footprint.prompt_tokens)


def _apart(rows: Sequence[PlannedRow]) -> tuple[Sequence[PlannedRow], Sequence[PlannedRow]]:
    """Answers that go on, and all others."""
    return tuple(row for row in rows if _goes_on(row)), tuple(row for row in rows if not _goes_on(row))


def _first_ids(answers: Sequence[PlannedRow], before: Flight | None) -> list[int | Chosen]:
    """The ids that answers begin with, as far as anybody knows them yet."""
    return [Chosen(before.places[row.sequence]) if before and row.follows else row.ids[0] for row in answers]


def _is_plain(row: PlannedRow) -> bool:
    """Whether a row's likeliest id is what is chosen, and nobody asks how likely it was."""
    sampling = row.sequence.sampling
    return row.sequence.matcher is None and sampling.top_logprobs is None and Draw(sampling, ()).is_plain


def _rows(rows: Sequence[PlannedRow]) -> list[Row]:
    return [Row(row.tokens, row.past, row.sequence.adapter, row.sequence.long, row.pages) for row in rows]


def _by_adapter(plan: StepPlan) -> StepPlan:
    """The same step with rows of one adapter side by side, so that many tokens take a product of its own columns."""
    if len({row.sequence.adapter for row in plan.rows}) < 2:
        return plan
    return replace(plan, rows=tuple(sorted(plan.rows, key=lambda row: row.sequence.adapter or "")))


def _parts(plan: StepPlan, adapters_at_once: int | None) -> list[StepPlan]:
    """A step as forward passes that use so many adapters at most, whose rows stand side by side; rows without any go
    along with the first."""
    names = sorted({row.sequence.adapter for row in plan.rows if row.sequence.adapter})
    if adapters_at_once is None or len(names) <= adapters_at_once:
        return [plan]
    using: list[tuple[str | None, ...]] = [(None, names[0]), *((name,) for name in names[1:])]
    return [replace(plan, rows=tuple(row for row in plan.rows if row.sequence.adapter in some)) for some in using]


def _join(one: StepResult, other: StepResult) -> StepResult:
    """What two passes of a step brought."""
    return StepResult(
        {**one.sampled, **other.sampled}, {**one.logprobs, **other.logprobs}, {**one.failed, **other.failed}
    )


def _draws(row: PlannedRow, failed: dict[int, RequestError]) -> list[Draw]:
    """What a row's choices depend on, each on the drafts before it, as far as the row's grammar goes along.

    None, and the reason goes to `failed`, where the grammar leads no further at all.
    """
    draws = list[Draw]()
    sequence, sampling = row.sequence, row.sequence.sampling
    for place in range(row.scored):
        allowed, drafts = None, row.drafts[:place]
        if sequence.matcher is not None:
            before = draws[-1].allowed if draws else None
            if before is not None and not allows(before, drafts[-1]):
                break
            try:
                allowed = sequence.matcher.allowed([*sequence.answer, *drafts], goes_on=sampling.ignore_eos)
            except RequestError as error:
                if not place:
                    failed[sequence.id] = error
                break  # After a draft it is no fault yet: if that is right, the next step tells.
        ids = [*sequence.ids, *drafts] if drafts else sequence.ids
        draws.append(Draw(sampling, ids, sequence.footprint.prompt_tokens, allowed))
    return draws


def _kept(drafts: Sequence[int], choices: Sequence[Choice]) -> Sequence[Choice]:
    """The choices up to the first that no draft foretold: those after it were made after something else."""
    if not drafts:
        return choices
    right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1].id, zip(drafts, choices, strict=False)))
    return choices[: right + 1]


def _media(rows: Sequence[PlannedRow]) -> list[tuple[int, Tensor]]:
    """The pieces of media embeddings that fall into a step, by packed token."""
    pieces = []
    for row, end in zip(rows, _ends(rows), strict=True):
        prompt = row.sequence.prompt
        assert prompt is not None
        if not prompt.spans:
            continue
        shift = end - row.tokens - row.past
        for span, entry in zip(prompt.spans, row.sequence.entries, strict=True):
            first, last = max(span.start, row.past), min(span.start + span.tokens, row.past + row.tokens)
            if first < last:
                assert entry.value is not None
                pieces.append((first + shift, entry.value[first - span.start : last - span.start]))
    return pieces


def _places(rows: Sequence[PlannedRow]) -> list[int]:
    """The packed tokens after which rows choose an id."""
    return [place for row, end in zip(rows, _ends(rows), strict=True) for place in range(end - row.scored, end)]


def _ends(rows: Sequence[PlannedRow]) -> Sequence[int]:
    """The packed token after each row's last."""
    return list(accumulate(row.tokens for row in rows))
