"""What a planned step takes of the device's memory beyond what stays, by kind of work; arithmetic only."""

from collections.abc import Sequence

from memphi.config import ModelConfig
from memphi.engine.step import EncodeSlice, StepPlan
from memphi.memory import costs


def price_slices(slices: Sequence[EncodeSlice], config: ModelConfig, dtype_bytes: int) -> tuple[str, int]:
    """The kind of an encoder pass over slices of one kind, and its bytes."""
    units = sum(piece.units for piece in slices)
    if slices[0].kind == "image":
        return "vision pass", costs.vision_pass(config, units, dtype_bytes).bytes
    return "audio pass", costs.audio_pass(config, units, dtype_bytes).bytes


def price_rows(plan: StepPlan, config: ModelConfig, dtype_bytes: int, masked: bool) -> tuple[str, int]:
    """The kind of a step's forward pass, and its bytes: the layers', or the scores' where those take more."""
    tokens = sum(row.tokens for row in plan.rows)
    keys = max(row.past + row.tokens for row in plan.rows)
    decoding = sum(row.tokens == 1 for row in plan.rows)
    scores = costs.logits(config, sum(row.samples for row in plan.rows), tokens, dtype_bytes).bytes
    decode = costs.decode_step(config, decoding, keys, dtype_bytes).bytes if decoding else 0
    if tokens == decoding:
        return "decode step", max(decode, scores)
    has_past = any(row.past for row in plan.rows)
    chunk = costs.prefill_chunk(
        config, tokens, keys if has_past else 0, dtype_bytes, len(plan.rows), masked and has_past
    ).bytes
    return ("mixed step" if decoding else "prefill chunk"), max(chunk, decode, scores)
