"""Steps of prompts in CUDA graphs, replayed for any rows of up to so many tokens.

A graph is captured when a step needs it for the second time: most are needed once, and to capture one takes the host
as long as to launch it twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memphi.cache.pool import PagePool
from memphi.engine.capture import Capture, Graph
from memphi.memory import costs
from memphi.model.phi4mm import Phi4MM
from memphi.model.prefill_steps import PieceStep, PrefillInputs, PrefillStep
from memphi.model.rows import Row

Key = tuple[int, frozenset[str], bool]
"""Tokens; adapters in use; whether all tokens use the one there is."""


@dataclass
class _Held:
    """All that goes when graphs are dropped."""

    inputs: PrefillInputs
    steps: dict[Key, tuple[PrefillStep, Graph | None]] = field(default_factory=dict)


class Prefills:
    """The steps of prompts of one engine; one set of inputs serves all."""

    def __init__(self, model: Phi4MM, pool: PagePool, most_tokens: int, capture: Capture) -> None:
        """most_tokens are a step's; 0: none is for a graph."""
        self._model, self._pool, self._most_tokens, self._capture = model, pool, most_tokens, capture
        self._held: _Held | None = None
        self._needed = dict[Key, None]()
        """Those that a step needed, in order."""

    @property
    def are_held(self) -> bool:
        """Whether there is something to drop."""
        return self._held is not None

    def can_compute(self, rows: Sequence[Row]) -> bool:
        """Whether these rows, of any number of new tokens, are for a graph: of steps of their kind not the first."""
        key = self._key(rows)
        return key is not None and key in self._needed and self._has_room(key)

    def is_ready(self, rows: Sequence[Row]) -> bool:
        """Whether the graph of such rows is there."""
        return self._held is not None and self._key(rows) in self._held.steps

    def miss(self, rows: Sequence[Row]) -> bool:
        """Note that such rows were computed elsewhere; whether they are for a graph another time."""
        key = self._key(rows)
        if key is None:
            return False
        self._needed[key] = None
        return True

    @torch.inference_mode()
    def ready(self, rows: Sequence[Row]) -> None:
        """Capture what `compute` needs for such rows, if it is not there. Raises whatever the device raises."""
        key = self._key(rows)
        assert key is not None, "others compute such rows"
        self._step(key)

    @torch.inference_mode()
    def compute(self, rows: Sequence[Row], embeddings: Tensor) -> Tensor:
        """The normed hidden states [tokens, hidden] of rows whose new tokens have these embeddings [tokens, hidden].

        The next call replaces them. Raises whatever the device raises, of a capture too.
        """
        key = self._key(rows)
        assert key is not None, "others compute such rows"
        step, graph = self._step(key)
        step.fill(rows, embeddings)
        if graph is None:
            step.run()
        else:
            graph.replay()
        return step.states[: len(embeddings)]

    @torch.inference_mode()
    def rehearse(self) -> bool:
        """Capture a graph that a step needed once, before the next one does; whether there was one."""
        steps = self._held.steps if self._held else {}
        key = next((key for key in self._needed if key not in steps and self._has_room(key)), None)
        if key is None:
            return False
        del self._needed[key]  # Also where it fails: then a step has to need it again.
        self._step(key)
        self._needed[key] = None
        return True

    def drop(self) -> list[Graph | None]:
        """Forget all graphs, and what was needed, or an idle engine would capture them again; returns them."""
        held, self._held = self._held, None
        self._needed.clear()
        return [graph for _, graph in held.steps.values()] if held else []

    def _key(self, rows: Sequence[Row]) -> Key | None:
        tokens = costs.prefill_size([(row.tokens, row.past) for row in rows], self._most_tokens)
        if not tokens:
            return None
        # The merged one is part of the weights.
        used = [None if self._model.merged else row.adapter for row in rows]
        adapters = frozenset(name for name in used if name)
        return tokens, adapters, len(adapters) == 1 and None not in used

    def _has_room(self, key: Key) -> bool:
        steps = self._held.steps if self._held else {}
        alike = sum(costs.is_in_pieces(tokens) == costs.is_in_pieces(key[0]) for tokens, *_ in steps)
        return key in steps or alike < costs.most_held(key[0], self._most_tokens)

    def _step(self, key: Key) -> tuple[PrefillStep, Graph | None]:
        if self._held is None:
            language = self._model.language
            self._held = _Held(PrefillInputs(language, self._most_tokens, self._pool.page_tokens))
        held = self._held
        if key not in held.steps:
            held.steps[key] = self._make_step(held.inputs, key)
        return held.steps[key]

    def _make_step(self, inputs: PrefillInputs, key: Key) -> tuple[PrefillStep, Graph | None]:
        if costs.is_in_pieces(key[0]):
            pieces = PieceStep(self._model.language, self._pool, inputs, *key)
            return pieces, self._capture.take_pieces(pieces)
        step = PrefillStep(self._model.language, self._pool, inputs, *key)
        return step, self._capture.take(step)
