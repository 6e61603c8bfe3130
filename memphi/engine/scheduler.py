"""Decide one step and book its outcome: arithmetic on integers, no torch.

One rule for prefill and decode: a row computes its next n uncomputed tokens; decode is n = 1.
"""

from collections.abc import Iterable, Mapping, Sequence

from memphi.engine.sequence import Sequence as Running
from memphi.engine.step import PlannedRow, StepPlan
from memphi.request import FinishReason


def plan_step(sequences: Iterable[Running], step_tokens: int) -> StepPlan:
    """Share at most step_tokens among sequences: running answers first, then prompts in order of arrival."""
    rows, room = [], step_tokens
    for sequence in sorted(sequences, key=lambda s: (s.pending > 1, s.id)):
        tokens = min(sequence.pending, room)
        if tokens == 0:
            break
        rows.append(PlannedRow(sequence, sequence.computed, tokens))
        room -= tokens
    return StepPlan(tuple(rows))


def commit(plan: StepPlan, sampled: Mapping[int, int], stop_ids: Sequence[int]) -> list[Running]:
    """Book a step: what was computed, the ids sampled (by sequence id), answers that end.

    Returns the sequences whose cache is void because they crossed into the long rope regime: they start over.
    """
    crossed = []
    for row in plan.rows:
        sequence = row.sequence
        sequence.computed += row.tokens
        if sequence.id not in sampled:
            continue
        sequence.ids.append(sampled[sequence.id])
        sequence.finish_reason = _finish_reason(sequence, stop_ids)
        if sequence.finish_reason is None and sequence.config.is_long(len(sequence.ids)) != sequence.long:
            sequence.long, sequence.computed = True, 0
            crossed.append(sequence)
    return crossed


def _finish_reason(sequence: Running, stop_ids: Sequence[int]) -> FinishReason | None:
    if sequence.ids[-1] in stop_ids and not sequence.sampling.ignore_eos:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(sequence.answer) >= sequence.max_tokens else None
