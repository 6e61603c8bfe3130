"""Graphs without graphs: decode steps by the model's own definition, so that a loop can be tried without kernels."""

from collections.abc import Callable

import pytest
import torch

from memphi.engine.graphs import Decoded, Graphs
from memphi.model.decode import Chosen
from memphi.model.kernels.choice import plain_choose


class PlainGraphs(Graphs):
    """Launches nothing and waits for nothing: each step is done when its call returns; ids go from step to step."""

    def __init__(self, model, pool, most_rows, forbidden):
        super().__init__(model, pool, most_rows, 10**4, capture=False, forbidden=forbidden)
        self.decoded: list[int] = []
        """How many rows each step had."""
        self.behind = 0
        """How many of them went on from what the one before chose."""
        self._chosen: torch.Tensor | None = None

    def can_decode(self, adapters, rows):
        return self.allowed and rows <= self._most_rows

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

    def drop(self):
        dropped, self._chosen = self._chosen is not None, None
        return dropped


def use_plain_graphs(patch: pytest.MonkeyPatch, wanted: Callable[..., bool] = lambda config: config.kernels == "auto"):
    """Give these graphs to all engines with pages whose config wants kernels."""

    def make(model, pool, plan, config, forbidden):
        return PlainGraphs(model, pool, plan.rows, forbidden) if pool is not None and wanted(config) else None

    patch.setattr("memphi.engine.engine.make_graphs", make)
