"""What the HTTP layer costs: the same streams from the engine directly, and through the server, in turns.

With a real engine, in its own process, or with one on each of several devices: tokens per second both ways, and the
share lost; once while streams that are through ask again, answers being of different lengths, as on a busy server; once
where all ask at one moment, and once. And with an engine that brings tokens as fast as they are taken, so that the
serving process alone is the limit: its own time for each token. Clients are processes of their own.
Usage: python -m benchmarks.server_overhead --model random --out FILE
"""

import argparse
import asyncio
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any

from fastapi import FastAPI

from benchmarks.server_streams import question
from memphi.config import EngineConfig
from memphi.engine.facade import DeviceEngine
from memphi.engine.messages import Event, Loading, Mailbox, Mailboxes, Report, Submission
from memphi.engine.pressure import Bounds, Part
from memphi.engine.spread import start
from memphi.engine.stats import Stats
from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits
from memphi.request import Delta, FinishReason, Request, SamplingParams
from memphi.server.app import make_app
from memphi.server.service import ServedEngine
from memphi.server.serving import Server, address_of, bind
from memphi.server.settings import ServerSettings
from tests.server.fakes import FakeEngine

CORES_PER_CLIENT, MOST_CLIENTS = 4, 4
"""Processes of clients: one for so many cores, so that it is not they who are measured."""
SHARED_CORES = (
    "engine, server and clients share these cores: what one takes the others lack, so the share lost is the server's "
    "and the clients' share of the machine's time; on a GPU the engine's time is the device's"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo, random, a folder or a hub name")
    parser.add_argument("--device", default="auto", help="one, or several with commas between: an engine on each")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--streams", type=int, default=64, help="how many are open at once")
    parser.add_argument("--tokens", type=int, default=256, help="how long an answer is; in rounds, on average")
    parser.add_argument(
        "--rounds", type=int, default=6, help="answers of a stream, one by one; 1: all ask at once, only"
    )
    parser.add_argument("--repeats", type=int, default=5, help="how often each is done; the middle counts")
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules, "a serving process has no torch in it"
    sizes = Sizes(arguments.streams, arguments.tokens, arguments.rounds, arguments.repeats)
    burst = replace(sizes, rounds=1)
    figures: dict[str, Any] = {"model": arguments.model, "dtype": arguments.dtype, "cores": os.cpu_count()}
    figures |= {"engines": arguments.device.count(",") + 1, **asdict(sizes)}
    one = Loading(arguments.model, "", arguments.dtype, "auto", EngineConfig(), "default")
    figures["fast_engine"] = compare(fast_engine(sizes.streams), burst)
    print(f"an engine that is never waited for: {figures['fast_engine']}", file=sys.stderr)
    with closing(start([replace(one, device=device) for device in arguments.device.split(",")])) as engine:
        if sizes.rounds > 1:
            figures["engine"] = compare(engine, sizes)
            print(f"{arguments.model}: {figures['engine']}", file=sys.stderr)
        figures["burst"] = compare(engine, burst)
    print(f"{arguments.model}, all at one moment: {figures['burst']}", file=sys.stderr)
    if arguments.out:
        write(arguments.out, arguments.device, arguments.commit, figures)
    return 0


@dataclass(frozen=True)
class Sizes:
    """How much is asked in one go, and how often."""

    streams: int
    tokens: int
    """Of an answer; where a stream has several, on average."""
    rounds: int
    """Answers of each stream, one after another."""
    repeats: int

    def answers(self, stream: int) -> list[int]:
        """The lengths of a stream's answers: half to one and a half of the average, so that streams drift apart."""
        if self.rounds == 1:
            return [self.tokens]
        return [self.tokens * (9 + (5 * stream + 7 * turn) % 17) // 17 for turn in range(self.rounds)]

    @property
    def all_tokens(self) -> int:
        return sum(sum(self.answers(stream)) for stream in range(self.streams))


@dataclass(frozen=True)
class Run:
    """One go."""

    tokens: int
    seconds: float
    process_seconds: float
    """Of this process, all its threads together."""


def compare(engine: ServedEngine, sizes: Sizes) -> dict[str, Any]:
    """Take the same streams from an engine directly and over HTTP, in turns, so that a busy machine slows both."""
    endless = Endless(engine)
    with listening(make_app(endless, ServerSettings("model"))) as port:
        ways: dict[str, Callable[[Sizes], Run]] = {
            "direct": lambda few: take(endless, few),
            "http": lambda few: fetch(port.url, few),
        }
        for way in ways.values():  # Steps of every number of rows that there will be get their graphs and kernels now.
            way(sizes)
        runs = {name: list[Run]() for name in ways}
        for _, (name, way) in product(range(sizes.repeats), ways.items()):
            runs[name].append(way(sizes))
            assert runs[name][-1].tokens == sizes.all_tokens, f"{name}: not all tokens came"
    told = {name: _tell(some) for name, some in runs.items()}
    pace = {name: told[name]["tokens_per_second"] for name in told}
    spent = {name: told[name]["process_microseconds_per_token"] for name in told}
    return {
        **told,
        "share_lost": round(1 - pace["http"] / pace["direct"], 4),
        "http_microseconds_per_token": round(spent["http"] - spent["direct"], 1),
    }


def _tell(runs: Sequence[Run]) -> dict[str, Any]:
    paces = [run.tokens / run.seconds for run in runs]
    return {
        "tokens_per_second": round(median(paces), 1),
        "process_microseconds_per_token": round(median(1e6 * run.process_seconds / run.tokens for run in runs), 1),
        "runs_tokens_per_second": [round(pace, 1) for pace in paces],
    }


class Endless:
    """An engine whose answers end at their longest only: both ways do the same work, and how much is known."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine
        self.tokenizer = engine.tokenizer
        self.submit = engine.submit
        self.close = engine.close

    @property
    def engines(self) -> Sequence[DeviceEngine]:
        return self._engine.engines

    @property
    def bounds(self) -> Bounds:
        return self._engine.bounds

    def accept(self, request: Request, limits: MediaLimits = DEFAULT_LIMITS) -> tuple[Part, ...]:
        return self._engine.accept(replace(request, sampling=replace(request.sampling, ignore_eos=True)), limits)


# --- directly --------------------------------------------------------------------------------------------------------


def take(engine: Endless, sizes: Sizes) -> Run:
    """All streams at once, from the engine."""

    async def stream(number: int) -> int:
        return sum([await answer(number, *each) for each in enumerate(sizes.answers(number))])

    async def answer(number: int, turn: int, tokens: int) -> int:
        request = Request.ask(question(number, turn), sampling=SamplingParams(max_tokens=tokens))
        parts = await asyncio.to_thread(engine.accept, request)
        return sum([len(delta.ids) async for delta in engine.submit(parts)])

    async def all_streams() -> int:
        return sum(await asyncio.gather(*map(stream, range(sizes.streams))))

    with _clock() as clock:
        tokens = asyncio.run(all_streams())
    return clock(tokens)


@contextmanager
def _clock() -> Iterator[Callable[[int], Run]]:
    """Times the block; afterwards what it gives makes a run of so many tokens."""
    took = list[float]()
    started, spent = time.perf_counter(), time.process_time()
    yield lambda tokens: Run(tokens, *took)
    took += [time.perf_counter() - started, time.process_time() - spent]


# --- over HTTP -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Port:
    """Where a server listens, and the event loop that it runs in."""

    url: str
    loop: asyncio.AbstractEventLoop


@contextmanager
def listening(app: FastAPI) -> Iterator[Port]:
    """The server that `memphi serve` starts, on a free port, in a thread."""
    listener = bind("127.0.0.1", 0)
    server, loop = Server(app, 0.0, None, None), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve([listener]),), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has ended before it began"
        time.sleep(0.01)
    try:
        yield Port(address_of(listener, encrypted=False), loop)
    finally:
        server.should_exit = True
        thread.join()
        loop.close()


def fetch(url: str, sizes: Sizes) -> Run:
    """All streams at once, by clients that are connected before the clock starts."""
    processes = max(1, min(MOST_CLIENTS, (os.cpu_count() or 1) // CORES_PER_CLIENT, sizes.streams))
    edges = [sizes.streams * place // processes for place in range(processes + 1)]
    clients = [
        _Client({"url": url, "first": first, "answers": [sizes.answers(stream) for stream in range(first, end)]})
        for first, end in pairwise(edges)
    ]
    for client in clients:
        client.wait()
    with _clock() as clock:
        for client in clients:
            client.go()
        tokens = sum(client.heard() for client in clients)
    return clock(tokens)


class _Client:
    """A process of clients."""

    def __init__(self, asked: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.server_streams", json.dumps(asked)]
        folder = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, cwd=folder, stdin=PIPE, stdout=PIPE, text=True)

    def wait(self) -> None:
        """Until all its streams are connected."""
        assert self._read() == "connected"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def heard(self) -> int:
        """Tokens of all its streams, once they have ended."""
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


# --- an engine that is never waited for ------------------------------------------------------------------------------


def fast_engine(streams: int) -> FakeEngine:
    """An engine that begins when all streams are there."""
    engine = FakeEngine()
    engine.worker.submit = Rounds(streams).submit  # type: ignore[method-assign]
    return engine


class Rounds:
    """Brings each stream a token a round, as another process would send them, as soon as the round before is taken."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._waiting: list[tuple[Submission, Mailbox]] = []

    def submit(self, submission: Submission, mailbox: Mailbox) -> None:
        """Called in the event loop of who takes the tokens."""
        self._waiting.append((submission, mailbox))
        if len(self._waiting) == self._streams:
            arguments = (self._waiting, asyncio.get_running_loop())
            self._waiting = []
            threading.Thread(target=self._bring, args=arguments, daemon=True).start()

    def _bring(self, waiting: Sequence[tuple[Submission, Mailbox]], loop: asyncio.AbstractEventLoop) -> None:
        mailboxes = Mailboxes()
        for submission, mailbox in waiting:
            mailboxes.add(submission.id, mailbox)
        numbers = [submission.id for submission, _ in waiting]
        tokens = waiting[0][0].part.request.sampling.max_tokens or 1
        delta = Delta(" word", (0,))
        more = _sent([Event(number, delta) for number in numbers])
        for _ in range(tokens - 1):
            mailboxes.deliver(pickle.loads(more).events)
            taken = threading.Event()
            loop.call_soon_threadsafe(taken.set)  # After what the mailboxes have put there.
            taken.wait()
        last = replace(delta, finish_reason=FinishReason.LENGTH)
        mailboxes.deliver([Event(number, last) for number in numbers])
        mailboxes.deliver([Event(number) for number in numbers])


def _sent(events: Sequence[Event]) -> bytes:
    return pickle.dumps(Report(events, Stats()))


def write(out: Path, device: str, commit: str | None, figures: Mapping[str, Any]) -> None:
    """Write the document; only now may torch come into this process, which has served without it."""
    import torch

    from benchmarks.document import write_document

    on_gpu = device != "cpu" and torch.cuda.is_available()
    note = {} if on_gpu else {"note": SHARED_CORES}
    write_document(out, torch.device("cuda" if on_gpu else "cpu"), commit, {**figures, **note})


if __name__ == "__main__":
    sys.exit(main())
