"""CUDA graphs of decode steps: captured when they are first needed, and replayed for any rows of their number. Those of
prompts stand in `prefills`.

Launching a step's kernels one by one takes the host longer than the device needs for them; a graph is launched at once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, product
from typing import get_args

import torch
from torch import Tensor

from memphi.cache.pool import PagePool
from memphi.config import AdapterName
from memphi.engine.capture import Capture, Graph
from memphi.engine.prefills import Prefills
from memphi.model.decode import Buffers, Chosen, DecodeStep
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row

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
    steps: dict[tuple[int, Adapters], tuple[DecodeStep, Graph | None]] = field(default_factory=dict)


class Graphs:
    """The decode steps of one engine, of which one set of buffers serves all, and its steps of prompts."""

    def __init__(
        self,
        model: Phi4MM,
        pool: PagePool,
        most_rows: int,
        most_tokens: int,
        capture: bool = True,
        forbidden: Tensor | None = None,
        prefill_tokens: int = 0,
    ) -> None:
        """most_tokens is the longest sequence's; without capture every step is launched kernel by kernel.

        forbidden [vocab_size] bool: ids that are never chosen; None: all may be. prefill_tokens: of a step of prompts
        that is for a graph, at most.
        """
        self.allowed = True
        """Whether steps go here; not while memory is short."""
        self._model, self._pool, self._forbidden = model, pool, forbidden
        self.most_rows = most_rows
        self._most_pages = -(-most_tokens // pool.page_tokens)
        self._capture = Capture(model.device, capture)
        self.prefills = Prefills(model, pool, prefill_tokens, self._capture)
        self._held: _Held | None = None
        self._ever = set[tuple[int, Adapters]]()
        """Those whose kernels are compiled and loaded."""

    @property
    def are_held(self) -> bool:
        """Whether there is something to drop."""
        return self._held is not None or self.prefills.are_held

    @property
    def has_chosen(self) -> bool:
        """Whether what the step before chose is still there: it goes with graphs that are dropped."""
        return self._held is not None

    def can_decode(self, adapters: Collection[str | None], rows: int) -> bool:
        """Whether so many rows under these adapters, each of one new token, can be decoded here now."""
        return self._takes(adapters) and rows <= self.most_rows

    def can_prefill(self, rows: Sequence[Row]) -> bool:
        """Whether rows of any number of new tokens can be computed here now."""
        return self._takes({row.adapter for row in rows}) and self.prefills.can_compute(rows)

    def miss(self, rows: Sequence[Row]) -> bool:
        """Note that such rows were computed elsewhere; whether they could come here another time."""
        return self._takes({row.adapter for row in rows}) and self.prefills.miss(rows)

    def _takes(self, adapters: Collection[str | None]) -> bool:
        """Whether steps under these adapters go here now: those that are not packed do not."""
        return self.allowed and not (self._model.adapter_form == "plain" and any(adapters))

    def is_ready(self, rows: Sequence[Row]) -> bool:
        """Whether what `decode` needs for such rows is there."""
        return self._held is not None and self._key(rows) in self._held.steps

    @torch.inference_mode()
    def ready(self, rows: Sequence[Row]) -> None:
        """Capture what `decode` needs for such rows, if it is not there. Raises whatever the device raises."""
        self._step(*self._key(rows))

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row], ids: Sequence[int | Chosen]) -> Decoded:
        """Compute one token of each row; an id may be one that the call before chooses, which nobody waits for.

        Raises whatever the device raises, of a capture too.
        """
        assert self.has_chosen or not any(isinstance(number, Chosen) for number in ids), "nothing was chosen"
        step, graph = self._step(*self._key(rows))
        step.fill(rows, ids)
        if graph is None:
            step.run()
        else:
            graph.replay()
        return Decoded(step.logits[: len(rows)], step.chosen[: len(rows)])

    @torch.inference_mode()
    def chosen(self, places: Tensor) -> Tensor:
        """What the call before chose in these places [n] int64, which nobody waits for."""
        assert self._held is not None, "nothing was chosen"
        return self._held.buffers.inputs.chosen[places]

    @torch.inference_mode()
    def note_chosen(self, ids: Tensor, behind: int) -> Tensor:
        """Let ids stand behind so many that `decode` chose, where the call after finds them; returns all of them."""
        chosen, count = self._hold().buffers.inputs.chosen, behind + len(ids)
        chosen[behind:count] = ids
        return chosen[:count]

    @torch.inference_mode()
    def rehearse(self) -> bool:
        """Capture a graph of prompts that a step needed once, or have the kernels of another graph, which no step has
        needed yet, compiled and loaded; whether there was one.

        The other is not captured: that is quickly done when it is needed, and CUDA takes memory for every graph. Raises
        whatever the device raises.
        """
        if not (self._capture.is_wanted and self.allowed):
            return False
        if self.prefills.rehearse():
            return True
        key = next((key for key in self._all_keys() if key not in self._ever), None)
        if key is None:
            return False
        self._ever.add(key)  # Also where it fails: it will be tried when a step needs it.
        self._capture.warm_up(self._make_step(*key))
        return True

    def drop(self) -> bool:
        """Forget all graphs and give their memory back; whether there were any."""
        if not self.are_held:
            return False
        graphs = [graph for _, graph in self._held.steps.values()] if self._held else []
        self._capture.drop(graphs + self.prefills.drop())
        self._held = None
        if self._capture.is_wanted:
            torch.cuda.empty_cache()
        return True

    def _step(self, count: int, adapters: Adapters) -> tuple[DecodeStep, Graph | None]:
        held = self._hold()
        key = count, adapters
        if key not in held.steps:
            step = self._make_step(count, adapters)
            held.steps[key] = step, self._capture.take(step)
            self._ever.add(key)
        return held.steps[key]

    def _make_step(self, count: int, adapters: Adapters) -> DecodeStep:
        buffers = self._hold().buffers
        return DecodeStep(self._model.language, self._pool, buffers, count, adapters, self._forbidden)

    def _all_keys(self) -> Iterator[tuple[int, Adapters]]:
        """Every graph that a step can need, those of few rows first."""
        counts = sorted({_rounded_up(1 << power, self.most_rows) for power in range(self.most_rows.bit_length() + 1)})
        names = get_args(AdapterName) if self._model.adapter_form == "packed" else ()
        used = chain.from_iterable(combinations(names, number) for number in range(len(names) + 1))
        return product(counts, map(frozenset, used))

    def _hold(self) -> _Held:
        if self._held is None:
            buffers = Buffers(self._model.language, self._pool, self.most_rows, self._most_pages)
            self._held = _Held(buffers)
        return self._held

    def _key(self, rows: Sequence[Row]) -> tuple[int, Adapters]:
        """The graph's for such rows, by the adapters in use; the merged one is part of the weights."""
        used = () if self._model.merged else (row.adapter for row in rows if row.adapter)
        return _rounded_up(len(rows), self.most_rows), frozenset(used)


def _rounded_up(count: int, most: int) -> int:
    """The row count of the graph that serves so many rows: a power of two, or the most."""
    return min(1 << (count - 1).bit_length(), most)
