"""Graphs without graphs: decode steps by the model's own definition, so that a loop can be tried without kernels."""

from collections.abc import Callable

import pytest
import torch

from memphi.engine.graphs import Decoded, Graphs
from memphi.engine.prefills import Prefills
from memphi.model.decode import Chosen
from memphi.model.kernels.choice import plain_choose
from memphi.model.rows import pack


class PlainPrefills(Prefills):
    """Steps of prompts likewise."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.computed: list[list[int]] = []
        """The new tokens of each step's rows."""

    def ready(self, rows):
        assert self.can_compute(rows)

    def is_ready(self, rows):
        return self.can_compute(rows)

    @torch.inference_mode()
    def compute(self, rows, embeddings):
        assert self.can_compute(rows)
        self.computed.append([row.tokens for row in rows])
        packing = pack(self._model._as_kept(rows), self._model.device, self._pool.page_tokens)
        return self._model.language(embeddings, packing, self._pool)


class PlainGraphs(Graphs):
    """Launches nothing and waits for nothing: each step is done when its call returns; ids go from step to step."""

    def __init__(self, model, pool, most_rows, forbidden, prefill_tokens=0):
        super().__init__(model, pool, most_rows, 10**4, capture=False, forbidden=forbidden)
        self.prefills = PlainPrefills(model, pool, prefill_tokens, self._capture)
        self.decoded: list[int] = []
        """How many rows each step had."""
        self.behind = 0
        """How many of them went on from what the one before chose."""
        self._chosen: torch.Tensor | None = None

    @property
    def has_chosen(self):
        return self._chosen is not None

    def is_ready(self, rows):
        return self.has_chosen

    def _takes(self, adapters):
        return self.allowed

    def ready(self, rows):
        """Nothing is captured."""

    @torch.inference_mode()
    def decode(self, rows, ids):
        known = [int(self._chosen[number.row]) if isinstance(number, Chosen) else number for number in ids]
        logits = self._model(torch.tensor(known), rows, cache=self._pool)
        chosen = torch.zeros(len(rows), dtype=torch.int64)
        plain_choose(logits, self._forbidden, torch.ones(len(rows)), chosen)
        self._chosen = chosen
        self.decoded.append(len(rows))
        self.behind += any(isinstance(number, Chosen) for number in ids)
        return Decoded(logits, chosen)

    def chosen(self, places):
        self.behind += 1
        return self._chosen[places]

    def note_chosen(self, ids, behind):
        before = torch.zeros(0, dtype=torch.int64) if self._chosen is None else self._chosen[:behind]
        self._chosen = torch.cat((before, ids))
        return self._chosen

    def drop(self):
        dropped, self._chosen = self._chosen is not None, None
        self.prefills.drop()
        return dropped


def use_plain_graphs(
    patch: pytest.MonkeyPatch,
    wanted: Callable[..., bool] = lambda config: config.kernels == "auto",
    prefill_tokens: int = 0,
):
    """Give these graphs to all engines with pages whose config wants kernels."""

    def make(model, pool, plan, config, forbidden):
        if pool is None or not wanted(config):
            return None
        return PlainGraphs(model, pool, plan.rows, forbidden, prefill_tokens)

    patch.setattr("memphi.engine.engine.make_graphs", make)
