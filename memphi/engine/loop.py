"""The loop: admit, plan a step, run it, commit it; what a caller is to hear of it comes back as events.

Knows no threads but the preparation's: a worker calls `step` as long as there is work. Nothing that goes wrong with one
request reaches another.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from memphi.engine.admission import stretched
from memphi.engine.elastic import Elastic
from memphi.engine.messages import Event
from memphi.engine.preparation import Preparation
from memphi.engine.pressure import not_now
from memphi.engine.recovery import Ladder, attempt, is_out_of_memory, too_little
from memphi.engine.rungs import make_rungs
from memphi.engine.runner import Flight, Runner
from memphi.engine.scheduler import Scheduler
from memphi.engine.sequence import Sequence as Running
from memphi.engine.sequence import State
from memphi.engine.step import StepPlan, StepResult
from memphi.errors import DoesNotFitError
from memphi.inputs.tokenizer import TextStream, Tokenizer
from memphi.request import Delta, FinishReason, Prompt, Result
from memphi.sampling.stop import StopStrings

T = TypeVar("T")

ANSWERING_ADVICE = (
    "send fewer or smaller attachments, one at a time (--each), ask for a shorter answer (--max-tokens), or choose "
    "another device"
)
PATIENCE_SECONDS = 3600.0
"""How long no step goes well, while others hold the card, before a request is given up: they may leave it late, and
should it not be they who are in the way, nobody waits for ever."""
QUIET_SECONDS = 5.0
"""After so long without work there is time for what nobody waits for: who comes in the midst of it waits for it."""
WAITING = "wait for others on the card"
"""What waiting is called among the moves under memory pressure."""
NOTHING = Delta("", ())


@dataclass(eq=False)
class _Answer:
    """A sequence's text as it grows."""

    sequence: Running
    stream: TextStream
    stops: StopStrings
    started: float
    pieces: list[str] = field(default_factory=list)
    """The text that was shown."""
    first_token_seconds: float = 0.0
    fed_ids: int = 0
    shown_ids: int = 0

    def advance(self) -> Delta:
        """Turn the newest ids into text; marks the sequence as ended at a stop string.

        Ids whose text is held back come with the piece that shows it.
        """
        sequence = self.sequence
        text = self._feed()
        if self.stops.stopped:
            sequence.finish_reason = FinishReason.STOP
            sequence.cut_answer(self.fed_ids)
        elif sequence.finish_reason is not None:
            text += self.stops.flush()
        self.pieces.append(text)
        self.first_token_seconds = self.first_token_seconds or self.seconds
        return self._piece(text) if text or sequence.finish_reason is not None else NOTHING

    def _feed(self) -> str:
        """What the newest ids show, up to one that completes a stop string."""
        sequence, shown = self.sequence, ""
        for number in sequence.answer_after(self.fed_ids):
            self.fed_ids += 1
            text = self.stream.feed(number)
            if sequence.finish_reason is not None and self.fed_ids == sequence.answer_tokens:
                text += self.stream.flush()
            shown += self.stops.feed(text)
            if self.stops.stopped:
                break
        return shown

    def cut(self) -> Delta:
        """The last piece of an answer that is ended from outside; text that is held back is never shown."""
        self.sequence.finish_reason = FinishReason.CANCELLED
        return self._piece("")

    def _piece(self, text: str) -> Delta:
        """Text, and the ids up to it."""
        sequence = self.sequence
        shown = tuple(sequence.answer_after(self.shown_ids))
        logprobs = tuple(sequence.logprobs[self.shown_ids :]) if sequence.logprobs else ()
        self.shown_ids += len(shown)
        if sequence.finish_reason is None:
            return Delta(text, shown, logprobs=logprobs)
        cached = sequence.cached_tokens or 0
        return Delta(text, shown, sequence.finish_reason, sequence.degraded, logprobs, cached)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Loop:
    """Everything that one engine does, a step at a time."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        preparation: Preparation,
        tokenizer: Tokenizer,
        elastic: Elastic,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.stats = scheduler.stats
        self._preparation = preparation
        self._tokenizer = tokenizer
        self._elastic = elastic
        self._ladder = Ladder(make_rungs(scheduler, runner.pool, runner.model.device, runner.graphs), self.stats.rungs)
        self._answers: dict[int, _Answer] = {}
        self._flight: Flight | None = None
        """The step that is on the device now; what it chooses is heard in the next round."""
        self._waiting_since: float | None = None  # time.monotonic, where others on the card let no step go well.
        self._worked_at = time.monotonic()
        self.stalled = True
        """Whether only time, a prompt that becomes ready, or a caller brings the loop on."""
        self._note_state()

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._answers)

    def add(self, sequence: Running, started: float) -> list[Event]:
        """Take a sequence that arrived at `started` (time.perf_counter) and fits alone.

        One that may not wait, and would have to, is refused: the event tells why.
        """
        stops = StopStrings(sequence.sampling.stop)
        self._answers[sequence.id] = _Answer(sequence, TextStream(self._tokenizer), stops, started)
        self.stats.open += 1
        self.scheduler.add(sequence)
        if sequence.request.on_pressure != "refuse":
            return []
        self._admit()
        return [self._fail(sequence, self._not_now(sequence))] if sequence.state is State.WAITING else []

    def cancel(self, number: int) -> list[Event]:
        """End a request now, wherever it stands, and free what it holds; nothing where it has ended already."""
        answer = self._answers.get(number)
        if answer is None:
            return []
        return [Event(number, delta=answer.cut()), Event(number, result=self._end(answer))]

    def step(self) -> list[Event]:
        """One round: let in and prepare whom there is room for, then do one step on the device.

        A step that the device can choose the ids of is only launched. The next round launches another behind it, where
        that is known by then, and hears what it brought while the device goes on. Whoever has become ready meanwhile
        waits for the one in flight, and for no other.
        """
        self._elastic.follow(self.has_work)
        if self.has_work:
            self._worked_at = time.monotonic()
        admitted = self._admit()
        ready = self._preparation.advance()
        events = [event for pair in ready for event in self._begin(*pair)]
        flight, self._flight = self._flight, None
        if flight is not None:
            events += self._land(flight)
        plan = None if self._flight is not None else self.scheduler.plan_step()
        if plan:
            events += self._begin_step(plan)
        elif flight is None:
            events += self._wait_for_pages()
        self.stalled = self._waiting_since is not None or not (admitted or ready or flight or plan)
        self._note_state()
        return events

    def rehearse(self) -> bool:
        """Where nothing was asked for a while, get the kernels of a graph compiled before a step needs it.

        Whether there was one. What fails is told, and tried again by the step that needs it.
        """
        if time.monotonic() - self._worked_at < QUIET_SECONDS or self.has_work or self._elastic.is_crowded():
            return False
        try:
            done = attempt(self.runner.rehearse)
        except Exception as error:
            logging.getLogger(__name__).warning("kernels could not be compiled ahead: %s", error)
            return False
        if done is None and self.runner.graphs is not None:
            self.runner.graphs.drop()
        if done:
            self._elastic.stir()
        return bool(done)

    def close(self) -> list[Event]:
        """End all requests."""
        events = [event for number in list(self._answers) for event in self.cancel(number)]
        self._preparation.close()
        return events

    def _admit(self) -> list[Running]:
        admitted = self.scheduler.admit()
        for sequence in admitted:
            self._preparation.add(sequence)
        return admitted

    def _not_now(self, sequence: Running) -> DoesNotFitError:
        """Why a sequence would have to wait."""
        reservations, others = self.scheduler.reservations, self.scheduler.sequences[:-1]
        waiting = sum(other.state is State.WAITING for other in others)
        free = reservations.available_pages * reservations.pages.page_tokens if self.scheduler.paged else None
        return not_now(stretched(sequence), free, len(others) - waiting, self.scheduler.limits.rows, waiting)

    def _begin(self, sequence: Running, prepared: Future[Prompt]) -> list[Event]:
        error = prepared.exception()
        if error is None:
            self.scheduler.begin(sequence, prepared.result())
            return []
        if sequence.id not in self._answers:
            return []
        if isinstance(error, Exception) and is_out_of_memory(error):
            error = too_little("this request's attachments", torch.device("cpu"), ANSWERING_ADVICE)
        return [self._fail(sequence, error if isinstance(error, Exception) else RuntimeError(str(error)))]

    def _begin_step(self, plan: StepPlan) -> list[Event]:
        """Launch a step, or else run it."""
        divided = self.runner.divide_for_launch(plan)
        if divided is not None:
            return self._try(plan, lambda: self.runner.launch(plan, divided), self._let_fly)
        return self._try(plan, lambda: self.runner.run(plan), lambda result: self._commit(plan, result))

    def _land(self, flight: Flight) -> list[Event]:
        """Hear what a step brought, with the next one already on its way, if there can be one."""
        self._launch_behind(flight)
        plan = flight.plan.standing()
        if not plan:  # All have ended, or were paused.
            return []
        return self._try(plan, flight.land, lambda result: self._commit(plan, result))

    def _launch_behind(self, flight: Flight) -> None:
        """Launch the step behind one in flight; where that fails it is forgotten, and planned again in its turn."""
        plan = self.scheduler.plan_ahead(flight.plan)
        divided = None if plan is None else self.runner.divide_for_launch(plan)
        if plan is None or divided is None:
            return
        try:
            self._flight = attempt(lambda: self.runner.launch(plan, divided, flight))
        except Exception as error:
            logging.getLogger(__name__).warning("a step could not be launched behind another: %s", error)

    def _let_fly(self, flight: Flight) -> list[Event]:
        self._flight = flight
        return []

    def _try(self, plan: StepPlan, work: Callable[[], T], then: Callable[[T], list[Event]]) -> list[Event]:
        """Do work for a step, then what follows from it; where it fails, those whom the step serves bear it."""
        try:
            done = attempt(work)
        except Exception as error:
            return [self._fail(sequence, error) for sequence in _sequences(plan)]
        return self._recover(plan) if done is None else then(done)

    def _commit(self, plan: StepPlan, result: StepResult) -> list[Event]:
        self._ladder.note_success()
        self._waiting_since = None
        self._count(plan, result)
        advanced = self.scheduler.commit(plan, result)
        events = [self._fail(self._answers[number].sequence, error) for number, error in result.failed.items()]
        for sequence in advanced:
            self._advance(self._answers[sequence.id], events)
        return events

    def _recover(self, plan: StepPlan) -> list[Event]:
        """Go one rung down; where none is left, wait for others on the card, or give up the step's newest request."""
        if self._ladder.climb_down(plan):
            return []
        if self._elastic.is_crowded() and self._is_patient():
            self._ladder.wait()
            self._elastic.rest()
            return []
        self._ladder.note_success()
        self._waiting_since = None
        newest = _sequences(plan)[-1]
        return [self._fail(newest, too_little("this request", self.runner.model.device, ANSWERING_ADVICE))]

    def _wait_for_pages(self) -> list[Event]:
        """Where others on the card left too few pages to let anybody in, wait, or give up who has waited longest."""
        waiting = [sequence for sequence in self.scheduler.sequences if sequence.state is State.WAITING]
        if not waiting or self.scheduler.active or not self._elastic.is_crowded():
            self._waiting_since = None
            return []
        if self._is_patient():
            return []
        self._waiting_since = None
        return [self._fail(waiting[0], too_little("this request", self.runner.model.device, ANSWERING_ADVICE))]

    def _is_patient(self) -> bool:
        """Whether there is time left to wait; the first time that is told and counted."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
            self.stats.rungs[WAITING] += 1
            logging.getLogger(__name__).warning(
                "out of memory: %s, for %.0f minutes at most", WAITING, PATIENCE_SECONDS / 60
            )
        return time.monotonic() - self._waiting_since < PATIENCE_SECONDS

    def _advance(self, answer: _Answer, events: list[Event]) -> None:
        """Turn what an answer got into text, and add what its caller hears of it."""
        try:
            delta = answer.advance()
        except Exception as error:
            events.append(self._fail(answer.sequence, error))
            return
        if delta.text or delta.finish_reason is not None:
            events.append(Event(answer.sequence.id, delta=delta))
        if delta.finish_reason is not None:
            events.append(Event(answer.sequence.id, result=self._end(answer)))

    def _fail(self, sequence: Running, error: Exception) -> Event:
        del self._answers[sequence.id]
        self.scheduler.end(sequence)
        self.stats.open -= 1
        self.stats.ended["failed"] += 1
        return Event(sequence.id, error=error)

    def _end(self, answer: _Answer) -> Result:
        """Free what a sequence holds and tell its answer."""
        sequence = answer.sequence
        assert sequence.finish_reason is not None
        del self._answers[sequence.id]
        self.scheduler.finish(sequence, sequence.finish_reason)
        self.stats.open -= 1
        self.stats.ended[sequence.finish_reason.value] += 1
        return Result(
            text=answer.text,
            ids=tuple(sequence.answer),
            finish_reason=sequence.finish_reason,
            footprint=sequence.footprint,
            seconds=answer.seconds,
            first_token_seconds=answer.first_token_seconds,
            peak_memory_bytes=self.runner.gauge.peak_bytes(),
            degraded=sequence.degraded,
            logprobs=tuple(sequence.logprobs),
            cached_tokens=sequence.cached_tokens or 0,
        )

    def _note_state(self) -> None:
        self.stats.waiting = self.scheduler.waiting
        self.stats.accounts = self.scheduler.reservations.budget.accounts()
        self.stats.mapped_bytes = self.runner.pool.mapped_bytes if self.runner.pool else 0

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        self.stats.steps += 1
        self.stats.encoded_units += sum(piece.units for piece in plan.slices)
        prompts = [row for row in plan.rows if not row.sequence.answer_tokens]
        self.stats.prompt_tokens += sum(row.tokens - len(row.drafts) for row in prompts)
        self.stats.answer_tokens += sum(len(ids) for ids in result.sampled.values())


def _sequences(plan: StepPlan) -> list[Running]:
    """Whom a step serves, oldest first."""
    served = [row.sequence for row in plan.rows] + [piece.sequence for piece in plan.slices]
    return sorted(set(served), key=lambda sequence: sequence.id)
