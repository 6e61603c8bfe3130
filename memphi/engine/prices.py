"""What a planned step takes of the device's memory beyond what stays, by kind of work; arithmetic only."""

from collections.abc import Sequence

from memphi.config import AdapterForm, CacheFormat, ModelConfig
from memphi.engine.step import EncodeSlice, StepPlan
from memphi.memory import costs
from memphi.memory.planner import MemoryPlan

DRAFT_STEP_TOKENS = 64
"""Tokens at most of a step that has drafts. A GPU's arithmetic keeps up with reading the weights for some hundreds of
tokens, but each is scored over the vocabulary too; and with many rows a step is worth its price without drafts."""


def price_slices(slices: Sequence[EncodeSlice], config: ModelConfig, dtype_bytes: int) -> tuple[str, int]:
    """The kind of an encoder pass over slices of one kind, and its bytes."""
    units = sum(piece.units for piece in slices)
    if slices[0].kind == "image":
        return "vision pass", costs.vision_pass(config, units, dtype_bytes).bytes
    return "audio pass", costs.audio_pass(config, units, dtype_bytes).bytes


def price_rows(
    plan: StepPlan,
    config: ModelConfig,
    dtype_bytes: int,
    masked: bool,
    adapters: AdapterForm = "plain",
    cache_format: CacheFormat = "plain",
) -> tuple[str, int]:
    """The kind of a step's forward pass, and its bytes: the layers', or the scores' where those take more."""
    kept = (adapters, cache_format)
    tokens = sum(row.tokens for row in plan.rows)
    keys = max(row.past + row.tokens for row in plan.rows)
    decoding = sum(row.tokens == 1 for row in plan.rows)
    scores = costs.logits(config, sum(row.scored for row in plan.rows), tokens, dtype_bytes).bytes
    decode = costs.decode_step(config, decoding, keys, dtype_bytes, *kept).bytes if decoding else 0
    if tokens == decoding:
        return "decode step", max(decode, scores)
    has_past = any(row.past for row in plan.rows)
    chunk = costs.prefill_chunk(
        config, tokens, keys if has_past else 0, dtype_bytes, len(plan.rows), masked and has_past, *kept
    ).bytes
    return ("mixed step" if decoding else "prefill chunk"), max(chunk, decode, scores)


def price_graph(plan: StepPlan, config: ModelConfig) -> tuple[str, int]:
    """The same of a step in a graph, whose own tensors have their place: all that comes is to draw from scores."""
    return "graph step", costs.logits(config, len(plan.rows), 0, 0).bytes


def draft_step_tokens(plan: MemoryPlan, config: ModelConfig, dtype_bytes: int) -> int:
    """How many tokens a step with drafts may have, all of them scored, within what the plan's largest step takes."""
    kept = (plan.adapters, plan.cache_format)
    largest_bytes = next(cost.bytes for cost in plan.costs if cost.name == "largest step")

    def fits(tokens: int) -> bool:
        rows = min(plan.rows, tokens)
        chunk = costs.prefill_chunk(config, tokens, plan.context_tokens, dtype_bytes, rows, True, *kept)
        return max(chunk.bytes, costs.logits(config, tokens, tokens, dtype_bytes).bytes) <= largest_bytes

    return next((n for n in range(min(DRAFT_STEP_TOKENS, plan.step_tokens), 0, -1) if fits(n)), 0)
