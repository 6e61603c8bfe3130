"""Decode attachments just in time, a bounded number at once, while the device goes on."""

import math
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from memphi.config import ModelConfig, Place
from memphi.engine.sequence import Sequence, State
from memphi.inputs.media import MediaLimits
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Prompt
from memphi.sampling.grammar import Grammars

THREADS = 2
"""Attachments decoded at once; decoding lets go of Python's lock."""
THREAD_NAME = "memphi-prepare"
MEASURED = MediaLimits(bytes=sys.maxsize, pixels=sys.maxsize, seconds=math.inf)
"""Of a request that was accepted: within which limits, whoever accepted it knows."""


def prepare_sequence(
    sequence: Sequence, config: ModelConfig, tokenizer: Tokenizer, grammars: Grammars, preprocessing: Place
) -> Prompt:
    """Compile a sequence's grammar, unless it has been, and decode its attachments; raises what these raise."""
    if sequence.sampling.grammar is not None and sequence.matcher is None:
        sequence.matcher = grammars.matcher(sequence.sampling.grammar)
    return prepare(sequence.request, config, tokenizer, MEASURED, preprocessing=preprocessing, ids=sequence.text_ids)


class Preparation:
    """Threads that turn requests into prompts, within the host's memory for decoded attachments."""

    def __init__(
        self,
        prepare: Callable[[Sequence], Prompt],
        price: Callable[[Sequence], int],
        host_bytes: int,
        on_ready: Callable[[], None],
    ) -> None:
        """price gives a sequence's bytes on the host; on_ready is called from a thread whenever a prompt is ready."""
        self._prepare = prepare
        self._price = price
        self._host_bytes = host_bytes
        self._on_ready = on_ready
        self._waiting: deque[Sequence] = deque()
        self._begun: list[tuple[Sequence, Future[Prompt]]] = []
        self._kept: list[Sequence] = []
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=THREAD_NAME)

    def add(self, sequence: Sequence) -> None:
        """Prepare a sequence that was let in, perhaps once more after a pause; what is under way is not begun again."""
        self._kept = [kept for kept in self._kept if kept is not sequence]
        if sequence not in self._waiting and all(begun is not sequence for begun, _ in self._begun):
            self._waiting.append(sequence)

    def advance(self) -> list[tuple[Sequence, Future[Prompt]]]:
        """Begin what the host has room for; returns what has become ready since, and what is ready at once."""
        asked = [(pair, pair[1].done()) for pair in self._begun]  # Once: it may become ready at any moment.
        ready = [pair for pair, is_done in asked if is_done]
        self._begun = [pair for pair, is_done in asked if not is_done]
        self._kept += [sequence for sequence, _ in ready]
        self._kept = [s for s in self._kept if s.state in (State.PREPARING, State.ENCODING)]
        while self._waiting and self._has_room(self._waiting[0]):
            sequence = self._waiting.popleft()
            if _is_quick(sequence):
                ready.append((sequence, self._prepare_now(sequence)))
            else:
                self._begin(sequence)
        return ready

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a sequence's attachments fit beside the others'; one alone always may try."""
        held = [*self._kept, *(begun for begun, _ in self._begun)]
        return not held or sum(map(self._price, held)) + self._price(sequence) <= self._host_bytes

    def _prepare_now(self, sequence: Sequence) -> Future[Prompt]:
        prepared: Future[Prompt] = Future()
        try:
            prepared.set_result(self._prepare(sequence))
        except Exception as error:
            prepared.set_exception(error)
        return prepared

    def _begin(self, sequence: Sequence) -> None:
        if sequence.state is not State.PREPARING:
            return
        future = self._threads.submit(self._prepare, sequence)
        self._begun.append((sequence, future))
        future.add_done_callback(lambda _: self._on_ready())


def _is_quick(sequence: Sequence) -> bool:
    """Whether there is nothing to decode, to compile or to encode: a burst of such begins in one step."""
    return bool(sequence.text_ids) and not sequence.request.media and sequence.sampling.grammar is None
