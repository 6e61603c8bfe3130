"""Captures of steps as CUDA graphs, which share a stream and the memory of what they compute."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Step(Protocol):
    """What a graph can hold: it computes what was filled in before, over tensors that stay where they are."""

    def clear(self) -> None:
        """Have the next run read and write nothing."""

    def run(self) -> object:
        """Launch it kernel by kernel."""


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
            step.run()

    def take(self, step: Step) -> torch.cuda.CUDAGraph | None:
        """A graph of a step; None without a GPU. Raises whatever the device raises."""
        if self._stream is None:
            return None
        self.warm_up(step)
        # What a run took on this stream would lie there beside what the graph takes.
        torch.cuda.empty_cache()
        memory, self._memory = self._memory or torch.cuda.graph_pool_handle(), None
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: only what this one does must fit into a graph.
        with (
            self._on_stream() as stream,
            torch.cuda.graph(graph, memory, stream, capture_error_mode="thread_local"),
        ):
            step.run()
        self._memory = memory  # Not where it failed: that pool is left to the graphs that have it.
        return graph

    def drop(self, graphs: Iterable[torch.cuda.CUDAGraph | None]) -> None:
        """Give the memory of all graphs back."""
        taken = [graph for graph in graphs if graph is not None]
        if taken:
            torch.cuda.synchronize(self._device)
        for graph in taken:
            graph.reset()
        self._memory = None

    @contextmanager
    def _on_stream(self) -> Iterator[torch.cuda.Stream]:
        """On the stream for captures, after all that was launched before, and before all that will be."""
        assert self._stream is not None
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # Left in any case: a capture that fails does not see to that.
            yield stream
        current.wait_stream(stream)
