"""Requests of every mode for a long time, while memory runs out and callers go away at random places.

A tiny random model in fp32 on the CPU, its loop stepped by hand, so that a seed always gives the same run. Every answer
must be that of an undisturbed run, a cancelled one its beginning; every request ends once and in time; nothing is left
held. Usage: python -m benchmarks.soak --faults 10000 --cancels 2000 --out FILE
"""

import argparse
import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.load import read_counters
from memphi.errors import DoesNotFitError
from memphi.request import FinishReason, Request, Result, SamplingParams
from tests.checkpoints import tiny_config
from tests.faults import KINDS, Faults, From, older_spared
from tests.scenes import Stage, alone, clip, conversation, lively_model, picture, tiny_tokenizer

MOST_OPEN = 12
LONGEST_LIFE = 5000
"""Rounds after which a request counts as hanging; an undisturbed one takes some dozens."""
FAULT_SHARES = (0.0, 0.1, 0.4, 0.8)
"""How likely a fault is in a round; one of these for some rounds, then another, so that the ladder is climbed back."""
LONGEST_WEATHER = 300
BURST_SHARE, LONGEST_BURST = 0.002, 24
"""How likely it is that from a round on all memory is gone, for so many rounds at most: then requests fail too."""
CANCEL_SHARE, SUBMIT_SHARE, READY_SHARE = 0.07, 0.5, 0.4
"""How likely each is in a round."""
STEP_ALLOCATIONS = 700
"""Faults fall on one of a step's first so many allocations, earlier ones more often: small steps have no others."""
CHECK_ROUNDS = 16
SETTINGS = {"rows": 6, "step_tokens": 48, "crops_per_pass": 3, "windows_per_pass": 2}
PAGES = 44
"""Few enough that requests pause each other."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="how often memory runs out")
    parser.add_argument("--cancels", type=int, default=2_000, help="how many requests are cancelled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("memphi").setLevel(logging.ERROR)
    figures = soak(arguments.seed, arguments.faults, arguments.cancels, Progress())
    print(file=sys.stderr)
    if arguments.out:
        write_document(arguments.out, torch.device("cpu"), arguments.commit, figures)
    return 0


class Progress:
    """One line on stderr, written anew each second."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            print(f"\r{line}", end="", file=sys.stderr, flush=True)


def make_requests() -> list[Request]:
    """Some of every mode: short and long answers, chosen and drawn, with stop strings, that begin alike, that cross."""
    greedy = SamplingParams(max_tokens=10, ignore_eos=True)
    drawn = replace(greedy, temperature=1.0, top_p=0.95, max_tokens=16, repetition_penalty=1.1)
    long = replace(greedy, max_tokens=90)
    requests = [
        Request.ask("What is one and two?", sampling=greedy),
        Request.ask("Tell me of the sea.", sampling=long),
        Request.ask("Tell me of the sea and of its many islands, please.", sampling=replace(long, temperature=0.8)),
        Request.ask("x", sampling=replace(greedy, max_tokens=1)),
        Request.ask("", [picture(1)], sampling=greedy),
        Request.ask("Describe this.", [picture(1)], sampling=drawn),
        Request.ask("Describe this.", [replace(picture(1), detail="low")], sampling=long),
        Request.ask("Compare.", [picture(1), picture(2, 60, 90)], sampling=greedy),
        Request.ask("Compare.", [picture(2, 60, 90), picture(1), picture(2, 60, 90)], sampling=drawn),
        Request.ask("Read.", [picture(3, 300, 220)], sampling=greedy),
        Request.ask("", [clip(1)], sampling=greedy),
        Request.ask("Write it down.", [clip(1)], system="Be brief.", sampling=long),
        Request.ask("Which is louder?", [clip(2, 3.0), clip(1)], sampling=drawn),
        Request.ask("", [clip(3, 6.0)], sampling=drawn),
        Request.ask("", [picture(2, 60, 90), clip(1)], sampling=greedy),
        Request.ask("Is it this?", [clip(2, 3.0), picture(4, 120, 40)], sampling=long),
        Request.ask("Is it this?", [clip(4, 0.4), picture(4, 120, 40)], sampling=drawn),
    ]
    requests += [conversation(turns, sampling) for turns in (1, 2, 3, 4) for sampling in (greedy, drawn)]
    requests += [replace(request, sampling=replace(drawn, seed=seed)) for request in requests[::4] for seed in (1, 2)]
    return requests


def add_stops(requests: list[Request], results: list[Result]) -> list[Request]:
    """The same requests, and some of them ended by a part of their own answer."""
    stopped = [
        replace(request, sampling=replace(request.sampling, stop=("never said", result.text[4:6])))
        for request, result in zip(requests, results, strict=True)
        if len(result.text) > 8
    ]
    return requests + stopped[::3]


def soak(seed: int, faults: int, cancels: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run until memory has run out so often and so many were cancelled; AssertionError for anything that goes wrong."""
    with torch.inference_mode(False):
        model, tokenizer = lively_model(tiny_config(short_tokens=96, max_tokens=512)), tiny_tokenizer()
    requests = make_requests()
    requests = add_stops(requests, alone(model, tokenizer, requests))
    expected = alone(model, tokenizer, requests)
    executor = Later(Random(seed))
    stage = Stage(model, tokenizer, PAGES, executor, **SETTINGS)
    with older_spared():
        return _Soak(stage, executor, requests, expected, Random(seed)).run(faults, cancels, progress) | {"seed": seed}


class Later(Executor):
    """Does what it is given a while later, when told to."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._open: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        self._open.append((future, lambda: work(*arguments, **named)))
        return future

    def do_some(self) -> None:
        for pair in list(self._open):
            if self._random.random() < READY_SHARE:
                self._open.remove(pair)
                pair[0].set_result(pair[1]())


class _Soak:
    """One run."""

    def __init__(
        self, stage: Stage, executor: Later, requests: list[Request], expected: list[Result], random: Random
    ) -> None:
        self.stage, self.executor, self.random = stage, executor, random
        self.requests, self.expected = requests, expected
        self.open: dict[int, int] = {}  # Which request a number stands for.
        self.born: dict[int, int] = {}
        self.rounds = 0
        self.burst_rounds = 0
        self.weather_rounds = 0
        self.fault_share = 0.0
        self.limits = stage.scheduler.limits
        self.failed_steps = 0  # One after another.
        self.faults: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.cancels = 0

    def run(self, faults: int, cancels: int, progress: Callable[[str], None]) -> dict[str, Any]:
        started = time.perf_counter()
        tensors = self._rest()
        resident_bytes = read_counters()["VmRSS"]
        while self.faults.total() < faults or self.cancels < cancels:
            self._round(self.faults.total() < faults, self.cancels < cancels)
            progress(
                f"{self.faults.total()} of {faults} faults, {self.cancels} of {cancels} cancels, "
                f"{self.ended.total()} requests ended, {len(self.open)} open, {time.perf_counter() - started:.0f} s"
            )
        while self.open:
            self._round(False, False, more=False)
        self._climb_back()
        left_tensors = self._rest()
        assert left_tensors <= tensors, f"{left_tensors - tensors} tensors were left behind"
        stats = self.stage.loop.stats
        return {
            "rounds": self.rounds,
            "steps": stats.steps,
            "requests": self.ended.total(),
            "ended": dict(self.ended),
            "faults": dict(self.faults),
            "cancels": self.cancels,
            "wrong_answers": 0,
            "pauses": stats.pauses,
            "rungs": dict(stats.rungs),
            "answer_tokens": stats.answer_tokens,
            "shared_tokens": stats.shared_tokens,
            "tensors_left": left_tensors - tensors,
            "resident_growth_bytes": read_counters()["VmRSS"] - resident_bytes,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _round(self, fail: bool, cancel: bool, more: bool = True) -> None:
        self.rounds += 1
        random = self.random
        if more and len(self.open) < MOST_OPEN and random.random() < SUBMIT_SHARE:
            self._submit(random.randrange(len(self.requests)))
        self.executor.do_some()
        if cancel and self.open and random.random() < CANCEL_SHARE:
            number = random.choice(list(self.open))
            self.stage.cancel(number)
            self.cancels += 1
            self._end(number)
        self._step(fail)
        for number in [n for n in self.open if n in self.stage.ends]:
            self._end(number)
        for number, born in self.born.items():
            assert self.rounds - born < LONGEST_LIFE, f"request {number} hangs after {self.rounds} rounds"
        if self.rounds % CHECK_ROUNDS == 0:
            self.stage.scheduler.check()

    def _submit(self, kind: int) -> None:
        number = self.stage.submit(self.requests[kind])
        self.open[number], self.born[number] = kind, self.rounds

    def _step(self, fail: bool) -> None:
        """One step, in which memory runs out at a random place, or at all places for a while."""
        random, kind = self.random, self.random.choice(list(KINDS))
        if not self.weather_rounds:
            self.weather_rounds, self.fault_share = random.randrange(1, LONGEST_WEATHER), random.choice(FAULT_SHARES)
        self.weather_rounds -= 1
        if fail and self.fault_share and not self.burst_rounds and random.random() < BURST_SHARE:
            self.burst_rounds = random.randrange(2, LONGEST_BURST)
        if fail and self.burst_rounds:
            self.burst_rounds -= 1
            faults = Faults(From(0), KINDS[kind], self.stage.pool)
        elif fail and random.random() < self.fault_share:
            faults = Faults({int(STEP_ALLOCATIONS * random.random() ** 2)}, KINDS[kind], self.stage.pool)
        else:
            self.stage.step()
            self.failed_steps = 0
            return
        with faults:
            self.stage.step()
        assert faults.raised <= 1, "a step went on after memory ran out"
        if faults.raised:
            self.faults[kind] += 1
            self.failed_steps += 1
            self.stage.scheduler.check()
        elif faults.allocations:
            self.failed_steps = 0

    def _end(self, number: int) -> None:
        """Hold what a request got against what it gets undisturbed."""
        expected = self.expected[self.open.pop(number)]
        del self.born[number]
        pieces, end = self.stage.deltas.pop(number), self.stage.ends[number]
        self.stage.ends[number] = _DONE
        text, ids = "".join(piece.text for piece in pieces), tuple(i for piece in pieces for i in piece.ids)
        assert expected.text.startswith(text), f"request {number}: {text!r} is no beginning of {expected.text!r}"
        assert ids == expected.ids[: len(ids)], f"request {number} streams {ids}, not {expected.ids}"
        if isinstance(end, Exception):
            assert isinstance(end, DoesNotFitError), f"request {number} fails with {end!r}"
            assert self.failed_steps > 1, f"request {number} fails after one fault"
            self.ended["failed"] += 1
            return
        self.ended[end.finish_reason.value] += 1
        assert end.text == text, f"request {number}: the pieces are not the whole"
        if end.finish_reason is FinishReason.CANCELLED:
            assert end.ids == expected.ids[: len(end.ids)], f"request {number} was answered {end.ids}"
            return
        assert (end.text, end.ids, end.finish_reason) == (expected.text, expected.ids, expected.finish_reason), (
            f"request {number} was answered {end.text!r}, undisturbed it is {expected.text!r}"
        )

    def _climb_back(self) -> None:
        """Answer on in quiet: in the end a step does as much as at the beginning."""
        for _ in range(100):
            if self.stage.scheduler.limits == self.limits:
                return
            self._submit(1)
            while self.open:
                self._round(False, False, more=False)
        raise AssertionError(f"steps stay small: {self.stage.scheduler.limits}")

    def _rest(self) -> int:
        """Forget what is kept for later, hold what is left against nothing; returns how many tensors there are."""
        self.stage.check_empty()
        self.stage.scheduler.media.drop_idle()
        assert self.stage.scheduler.media.held_bytes == 0
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


_DONE = AssertionError("this request has ended")


if __name__ == "__main__":
    sys.exit(main())
