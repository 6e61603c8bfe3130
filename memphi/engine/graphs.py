"""CUDA graphs of decode steps: captured when they are first needed, and replayed for any rows of their number.

Launching a step's kernels one by one takes the host longer than the device needs for them; a graph is launched at once.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from typing import Any, get_args

import torch
from torch import Tensor

from memphi.cache.pool import PagePool
from memphi.config import AdapterName
from memphi.model.decode import Buffers, Chosen, DecodeStep
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and loaded, and libraries take their work space, outside of it."""

Adapters = frozenset[str]


@dataclass(frozen=True)
class Decoded:
    """What a step computes, on the device; the next one replaces it."""

    logits: Tensor
    """[rows, vocab_size]"""
    chosen: Tensor
    """The likeliest id of each row, [rows]."""


@dataclass
class _Held:
    """All that goes when graphs are dropped."""

    buffers: Buffers
    steps: dict[tuple[int, Adapters], tuple[DecodeStep, torch.cuda.CUDAGraph | None]] = field(default_factory=dict)
    memory: Any = None
    """The pool that all graphs take their memory from."""


class Graphs:
    """The decode steps of one engine; one set of buffers and one pool of memory serve all."""

    def __init__(
        self,
        model: Phi4MM,
        pool: PagePool,
        most_rows: int,
        most_tokens: int,
        capture: bool = True,
        forbidden: Tensor | None = None,
    ) -> None:
        """most_tokens is the longest sequence's; without capture every step is launched kernel by kernel.

        forbidden [vocab_size] bool: ids that are never chosen; None: all may be.
        """
        self.allowed = True
        """Whether steps go here; not while memory is short."""
        self._model, self._pool, self._forbidden = model, pool, forbidden
        self._most_rows = most_rows
        self._most_pages = -(-most_tokens // pool.page_tokens)
        # One for all captures: libraries keep a work space for each stream that they were used on.
        self._stream = torch.cuda.Stream(model.device) if capture else None
        self._held: _Held | None = None
        self._ever = set[tuple[int, Adapters]]()
        """Those whose kernels are compiled and loaded."""

    @property
    def are_held(self) -> bool:
        """Whether there is something to drop."""
        return self._held is not None

    def can_decode(self, adapters: Collection[str | None], rows: int) -> bool:
        """Whether so many rows under these adapters, each of one new token, can be decoded here now."""
        live = self._model.adapter_form == "plain" and any(adapters)
        return self.allowed and rows <= self._most_rows and not live

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], ids: Sequence[int | Chosen]) -> Decoded:
        """Compute one token of each row; an id may be one that the call before chooses, which nobody waits for.

        Raises whatever the device raises, of a capture too.
        """
        assert self._held is not None or not any(isinstance(number, Chosen) for number in ids), "nothing was chosen"
        step, graph = self._step(_rounded_up(len(rows), self._most_rows), self._adapters(rows))
        step.fill(rows, ids)
        if graph is None:
            step.run()
        else:
            graph.replay()
        return Decoded(step.logits[: len(rows)], step.chosen[: len(rows)])

    @torch.inference_mode()
    def rehearse(self) -> bool:
        """Have the kernels of a graph that no step has needed yet compiled and loaded; whether there was one.

        It is not captured: that is quickly done when it is needed, and CUDA takes memory for every graph. Raises
        whatever the device raises.
        """
        key = next((key for key in self._all_keys() if key not in self._ever), None)
        if key is None or self._stream is None or not self.allowed:
            return False
        self._ever.add(key)  # Also where it fails: it will be tried when a step needs it.
        with self._warmed_up(self._make_step(*key)):
            return True

    def drop(self) -> bool:
        """Forget all graphs and give their memory back; whether there were any."""
        if self._held is None:
            return False
        graphs = [graph for _, graph in self._held.steps.values() if graph is not None]
        if graphs:
            torch.cuda.synchronize(self._model.device)
        for graph in graphs:
            graph.reset()
        self._held = None
        if self._stream is not None:
            torch.cuda.empty_cache()
        return True

    def _step(self, count: int, adapters: Adapters) -> tuple[DecodeStep, torch.cuda.CUDAGraph | None]:
        held = self._hold()
        key = count, adapters
        if key not in held.steps:
            step = self._make_step(count, adapters)
            held.steps[key] = step, None if self._stream is None else self._captured(held, step)
            self._ever.add(key)
        return held.steps[key]

    def _make_step(self, count: int, adapters: Adapters) -> DecodeStep:
        buffers = self._hold().buffers
        return DecodeStep(self._model.language, self._pool, buffers, count, adapters, self._forbidden)

    def _all_keys(self) -> Iterator[tuple[int, Adapters]]:
        """Every graph that a step can need, those of few rows first."""
        counts = sorted({_rounded_up(1 << power, self._most_rows) for power in range(self._most_rows.bit_length() + 1)})
        names = get_args(AdapterName) if self._model.adapter_form == "packed" else ()
        used = chain.from_iterable(combinations(names, number) for number in range(len(names) + 1))
        return product(counts, map(frozenset, used))

    def _hold(self) -> _Held:
        if self._held is None:
            buffers = Buffers(self._model.language, self._most_rows, self._most_pages, self._pool.page_tokens)
            self._held = _Held(buffers)
            self._held.memory = None if self._stream is None else torch.cuda.graph_pool_handle()
        return self._held

    def _captured(self, held: _Held, step: DecodeStep) -> torch.cuda.CUDAGraph:
        """A graph of a step."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: only what this one does must fit into a graph.
        with (
            self._warmed_up(step) as stream,
            torch.cuda.graph(graph, held.memory, stream, capture_error_mode="thread_local"),
        ):
            step.run()
        return graph

    @contextmanager
    def _warmed_up(self, step: DecodeStep) -> Iterator[torch.cuda.Stream]:
        """On the stream for captures, after runs of a step with rows that read, write and choose nothing."""
        assert self._stream is not None
        stream, current = self._stream, torch.cuda.current_stream(self._model.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # Left in any case: a capture that fails does not see to that.
            step.fill([], [])
            for _ in range(WARM_UPS):
                step.run()
            yield stream
        current.wait_stream(stream)

    def _adapters(self, rows: Sequence[Row]) -> Adapters:
        """Those in use; the merged one is part of the weights."""
        return frozenset() if self._model.merged else frozenset(row.adapter for row in rows if row.adapter)


def _rounded_up(count: int, most: int) -> int:
    """The row count of the graph that serves so many rows: a power of two, or the most."""
    return min(1 << (count - 1).bit_length(), most)
