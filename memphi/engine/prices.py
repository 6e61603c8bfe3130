"""What a planned step takes of the device's memory beyond what stays, by kind of work; arithmetic only."""

from collections.abc import Iterator, Sequence

from memphi.config import AdapterForm, AudioConfig, CacheFormat, ModelConfig
from memphi.engine.step import EncodeSlice, PlannedRow, StepPlan
from memphi.memory import costs
from memphi.memory.plan import MemoryPlan
from memphi.request import DecodedClip, DecodedImage

UNEXPLAINED_SHARE, UNEXPLAINED_BYTES = 64, 2 * 2**20
"""What steps of memphi's own kernels and passes of encoders took beyond their tensors on an H200: 1.1 % at most."""
CONVOLUTION_BYTES = 8 * 2**20
"""What cuDNN's kernels may take for themselves: on an H100 a pass over a short recording took 4 MiB more."""
DRAFT_STEP_TOKENS = 64
"""Tokens at most of a step that has drafts. A GPU's arithmetic keeps up with reading the weights for some hundreds of
tokens, but each is scored over the vocabulary too; and with many rows a step is worth its price without drafts."""


def price_slices(slices: Sequence[EncodeSlice], config: ModelConfig, dtype_bytes: int) -> tuple[str, int]:
    """The kind of an encoder pass over slices of one kind, and its bytes."""
    units = sum(piece.units for piece in slices)
    if slices[0].kind == "image":
        made = costs.cropping(config, units, dtype_bytes).bytes if any(map(_is_decoded, slices)) else 0
        return "vision pass", with_unexplained(max(costs.vision_pass(config, units, dtype_bytes).bytes, made))
    sizes = [size for piece in slices for size in _windows(piece, config.audio)]
    cost = costs.audio_pass(config, units, dtype_bytes, any(map(_is_decoded, slices)), sizes)
    return "audio pass", with_unexplained(cost.bytes) + CONVOLUTION_BYTES


def with_unexplained(n_bytes: int) -> int:
    """A price, and what a card was seen to take beyond it."""
    return n_bytes + n_bytes // UNEXPLAINED_SHARE + UNEXPLAINED_BYTES


def _is_decoded(piece: EncodeSlice) -> bool:
    """Whether crops or log-mel frames are made on the device, before they are encoded."""
    prompt = piece.sequence.prompt
    assert prompt is not None
    media = prompt.images[piece.index] if piece.kind == "image" else prompt.clips[piece.index]
    return isinstance(media, DecodedImage | DecodedClip)


def _windows(piece: EncodeSlice, audio: AudioConfig) -> Iterator[costs.WindowSize]:
    """The sizes of a slice's windows."""
    size, frames = audio.window_tokens, piece.sequence.footprint.clips[piece.index].frames
    total = -(-frames // audio.compression)
    for first in range(piece.first * size, (piece.first + piece.units) * size, size):
        tokens = min(total - first, size)
        borders = (first > 0) + (first + tokens < total)
        yield costs.WindowSize(tokens + borders, tokens if total <= size or audio.mask_tail else size)


def price_rows(
    plan: StepPlan,
    config: ModelConfig,
    dtype_bytes: int,
    masked: bool,
    adapters: AdapterForm = "plain",
    kernels: bool = False,
    cache_format: CacheFormat = "plain",
) -> tuple[str, int]:
    """The kind of a step's forward pass, and its bytes: the layers', or the scores' where those take more.

    kernels: whether it goes through memphi's own.
    """
    tokens = sum(row.tokens for row in plan.rows)
    rows = costs.divided([(row.tokens, row.past) for row in plan.rows])
    pasts = costs.pasts_of(rows, in_lines=kernels)
    decoding = sum(row.tokens == 1 for row in plan.rows)
    kind = "decode step" if tokens == decoding else "mixed step" if decoding else "prefill chunk"
    scores = costs.logits(config, sum(row.scored for row in plan.rows), tokens, dtype_bytes).bytes
    if kernels:
        own = costs.kernel_step(config, tokens, pasts, dtype_bytes, adapters, cache_format).bytes
        return kind, max(with_unexplained(own), scores)
    seen = [new + past for new, past in rows if past]
    keys, kept = max(seen, default=0), (adapters, pasts.all_copied, cache_format)
    decode = costs.decode_step(config, decoding, keys, dtype_bytes, *kept).bytes if decoding else 0
    if tokens == decoding:
        return kind, max(decode, scores)
    chunk = costs.prefill_chunk(config, tokens, keys, dtype_bytes, len(seen), masked, *kept).bytes
    return kind, max(chunk, decode, scores)


def price_graphs(
    answers: Sequence[PlannedRow],
    prompts: Sequence[PlannedRow],
    config: ModelConfig,
    dtype_bytes: int,
    cache_format: CacheFormat,
) -> tuple[str, int]:
    """The same of a step in graphs, whose own tensors have their places: what comes is to draw from scores; and of
    prompts their embeddings, those of media again beside them, attention between pieces, and the scores.
    """
    if not prompts:
        return "graph step", costs.logits(config, len(answers), 0, 0).bytes
    tokens, scored = sum(row.tokens for row in prompts), sum(row.scored for row in (*answers, *prompts))
    embedded = tokens * (config.language.hidden_size * dtype_bytes + costs.METADATA_BYTES)
    scores = costs.logits(config, scored, tokens, dtype_bytes).bytes + scored * config.language.vocab_size * dtype_bytes
    between = 0
    if costs.is_in_pieces(tokens):
        pasts = costs.pasts_of(costs.divided([(row.tokens, row.past) for row in prompts]), in_lines=True)
        between = costs.attention_between_pieces(config, tokens, pasts, dtype_bytes, cache_format)
    return "graph step of prompts", with_unexplained(embedded + max(scores, between))


def price_choice() -> tuple[str, int]:
    """The same where every row's id is chosen in the graph too: nothing comes."""
    return "greedy graph step", 0


def draft_step_tokens(plan: MemoryPlan, config: ModelConfig, dtype_bytes: int, kernels: bool = False) -> int:
    """How many tokens a step with drafts may have, all of them scored, within what the plan's largest step takes."""
    largest_bytes = next(cost.bytes for cost in plan.costs if cost.name == "largest step")

    def fits(tokens: int) -> bool:
        rows, keys, all_keys = min(plan.rows, tokens), plan.context_tokens, plan.pages * plan.page_tokens
        if kernels:
            pasts = costs.Pasts(keys, rows, keys, all_keys, keys, rows, max(tokens // 2, 1))
            chunk = costs.kernel_step(config, tokens, pasts, dtype_bytes, plan.adapters, plan.cache_format)
        else:
            kept = (plan.adapters, all_keys, plan.cache_format)
            chunk = costs.prefill_chunk(config, tokens, keys, dtype_bytes, rows, True, *kept)
        return max(chunk.bytes, costs.logits(config, tokens, tokens, dtype_bytes).bytes) <= largest_bytes

    return next((n for n in range(min(DRAFT_STEP_TOKENS, plan.step_tokens), 0, -1) if fits(n)), 0)
