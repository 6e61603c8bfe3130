"""Do one step on the device: encode slices, compute the rows in one packed forward pass, choose the next ids.

What a step does the scheduler has decided; doing the same step again changes nothing, so a failed one may be repeated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memphi.cache.pool import PagePool
from memphi.engine.encoders import Encoders
from memphi.engine.gauge import Gauge
from memphi.engine.prices import price_rows, price_slices
from memphi.engine.step import PlannedRow, StepPlan, StepResult
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.sampling.sampler import Draw, sample


class Runner:
    """The model and the pool that its rows' pages lie in; without a pool every row is whole."""

    def __init__(self, model: Phi4MM, pool: PagePool | None, forbidden: Tensor, gauge: Gauge) -> None:
        self.model = model
        self.pool = pool
        self.forbidden = forbidden  # [vocab_size] bool: ids without a token
        self.gauge = gauge
        self._encoders = Encoders(model)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a step; raises whatever the device raises."""
        self._encode(plan)
        if not plan.rows:
            return StepResult({})
        self._map_pages(plan)
        config, masked = self.model.config, self.model.device.type != "cuda"
        with self.gauge.watching(*price_rows(plan, config, self.model.dtype.itemsize, masked)):
            return self._compute(plan)

    def _encode(self, plan: StepPlan) -> None:
        for kind in ("image", "audio"):
            slices = [piece for piece in plan.slices if piece.kind == kind]
            if slices:
                with self.gauge.watching(*price_slices(slices, self.model.config, self.model.dtype.itemsize)):
                    self._encoders.run(slices)

    def _map_pages(self, plan: StepPlan) -> None:
        """Put memory behind the pages that the rows write to."""
        if self.pool is None:
            return
        pages = {page for row in plan.rows for page in _new_pages(row, self.pool.page_tokens)}
        held_bytes = self.pool.mapped_bytes
        self.gauge.make_room(len(pages))
        self.pool.ensure(pages)
        if self.pool.mapped_bytes != held_bytes:
            self.gauge.cap()

    def _compute(self, plan: StepPlan) -> StepResult:
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        logits = self._logits(plan, sampling)
        sequences = [plan.rows[i].sequence for i in sampling]
        if not sequences:
            return StepResult({})
        chosen = sample(logits, [Draw(s.sampling, s.ids) for s in sequences], self.forbidden)
        return StepResult({sequence.id: token for sequence, token in zip(sequences, chosen, strict=True)})

    def _logits(self, plan: StepPlan, sampling: Sequence[int]) -> Tensor:
        """Scores of the rows that choose an id: [len(sampling), vocab_size]."""
        ids = [i for row in plan.rows for i in row.sequence.ids[row.past : row.past + row.tokens]]
        ends = _ends(plan)
        logits: Tensor = self.model(
            torch.tensor(ids, device=self.model.device),
            [Row(row.tokens, row.past, row.sequence.adapter, row.sequence.long, row.pages) for row in plan.rows],
            _media(plan, ends),
            self.pool,
            [ends[i] - 1 for i in sampling],
        )
        return logits


def _new_pages(row: PlannedRow, page_tokens: int) -> tuple[int, ...]:
    """The pages that a row writes to; those before them have been written to already."""
    return row.pages[row.past // page_tokens :]


def _media(plan: StepPlan, ends: Sequence[int]) -> list[tuple[int, Tensor]]:
    """The pieces of media embeddings that fall into a step, by packed token."""
    pieces = []
    for row, end in zip(plan.rows, ends, strict=True):
        shift = end - row.tokens - row.past
        prompt = row.sequence.prompt
        assert prompt is not None
        for span, entry in zip(prompt.spans, row.sequence.entries, strict=True):
            first, last = max(span.start, row.past), min(span.start + span.tokens, row.past + row.tokens)
            if first < last:
                assert entry.value is not None
                pieces.append((first + shift, entry.value[first - span.start : last - span.start]))
    return pieces


def _ends(plan: StepPlan) -> Sequence[int]:
    """The packed token after each row's last."""
    ends, end = [], 0
    for row in plan.rows:
        end += row.tokens
        ends.append(end)
    return ends
