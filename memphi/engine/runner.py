"""Do one step on the device; owns what the device holds for each sequence: its cache and its media embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memphi.cache.contiguous import ContiguousCache
from memphi.engine.sequence import Sequence as Running
from memphi.engine.step import PlannedRow, StepPlan
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.sampling.sampler import Draw, sample


class Runner:
    """The model and the device state of running sequences, by sequence id."""

    def __init__(self, model: Phi4MM, forbidden: Tensor) -> None:
        self.model = model
        self.forbidden = forbidden  # [vocab_size] bool: ids without a token
        self.caches: dict[int, ContiguousCache] = {}
        self.media: dict[int, list[tuple[int, Tensor]]] = {}

    def start(self, sequence: Running) -> None:
        """Encode a sequence's media and give it an empty cache."""
        self.media[sequence.id] = self.model.encode_media(sequence.prompt)
        self.start_over(sequence)

    def start_over(self, sequence: Running) -> None:
        """Drop a sequence's keys and values; its media embeddings stay."""
        self.caches[sequence.id] = ContiguousCache(self.model.config.language, self.model.dtype, self.model.device)

    def drop(self, sequence: Running) -> None:
        """Free everything that a sequence holds."""
        self.caches.pop(sequence.id, None)
        self.media.pop(sequence.id, None)

    def run(self, plan: StepPlan) -> dict[int, int]:
        """Compute a step's rows in one forward pass; returns the sampled id of each row that reached its end."""
        ids = [i for row in plan.rows for i in row.sequence.ids[row.past : row.past + row.tokens]]
        ends = _ends(plan)
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        logits = self.model(
            torch.tensor(ids, device=self.model.device),
            [_row(row) for row in plan.rows],
            self._media(plan),
            [self.caches[row.sequence.id] for row in plan.rows],
            [ends[i] - 1 for i in sampling],
        )
        sequences = [plan.rows[i].sequence for i in sampling]
        if not sequences:
            return {}
        chosen = sample(logits, [Draw(s.sampling, s.ids) for s in sequences], self.forbidden)
        return {sequence.id: token for sequence, token in zip(sequences, chosen, strict=True)}

    def _media(self, plan: StepPlan) -> list[tuple[int, Tensor]]:
        """The pieces of media embeddings that fall into a step, by packed token."""
        pieces = []
        for row, end in zip(plan.rows, _ends(plan), strict=True):
            shift = end - row.tokens - row.past
            for start, embeddings in self.media[row.sequence.id]:
                first = max(start, row.past)
                last = min(start + embeddings.shape[0], row.past + row.tokens)
                if first < last:
                    pieces.append((first + shift, embeddings[first - start : last - start]))
        return pieces


def _ends(plan: StepPlan) -> Sequence[int]:
    """The packed token after each row's last."""
    ends, end = [], 0
    for row in plan.rows:
        end += row.tokens
        ends.append(end)
    return ends


def _row(row: PlannedRow) -> Row:
    return Row(row.tokens, row.past, row.sequence.prompt.mode.adapter, row.sequence.long)
