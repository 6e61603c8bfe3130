"""Run workloads on an engine, and hold what they took against the least that this card allows.

Each is done twice to warm up, then several times, and the middle figure counts; every time with other requests. The
clock starts with decoded pixels or samples in the host's memory and stops with the last token there. Text counts from
its tokens on, as in peers' figures: they are counted before the clock starts.
"""

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from memphi.bench.limits import Card, Task, least, phases
from memphi.bench.memory import MemoryTrace, taken_bytes
from memphi.bench.workloads import UNITS, Draft, Timing, Words, Workload, draw
from memphi.engine.engine import Engine
from memphi.engine.messages import Event
from memphi.engine.pressure import Part
from memphi.errors import MemphiError
from memphi.request import Footprint, Result

WARM_UP_TOKENS = 16
"""Enough of an answer to meet every kind of step; done twice, for what an engine captures when it is needed again."""


class NotRunError(MemphiError):
    """A workload that was not measured, and why."""


@dataclass(frozen=True)
class Measured:
    """One time that a workload was done."""

    timing: Timing
    token_seconds: float | None
    """From one token to the next of a request, in the middle of all requests; None for answers of one token."""
    count_seconds: float
    """What counting the tokens of text took, before the clock."""
    tasks: tuple[Task, ...]
    memory: MemoryTrace
    counted: dict[str, int]
    """What the engine counted meanwhile that should not be: tokens found in a cache, pauses, moves down its ladder."""


class Bench:
    """One engine, and the time that there is for it."""

    def __init__(
        self, engine: Engine, card: Card, repeats: int, seed: int, deadline: float, tell: Callable[[str], None]
    ) -> None:
        """deadline is a time of time.perf_counter; tell hears what is being done."""
        self.engine, self.card = engine, card
        self._repeats, self._seed, self._deadline, self._tell = repeats, seed, deadline, tell

    def measure(self, workload: Workload) -> dict[str, Any]:
        """A workload's record; raises NotRunError where there was no time to do it once, and what the engine raises."""
        runs = self.repeat(workload)
        middle = _middle(runs, workload)
        model = self.engine.model
        parts = phases(model.config, middle.tasks, model.dtype.itemsize, self.engine.plan.cache_format)
        figure, limit = workload.figure(middle.timing), workload.figure(least(parts, self.card))
        footprints = [task.footprint for task in middle.tasks]
        return {
            "workload": workload.name,
            "says": workload.says,
            "metric": workload.metric,
            "unit": UNITS[workload.metric],
            "figure": figure,
            "limit": limit,
            "share": workload.share(figure, limit),
            "figures": [workload.figure(run.timing) for run in runs],
            "repeats": f"{len(runs)} of {self._repeats}",
            **asdict(middle.timing),
            "token_seconds": middle.token_seconds,
            "count_seconds": middle.count_seconds,
            "requests": workload.requests,
            "prompt_tokens": sum(footprint.prompt_tokens for footprint in footprints),
            "answer_tokens": sum(task.answer_tokens for task in middle.tasks),
            "crops": sum(footprint.crops for footprint in footprints),
            "sound_seconds": sum(clip.seconds for footprint in footprints for clip in footprint.clips),
            "phases": {part.name: asdict(part) | {"limit_seconds": part.seconds(self.card)} for part in parts},
            "peak_memory_bytes": max((run.memory.peak_bytes or 0 for run in runs), default=0) or None,
            "memory": middle.memory.thinned(),
            **middle.counted,
        }

    def repeat(self, workload: Workload) -> list[Measured]:
        """Do a workload as often as there is time for; raises NotRunError."""
        self._tell(f"{workload.name}: {workload.says}")
        short = replace(workload, answer_tokens=min(workload.answer_tokens, WARM_UP_TOKENS))
        for seed in (self._seed, self._seed + self._repeats + 1):
            self.once(short, seed)
        runs, longest = list[Measured](), 0.0
        for number in range(1, self._repeats + 1):
            if time.perf_counter() + longest >= self._deadline:
                break
            started = time.perf_counter()
            try:
                runs.append(self.once(workload, self._seed + number))
            except NotRunError:
                break
            longest = time.perf_counter() - started
        if not runs:
            raise NotRunError("there was no time left to do it once")
        return runs

    @cached_property
    def _words(self) -> Words:
        return Words(self.engine.tokenizer, self.engine.model.config.language.vocab_size)

    def once(self, workload: Workload, seed: int) -> Measured:
        """Do it once; raises NotRunError where time runs out before its end."""
        drafts, engine = draw(workload, self._words, seed), self.engine
        before, counting = _counted(engine), time.perf_counter()
        accepted = {} if workload.attaches else {draft: _accept(engine, draft) for draft in drafts}
        count_seconds = time.perf_counter() - counting
        with MemoryTrace(taken_bytes(engine)) as memory:
            started = time.perf_counter()
            parts = [accepted.get(draft) or _accept(engine, draft) for draft in drafts]
            handed, results = time.perf_counter() - started, _run(engine, parts, self._deadline)
            seconds = time.perf_counter() - started
        if results is None:
            raise NotRunError("there was no time left to end it")
        first = handed + max(result.first_token_seconds for result in results)
        return Measured(
            Timing(first, seconds),
            _token_seconds(results),
            count_seconds,
            tuple(self._task(part.footprint, workload) for part in parts),
            memory,
            {name: count - before[name] for name, count in _counted(engine).items()},
        )

    def _task(self, footprint: Footprint, workload: Workload) -> Task:
        adapter = footprint.mode.adapter
        return Task(footprint, workload.answer_tokens, None if adapter == self.engine.config.merge else adapter)


def _middle(runs: Sequence[Measured], workload: Workload) -> Measured:
    """The run with the middle figure; of two, the worse."""
    return sorted(runs, key=lambda run: workload.share(workload.figure(run.timing), 1.0))[(len(runs) - 1) // 2]


def _accept(engine: Engine, draft: Draft) -> Part:
    """What the engine is to run; text runs as what the draft says, for nothing in a text asks for an adapter."""
    (part,) = engine.accept(draft.request())
    return part if draft.mode is None else replace(part, footprint=replace(part.footprint, mode=draft.mode))


def _run(engine: Engine, parts: Sequence[Part], deadline: float) -> list[Result] | None:
    """Hand all over at once and wait for the ends, which alone are heard of; None where the deadline comes first.

    Raises what a request ends with.
    """
    ends: queue.SimpleQueue[Event] = queue.SimpleQueue()
    results = list[Result]()
    waiting = {engine.hand_over(part, lambda event: None if event.delta else ends.put(event)) for part in parts}
    try:
        while waiting:
            event = ends.get(timeout=max(deadline - time.perf_counter(), 0.0))
            waiting.discard(event.id)
            if event.error is not None:
                raise event.error
            assert event.result is not None
            results.append(event.result)
        return results
    except queue.Empty:
        return None
    finally:
        for number in waiting:
            engine.cancel(number)
        for _ in waiting:  # What comes next begins on an idle engine.
            ends.get()


def _token_seconds(results: Sequence[Result]) -> float | None:
    paces = [(r.seconds - r.first_token_seconds) / (len(r.ids) - 1) for r in results if len(r.ids) > 1]
    return median(paces) if paces else None


def _counted(engine: Engine) -> dict[str, int]:
    stats = engine.stats
    return {"shared_tokens": stats.shared_tokens, "pauses": stats.pauses, "rungs": stats.rungs.total()}
