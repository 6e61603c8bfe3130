"""The engine: requests in, answers out. Loads a model, runs the loop until every request has its answer."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import overload

import torch

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
from memphi.checkpoint.random import random_model
from memphi.checkpoint.reader import Progress
from memphi.config import DEFAULT_MODEL, EngineConfig
from memphi.engine.device import DtypeName, find_device, find_dtype
from memphi.engine.recovery import ANSWERING_ADVICE, LOADING_ADVICE, told_plainly
from memphi.engine.runner import Runner
from memphi.engine.scheduler import commit, plan_step
from memphi.engine.sequence import Sequence as Running
from memphi.inputs.prompt import measure, prepare
from memphi.inputs.tokenizer import TextStream, Tokenizer
from memphi.model.attention import AttentionName, select_attention
from memphi.model.phi4mm import Phi4MM
from memphi.request import Delta, FinishReason, Footprint, Request, Result
from memphi.sampling.stop import StopStrings


@dataclass(eq=False)
class _Answer:
    """A sequence's text as it grows."""

    sequence: Running
    stream: TextStream
    stops: StopStrings
    started: float
    text: str = ""
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    shown_ids: int = 0

    def advance(self) -> Delta:
        """Turn the newest ids into text; ends the sequence at a stop string."""
        sequence = self.sequence
        new = tuple(sequence.answer[self.shown_ids :])
        self.shown_ids += len(new)
        ended = sequence.finish_reason is not None
        text = self.stops.feed("".join(self.stream.feed(i) for i in new) + (self.stream.flush() if ended else ""))
        if self.stops.stopped:
            sequence.finish_reason = FinishReason.STOP
        elif ended:
            text += self.stops.flush()
        self.text += text
        self.seconds = time.perf_counter() - self.started
        self.first_token_seconds = self.first_token_seconds or self.seconds
        return Delta(text, new, sequence.finish_reason)


class Engine:
    """A loaded model that answers requests of any input modes, several at once."""

    def __init__(self, model: Phi4MM, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        known = torch.from_numpy(tokenizer.known_ids(model.config.language.vocab_size))
        self._runner = Runner(model, ~known.to(model.device))
        self._ids = count()

    def measure(self, request: Request) -> Footprint:
        """What a request costs in tokens, crops and seconds, from headers alone."""
        return measure(request, self.model.config, self.tokenizer)

    @overload
    def generate(self, requests: Request) -> Result: ...
    @overload
    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def generate(self, requests: Request | Sequence[Request]) -> Result | list[Result]:
        """Answer one request, or several of any modes at once; each result equals the same request's alone.

        Raises RequestError or MediaError for bad input, before anything is computed, and DoesNotFitError where the
        context or the device's memory is too small.
        """
        if isinstance(requests, Request):
            return self.generate([requests])[0]
        answers = [self._answer(request) for request in requests]
        self._count_memory_from_here()
        for _ in self._run(answers):
            pass
        peak = self._peak_memory_bytes()
        return [_result(answer, peak) for answer in answers]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; the last piece has the finish reason. Closing the iterator ends it."""
        answer = self._answer(request)
        for _, delta in self._run([answer]):
            if delta.text or delta.finish_reason is not None:
                yield delta

    def _answer(self, request: Request) -> _Answer:
        started = time.perf_counter()
        prompt = prepare(request, self.model.config, self.tokenizer)
        sequence = Running(next(self._ids), prompt, request.sampling, self.model.config.language)
        return _Answer(sequence, TextStream(self.tokenizer), StopStrings(request.sampling.stop), started)

    def _run(self, answers: Sequence[_Answer]) -> Iterator[tuple[_Answer, Delta]]:
        """The loop: admit, plan a step, run it, commit it, until every answer has ended."""
        waiting, running = deque(answers), dict[int, _Answer]()
        try:
            while waiting or running:
                while waiting and len(running) < self.config.rows:
                    answer = waiting.popleft()
                    running[answer.sequence.id] = answer
                    self._start(answer.sequence)
                for answer in self._step(running):
                    delta = answer.advance()
                    if delta.finish_reason is not None:
                        del running[answer.sequence.id]
                        self._runner.drop(answer.sequence)
                    yield answer, delta
        finally:
            for answer in running.values():
                self._runner.drop(answer.sequence)

    @torch.inference_mode()
    def _start(self, sequence: Running) -> None:
        with told_plainly("this request's attachments", self.model.device, ANSWERING_ADVICE):
            self._runner.start(sequence)

    @torch.inference_mode()
    def _step(self, running: Mapping[int, _Answer]) -> list[_Answer]:
        """One step; returns the answers that got a token."""
        plan = plan_step([answer.sequence for answer in running.values()], self.config.step_tokens)
        with told_plainly("this request", self.model.device, ANSWERING_ADVICE):
            sampled = self._runner.run(plan)
        for sequence in commit(plan, sampled, self.model.config.stop_token_ids):
            self._runner.start_over(sequence)
        return [running[i] for i in sampled]

    def _count_memory_from_here(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def _peak_memory_bytes(self) -> int | None:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.model.device)
        try:
            import resource
        except ImportError:  # Windows does not count
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _result(answer: _Answer, peak_memory_bytes: int | None) -> Result:
    sequence = answer.sequence
    assert sequence.finish_reason is not None
    return Result(
        text=answer.text,
        ids=tuple(sequence.answer),
        finish_reason=sequence.finish_reason,
        footprint=sequence.prompt.footprint,
        seconds=answer.seconds,
        first_token_seconds=answer.first_token_seconds,
        peak_memory_bytes=peak_memory_bytes,
    )


def load(
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    dtype: DtypeName = "bf16",
    attention: AttentionName = "auto",
    config: EngineConfig | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a model and return the engine that runs it.

    model is a folder, a hub name, `demo` or `random`; device `auto` is the GPU where there is one, else the CPU;
    progress is called with the bytes of weights done and in total. Raises CheckpointError, DeviceError, or
    DoesNotFitError where the device has too little memory.
    """
    where, number = find_device(device), find_dtype(dtype)
    location = locate(model)
    backend = select_attention(attention)
    with told_plainly("the model", where, LOADING_ADVICE):
        if location.random:
            network = random_model(read_config(location.folder), where, number, attention=backend, progress=progress)
        else:
            network = load_model(location.folder, where, number, backend, progress)
        return Engine(network, Tokenizer.from_folder(location.folder), config)
