"""Clients of every kind at one server for a long time, while memory runs out and some of them leave.

The demo model in fp32 on the CPU behind a real port. Every answer that ends must be the one that the same request gets
alone, streamed or not; what a client heard that left, or was refused in the middle, must be its beginning; and a
refusal is honest only where memory ran out again and again. In the end nothing is left held. Threads decide what meets
what, so a seed gives a similar run, not the same.
Usage: python -m benchmarks.server_soak --requests 5000 --out FILE
"""

import argparse
import asyncio
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import torch

from benchmarks.document import write_document
from benchmarks.load import read_counters
from benchmarks.server_clients import Hearing, LeftError, RefusedError, Told, check
from benchmarks.server_overhead import Port, listening
from benchmarks.server_questions import Question, make_questions
from benchmarks.soak import BURST_SHARE, CHECK_ROUNDS, FAULT_SHARES, LONGEST_BURST, LONGEST_WEATHER, Progress
from memphi.config import EngineConfig
from memphi.engine.engine import Engine, load_parts
from memphi.engine.messages import Event, Loading
from memphi.engine.reservations import HELD, PROMISED
from memphi.errors import DoesNotFitError
from memphi.server.app import make_app
from memphi.server.service import Service
from memphi.server.settings import ServerSettings
from tests.faults import KINDS, Faults, From, older_spared
from tests.scenes import plan_of

SETTINGS = EngineConfig(rows=16, step_tokens=128, crops_per_pass=4, windows_per_pass=2)
PAGES = 96
"""Few enough that requests wait for each other and pause each other."""
STEP_ALLOCATIONS = 320
"""Faults fall on one of a step's first so many allocations, earlier ones more often: small steps have no others."""
LONGEST_SECONDS = 120.0
"""A request that takes longer hangs."""
LEAVE_SECONDS, LEAVE_EVENTS = 2.0, 12
"""How long a client that leaves waits at most, and how many events it reads."""
REFUSAL = re.compile(r"this machine has too little memory for this request; send fewer .+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000, help="how many are asked at least")
    parser.add_argument("--clients", type=int, default=64, help="how many ask at once")
    parser.add_argument("--faults", type=int, default=2000, help="how often memory runs out")
    parser.add_argument("--cancels", type=int, default=500, help="how many clients leave before their answer has ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("memphi").setLevel(logging.ERROR)
    load = Load(arguments.requests, arguments.clients, arguments.faults, arguments.cancels)
    figures = soak(arguments.seed, load, Progress())
    print(file=sys.stderr)
    if arguments.out:
        write_document(arguments.out, torch.device("cpu"), arguments.commit, figures)
    return 0


@dataclass(frozen=True)
class Load:
    """How much there is to live through; a run goes on until all of it was there."""

    requests: int
    clients: int
    faults: int
    cancels: int


def soak(seed: int, load: Load, progress: Callable[[str], None], one_in: int = 1) -> dict[str, Any]:
    """Serve until so much was asked, failed and left; AssertionError for anything that goes wrong.

    Only one in so many of the distinct requests is asked.
    """
    parts = load_parts(Loading("demo", "cpu", "fp32", "auto", SETTINGS, "default"))
    engine = Engine(parts.model, parts.tokenizer, SETTINGS, plan_of(parts.model, SETTINGS, PAGES))
    app = make_app(engine, ServerSettings("demo"))
    with older_spared(), closing(engine):
        with listening(app) as port:
            questions = make_questions(parts.model.config.stop_token_ids)[::one_in]
            run = _Soak(engine, app.state.service, port, load, questions, Random(seed), progress)
            figures = asyncio.run(run.run())
        assert not engine.loop.has_work, "requests are left open"
    check_empty(engine)
    return figures | {"clients": load.clients, "seed": seed}


def check_empty(engine: Engine) -> None:
    """Raise AssertionError unless a closed engine holds nothing for anybody."""
    scheduler = engine.loop.scheduler
    scheduler.check()
    assert not scheduler.sequences
    assert scheduler.reservations.claimed_pages == 0
    accounts = scheduler.reservations.budget.accounts()
    assert accounts.get(HELD, 0) + accounts.get(PROMISED, 0) == 0, f"bytes are left reserved: {accounts}"
    assert scheduler.media.held_bytes == scheduler.media.idle_bytes, "embeddings are left held"


class Weather:
    """Lets memory run out at random places of an engine's steps, or at all places for a while."""

    def __init__(self, engine: Engine, random: Random) -> None:
        self.due = 0
        """So often it may have run out by now."""
        self.faults: Counter[str] = Counter()
        self.refusals = 0
        """Requests that the engine gave up."""
        self.trouble: list[str] = []
        """What must not be; the thread that steps goes on, and who looks here ends the run."""
        self._loop = engine.loop
        self._random = random
        self._kind = ""
        self._rounds = 0
        self._failed_steps = 0
        """One after another."""
        self._burst_rounds = 0
        self._weather_rounds = 0
        self._fault_share = 0.0
        self._step = self._loop.step
        self._loop.step = self.step  # type: ignore[method-assign]

    def step(self) -> list[Event]:
        """In place of the loop's own."""
        self._rounds += 1
        done, faults = self._loop.stats.steps, self._next()
        if faults is None:
            events = self._step()
        else:
            with faults:
                events = self._step()
        if faults is not None and faults.raised:
            self._failed_steps += 1
        elif self._loop.stats.steps > done:  # Else there was nothing to do.
            self._failed_steps = 0
        self._look(events, faults)
        return events

    def _next(self) -> Faults | None:
        """How the next step fails; None where it does not."""
        random = self._random
        if self.faults.total() >= self.due:
            return None
        if not self._weather_rounds:
            self._weather_rounds, self._fault_share = random.randrange(1, LONGEST_WEATHER), random.choice(FAULT_SHARES)
        self._weather_rounds -= 1
        if self._fault_share and not self._burst_rounds and random.random() < BURST_SHARE:
            self._burst_rounds = random.randrange(2, LONGEST_BURST)
        if self._burst_rounds:
            self._burst_rounds -= 1
            return self._faults(From(0))
        if random.random() < self._fault_share:
            return self._faults({int(STEP_ALLOCATIONS * random.random() ** 2)})
        return None

    def _faults(self, at: Container[int]) -> Faults:
        self._kind = self._random.choice(list(KINDS))
        return Faults(at, KINDS[self._kind], self._loop.runner.pool)

    def _look(self, events: Sequence[Event], faults: Faults | None) -> None:
        """Whether a step did what it may."""
        if faults is not None and faults.raised:
            self.faults[self._kind] += 1
            if faults.raised > 1:
                self.trouble.append("a step went on after memory ran out")
        for event in events:
            if event.error is None:
                continue
            self.refusals += 1
            if not isinstance(event.error, DoesNotFitError):
                self.trouble.append(f"a request fails with {event.error!r}")
            elif self._failed_steps < 2:
                self.trouble.append("a request fails after one fault")
        if (faults is not None and faults.raised) or self._rounds % CHECK_ROUNDS == 0:
            try:
                self._loop.scheduler.check()
            except AssertionError as wrong:
                self.trouble.append(f"the scheduler's books do not agree: {wrong}")


class _Soak:
    """One run."""

    def __init__(
        self,
        engine: Engine,
        service: Service,
        port: Port,
        load: Load,
        questions: Sequence[Question],
        random: Random,
        progress: Callable[[str], None],
    ) -> None:
        self.engine, self.service, self.port = engine, service, port
        self.load, self.questions, self.random, self.progress = load, questions, random, progress
        self.weather = Weather(engine, Random(random.random()))
        self.expected: list[Told] = []
        self.asked = 0
        self.leaving = 0
        """Clients that are about to leave."""
        self.left: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.statuses: Counter[int] = Counter()

    async def run(self) -> dict[str, Any]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.load.clients)
        timeout = httpx2.Timeout(LONGEST_SECONDS)
        self.port.loop.set_exception_handler(lambda _, context: self.weather.trouble.append(str(context)))
        async with httpx2.AsyncClient(base_url=self.port.url, limits=limits, timeout=timeout) as client:
            self.expected = [await self._answer_alone(client, question) for question in self.questions]
            resident_bytes, tasks = read_counters()["VmRSS"], len(asyncio.all_tasks(self.port.loop))
            started = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for _ in range(self.load.clients):
                    group.create_task(self._live(client, started))
            seconds = time.perf_counter() - started
            await self._settle(tasks)
            self.statuses = _statuses((await client.get("/metrics")).text)
        # Also to those that left, whom no status reached.
        assert self.statuses.keys() <= {200, 413, 499}, f"the server answers {self.statuses}"
        return self._figures(seconds) | {"resident_growth_bytes": read_counters()["VmRSS"] - resident_bytes}

    async def _answer_alone(self, client: httpx2.AsyncClient, question: Question) -> Told:
        hearing = Hearing(client, question)
        await hearing.whole()
        assert not hearing.told.failed
        return hearing.told

    async def _live(self, client: httpx2.AsyncClient, started: float) -> None:
        """One client: asks one question after another until there was enough of everything."""
        while not self._is_enough:
            assert not self.weather.trouble, self.weather.trouble
            self.asked += 1
            self.weather.due = self._due(self.load.faults)
            await self._ask(client, self.random.randrange(len(self.questions)))
            self.progress(
                f"{self.asked} of {self.load.requests} requests, {self.weather.faults.total()} of {self.load.faults} "
                f"faults, {self.left.total()} of {self.load.cancels} left, {self.refused.total()} refused, "
                f"{time.perf_counter() - started:.0f} s"
            )

    @property
    def _is_enough(self) -> bool:
        return (
            self.asked >= self.load.requests
            and self.left.total() >= self.load.cancels
            and self.weather.faults.total() >= self.load.faults
        )

    def _due(self, whole: int) -> int:
        """How much of the whole run's share is due by now."""
        return min(whole, -(-whole * self.asked // self.load.requests))

    async def _ask(self, client: httpx2.AsyncClient, number: int) -> None:
        """One request, from which the client may leave; hold what it hears against what it would hear alone."""
        question, expected = self.questions[number], self.expected[number]
        hearing = Hearing(client, question)
        leaves = self.left.total() + self.leaving < self._due(self.load.cancels)
        self.leaving += leaves
        try:
            await self._listen(hearing, question.streams and self.random.random() < 0.5, leaves)
            self._end(hearing, question, expected)
        except LeftError:
            check(question, expected, hearing.told, whole=False)
            self.left["in the middle" if hearing.begun else "before anything came"] += 1
        except RefusedError as error:
            self._note_refusal(error)
            check(question, expected, hearing.told, whole=False)
        finally:
            self.leaving -= leaves

    async def _listen(self, hearing: Hearing, streams: bool, leaves: bool) -> None:
        """Hear an answer, or the part for which a client stays. Raises LeftError, RefusedError."""
        random = self.random
        leaves_inside = leaves and streams and random.random() < 0.7
        # Some leave while they still send.
        seconds = random.random() ** 3 * LEAVE_SECONDS if leaves and not leaves_inside else LONGEST_SECONDS
        try:
            async with asyncio.timeout(seconds):
                if streams:
                    await hearing.stream(random.randrange(1, LEAVE_EVENTS) if leaves_inside else None)
                else:
                    await hearing.whole()
        except TimeoutError:
            assert seconds < LONGEST_SECONDS, "a request hangs"
            raise LeftError from None

    def _end(self, hearing: Hearing, question: Question, expected: Told) -> None:
        told = hearing.told
        check(question, expected, told, whole=True)
        for sentence in told.failed:
            self._check_refusal(sentence)
        self.ended["in part" if told.failed else "streamed" if hearing.begun else "whole"] += 1

    def _note_refusal(self, error: RefusedError) -> None:
        """A refusal is 413, or comes in the middle of a stream, and says what would work."""
        assert error.status in (200, 413), f"a request is answered {error}"
        self._check_refusal(error.message)
        self.refused[error.status] += 1

    def _check_refusal(self, sentence: str) -> None:
        assert REFUSAL.fullmatch(sentence), f"a refusal says: {sentence}"
        assert self.weather.refusals, "the server refuses what the engine did not"

    async def _settle(self, tasks: int) -> None:
        """Wait until nobody waits for anything; AssertionError where something goes on for nobody."""
        end = time.perf_counter() + LONGEST_SECONDS
        while left := self._left_over(tasks):
            assert time.perf_counter() < end, f"left when all clients are gone: {left}"
            await asyncio.sleep(0.05)
        assert not self.weather.trouble, self.weather.trouble
        cancelled, gone = self.engine.stats.ended["cancelled"], self.left.total()
        # Some leave when all has been sent, and some before anything was begun.
        assert cancelled >= gone // 2, f"{gone} clients left, and the engine went on but for {cancelled} requests"
        refused = self.refused.total() + self.ended["in part"]
        assert self.weather.refusals >= refused, f"{refused} are refused, the engine gave up {self.weather.refusals}"

    def _left_over(self, tasks: int) -> dict[str, int]:
        left = {
            "requests in the engine": self.engine.stats.open,
            "answers in the server": self.service.open_answers,
            "tasks in the server": max(len(asyncio.all_tasks(self.port.loop)) - tasks, 0),
        }
        return {name: number for name, number in left.items() if number}

    def _figures(self, seconds: float) -> dict[str, Any]:
        stats = self.engine.stats
        return {
            "requests": self.asked,
            "distinct_requests": len(self.questions),
            "ended": dict(self.ended),
            "left": dict(self.left),
            "refused": {"before the answer (413)": self.refused[413], "in the middle of a stream": self.refused[200]},
            "engine_gave_up": self.weather.refusals,
            "faults": dict(self.weather.faults),
            "wrong_answers": 0,
            "statuses": dict(self.statuses),
            "engine_ended": dict(stats.ended),
            "steps": stats.steps,
            "pauses": stats.pauses,
            "rungs": dict(stats.rungs),
            "answer_tokens": stats.answer_tokens,
            "shared_tokens": stats.shared_tokens,
            "shared_media": stats.shared_media,
            "seconds": round(seconds, 1),
        }


def _statuses(metrics: str) -> Counter[int]:
    """How often the server answered with each status, as it counts itself; 499: its client had left."""
    found = re.findall(r'^memphi_http_requests_total{.*status="(\d+)"} (\d+)', metrics, re.MULTILINE)
    statuses: Counter[int] = Counter()
    for status, count in found:
        statuses[int(status)] += int(count)
    return statuses


if __name__ == "__main__":
    sys.exit(main())
