"""Choose the next token of each row: grammar, bias, penalties, temperature, filters, draw.

Every draw is keyed by the request's seed and the token's position, so that nothing else in the batch changes it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.request import SamplingParams, TokenLogprob
from memphi.sampling.grammar import Mask

LEAST_TEMPERATURE = 1e-6
"""Divided by less, scores may be infinite in fp32; and by this already none but the likeliest have a chance."""


@dataclass  # Not frozen, though nobody changes it: one is made for every place of every step, three times as fast so.
class Draw:
    """What one row's choice depends on besides its logits."""

    sampling: SamplingParams
    ids: Sequence[int]
    """The prompt and the answer so far; their number is the position of the token to choose."""
    prompt_tokens: int = 0
    allowed: Mask | None = None
    """Ids that the request's grammar allows."""

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest id is what is chosen."""
        sampling = self.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0
        return not (sampling.temperature or any(penalties) or sampling.logit_bias or self.allowed is not None)


@dataclass  # As of a Draw.
class Choice:
    """The id that was chosen for a row, and how likely it was where the request asks for that."""

    id: int
    logprob: TokenLogprob | None = None


def sample(logits: Tensor, draws: Sequence[Draw], forbidden: Tensor) -> list[Choice]:
    """Choose one id per row.

    logits [rows, vocab_size]; forbidden [vocab_size] is True for ids that stand for no token. All plain rows are one
    operation, and all that the host is to know comes in one transfer.
    """
    scores = _scores(logits, forbidden)
    ids = scores.argmax(-1)
    for row, draw in enumerate(draws):
        if not draw.is_plain:
            ids[row] = _choose(scores[row], draw)
    told = [
        _tell(scores[row], ids[row], draw.sampling.top_logprobs)
        for row, draw in enumerate(draws)
        if draw.sampling.top_logprobs is not None
    ]
    # Numbers up to 2**24 are exact in fp32, and no vocabulary is larger.
    numbers: list[float] = torch.cat((ids.float(), *told)).tolist()
    choices, place, vocab_size = [], len(draws), len(forbidden)
    for number, draw in zip(numbers, draws, strict=False):
        size = _told_size(draw.sampling.top_logprobs, vocab_size)
        choices.append(_choice(int(number), numbers[place : place + size]))
        place += size
    return choices


def likeliest(logits: Tensor, forbidden: Tensor) -> Tensor:
    """What plain rows choose, [rows], on the device, which nobody waits for."""
    return _scores(logits, forbidden).argmax(-1)


def _scores(logits: Tensor, forbidden: Tensor) -> Tensor:
    return logits.float().masked_fill(forbidden, float("-inf"))


def _choose(scores: Tensor, draw: Draw) -> Tensor:
    """One row's id; filters apply in the order top-k, top-p, min-p, in fp32."""
    sampling = draw.sampling
    scores = _adjusted(scores, draw)
    if sampling.temperature == 0.0:
        return scores.argmax()
    ordered, ids = torch.sort(scores, descending=True, stable=True)
    ordered = (ordered - ordered[0]) / max(sampling.temperature, LEAST_TEMPERATURE)
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
    place = torch.searchsorted(total, threshold, right=True)
    # Where scores are no numbers none of them is likely; whoever shares the step must not suffer from it.
    last = (probabilities > 0).sum().sub(1).clamp(min=0)
    # Not ids[place]: that would wait for the device to tell the place.
    return ids.index_select(0, torch.minimum(place, last)[None])[0]


def _adjusted(scores: Tensor, draw: Draw) -> Tensor:
    """One row's scores after what a request says about single ids: grammar, bias, penalties."""
    sampling = draw.sampling
    if draw.allowed is not None:
        scores = scores.masked_fill(~_unpack(draw.allowed, scores), float("-inf"))
    if sampling.logit_bias:
        numbers, biases = zip(*sampling.logit_bias, strict=True)
        scores = scores.index_add(0, _ids(numbers, scores), _numbers(biases, scores))
    if sampling.repetition_penalty != 1.0:
        scores = _penalised(scores, draw.ids, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(draw.ids[draw.prompt_tokens :])
        taken = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        scores = scores.index_add(0, _ids(list(counts), scores), _numbers(taken, scores), alpha=-1)
    return scores


def _unpack(mask: Mask, scores: Tensor) -> Tensor:
    """A grammar's mask as flags on the scores' device, [vocab_size]."""
    words = torch.from_numpy(mask).to(scores.device)  # [words]
    bits = words[:, None] >> torch.arange(32, dtype=torch.int32, device=scores.device)  # [words, 32]
    return (bits & 1).flatten()[: len(scores)] != 0


def _penalised(scores: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative scores of ids that occurred (Keskar et al. 2019, CTRL)."""
    seen = _ids(sorted(set(ids)), scores)
    values = scores[seen]
    return scores.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _ids(ids: Sequence[int], scores: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=scores.device)


def _numbers(numbers: Sequence[float], scores: Tensor) -> Tensor:
    """As scores are, whole ones too."""
    return torch.tensor(numbers, dtype=scores.dtype, device=scores.device)


# --- log-probabilities ---------------------------------------------------------------------------------------------


def _tell(scores: Tensor, chosen: Tensor, top: int | None) -> Tensor:
    """The chosen id's log-probability, then those of the likeliest ids, then these ids: [1 + 2 * top], fp32."""
    norm = scores.logsumexp(-1)
    told = scores.index_select(0, chosen[None]) - norm
    if not top:
        return told
    # Sorted, for equals to stand in the order of their ids: the first is then what a greedy row chooses.
    ordered, ids = torch.sort(scores, descending=True, stable=True)
    return torch.cat((told, ordered[:top] - norm, ids[:top].float()))


def _told_size(top: int | None, vocab_size: int) -> int:
    return 0 if top is None else 1 + 2 * min(top, vocab_size)


def _choice(number: int, told: Sequence[float]) -> Choice:
    if not told:
        return Choice(number)
    top = len(told) // 2
    likeliest = zip(map(int, told[1 + top :]), told[1 : 1 + top], strict=True)
    return Choice(number, TokenLogprob(number, told[0], tuple(pair for pair in likeliest if pair[1] > float("-inf"))))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone (two rounds of SplitMix64, Steele et al. 2014)."""
    return (_mix(_mix(seed) ^ position) >> 11) / 2**53


def _mix(value: int) -> int:
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
