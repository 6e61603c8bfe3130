"""Captures of steps as CUDA graphs, which share a stream and the memory of what they compute."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from memphi.model.kernels.launch import compile_ahead


class Step(Protocol):
    """What a graph can hold: it computes what was filled in before, over tensors that stay where they are."""

    def clear(self) -> None:
        """Have the next run read and write nothing."""

    def run(self) -> object:
        """Launch it kernel by kernel."""


class StepInPieces(Step, Protocol):
    """A step of which a graph can hold pieces."""

    def pieces(self) -> Iterator[Any]:
        """Launch a piece whenever it is asked for what is to be done after it, and the last one at the end."""

    def mix(self, mixing: Any, /) -> None:  # noqa: ANN401
        """Do what a piece gave, kernel by kernel."""


class Graph(Protocol):
    """A step that was captured."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


@dataclass
class GraphOfPieces:
    """A graph for each piece of a step, and what is done between one and the next."""

    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    between: list[Callable[[], None]] = field(default_factory=list)

    def replay(self) -> None:
        for graph, follow in zip(self.graphs, self.between, strict=True):
            graph.replay()
            follow()

    def reset(self) -> None:
        for graph in self.graphs:
            graph.reset()


class Capture:
    """Where steps are captured; without a GPU there are no graphs, and steps are launched kernel by kernel."""

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self._device = device
        # One for all captures: libraries keep a work space for each stream that they were used on.
        self._stream = torch.cuda.Stream(device) if wanted else None
        self._memory: Any = None
        """The pool that all graphs take their memory from."""

    @property
    def is_wanted(self) -> bool:
        return self._stream is not None

    def warm_up(self, step: Step) -> None:
        """Run a step that does nothing: kernels are compiled and loaded, and libraries take their work space."""
        with self._on_stream():
            step.clear()
            compile_ahead(step.run, self._device)
            step.run()

    def take(self, step: Step) -> Graph | None:
        """A graph of a step; None without a GPU. Raises whatever the device raises."""
        if self._stream is None:
            return None
        self._prepare(step)
        graph = torch.cuda.CUDAGraph()
        with self._in_memory() as memory, _captured(graph, memory):
            step.run()
        return graph

    def take_pieces(self, step: StepInPieces) -> Graph | None:
        """Graphs of a step in pieces, which share what they compute; as `take`."""
        if self._stream is None:
            return None
        self._prepare(step)
        taken, pieces, going = GraphOfPieces(), step.pieces(), True
        with self._in_memory() as memory:
            while going:
                taken.graphs.append(torch.cuda.CUDAGraph())
                with _captured(taken.graphs[-1], memory):
                    mixing = next(pieces, None)
                going = mixing is not None
                taken.between.append(partial(step.mix, mixing) if going else _nothing)
        return taken

    def drop(self, graphs: Iterable[Graph | None]) -> None:
        """Give the memory of all graphs back."""
        taken = [graph for graph in graphs if graph is not None]
        if taken:
            torch.cuda.synchronize(self._device)
        for graph in taken:
            graph.reset()
        self._memory = None

    def _prepare(self, step: Step) -> None:
        """Warm up, and give back what that took on this stream: it would lie there beside what a graph takes."""
        self.warm_up(step)
        torch.cuda.empty_cache()

    @contextmanager
    def _in_memory(self) -> Iterator[Any]:
        """On the stream for captures, with the pool that all graphs take their memory from."""
        memory, self._memory = self._memory or torch.cuda.graph_pool_handle(), None
        with self._on_stream():
            yield memory
        self._memory = memory  # Not where it failed: that pool is left to the graphs that have it.

    @contextmanager
    def _on_stream(self) -> Iterator[torch.cuda.Stream]:
        """On the stream for captures, after all that was launched before, and before all that will be."""
        assert self._stream is not None
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # Left in any case: a capture that fails does not see to that.
            yield stream
        current.wait_stream(stream)


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, memory: Any) -> Iterator[None]:  # noqa: ANN401
    """What is launched in here goes into a graph.

    Other threads may go on using the device: only what this one does must fit into it.
    """
    graph.capture_begin(memory, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()


def _nothing() -> None:
    """After the last piece."""
