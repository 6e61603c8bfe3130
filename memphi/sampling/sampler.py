"""Choose the next token of each row: penalties, temperature, filters, draw.

Every draw is keyed by the request's seed and the token's position, so that nothing else in the batch changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.request import SamplingParams


@dataclass(frozen=True)
class Draw:
    """What one row's choice depends on besides its logits."""

    sampling: SamplingParams
    ids: Sequence[int]
    """The prompt and the answer so far; their number is the position of the token to choose."""


def sample(logits: Tensor, draws: Sequence[Draw], forbidden: Tensor) -> list[int]:
    """Choose one id per row.

    logits [rows, vocab_size]; forbidden [vocab_size] is True for ids that stand for no token. Filters apply in the
    order repetition penalty, temperature, top-k, top-p, min-p, in fp32.
    """
    scores = logits.float().masked_fill(forbidden, float("-inf"))
    chosen = [_choose(row, draw) for row, draw in zip(scores, draws, strict=True)]
    return [int(i) for i in torch.stack(chosen).tolist()]


def _choose(scores: Tensor, draw: Draw) -> Tensor:
    sampling = draw.sampling
    if sampling.repetition_penalty != 1.0:
        scores = _penalised(scores, draw.ids, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return scores.argmax()
    ordered, ids = torch.sort(scores / sampling.temperature, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered = ordered[: sampling.top_k]
    probabilities = ordered.softmax(-1)
    if sampling.top_p < 1.0:
        # A token stays while those before it do not reach top_p; the first always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    probabilities = torch.where(probabilities >= sampling.min_p * probabilities[0], probabilities, 0.0)
    total = probabilities.double().cumsum(-1)
    threshold = uniform(sampling.seed, len(draw.ids)) * total[-1]
    place = torch.searchsorted(total, threshold, right=True).clamp(max=int((probabilities > 0).sum()) - 1)
    return ids[place].clone()  # a view would keep all the sorted ids until the last row is drawn


def _penalised(scores: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative scores of ids that occurred (Keskar et al. 2019, CTRL)."""
    seen = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=scores.device)
    values = scores[seen]
    return scores.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone (two rounds of SplitMix64, Steele et al. 2014)."""
    return (_mix(_mix(seed) ^ position) >> 11) / 2**53


def _mix(value: int) -> int:
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
