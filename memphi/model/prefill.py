"""Rows of any number of new tokens through the kernels, over a pool: prompts, their chunks, and answers beside them.

`LanguageModel.forward`, over the same rows, is the definition. What torch does number by number in a pass over memory
for each operation, a kernel does in one pass, and leaves it where the next product reads it. For gradients there is the
definition alone.

Attention takes rows as they come; all else takes tokens, and is the same work for whatever rows they are of. So the
decoder comes in pieces, of which each ends where a layer's attention is to be computed.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from memphi.model.adapters import AdaptedLinear, AdapterTokens
from memphi.model.kept import kept_layer
from memphi.model.kernels.division import Division, choose_tiling, divide, make_division
from memphi.model.kernels.gate import gate
from memphi.model.kernels.norm import add_norm
from memphi.model.kernels.paged import attend
from memphi.model.kernels.rotary import rotate_and_keep, tabulate
from memphi.model.kernels.rounding import Bytes
from memphi.model.language import MLP, DecoderLayer, KeyValuePool, LanguageModel, RMSNorm, SelfAttention
from memphi.model.rotary import rotary_frequencies
from memphi.model.rows import Lines, Packing


@dataclass(frozen=True)
class Step:
    """What all layers of a step share."""

    packing: Packing
    rotary: tuple[Tensor, Tensor]
    pool: KeyValuePool
    room: "Room | None"


@dataclass(frozen=True)
class Room:
    """Where what attention reads and writes stands in every layer, and not wherever there is memory."""

    qkv: Tensor  # [tokens, (heads + 2 * kv_heads) * head_dim]
    operand: Tensor | None
    """What the product after it reads, where that is more than x."""
    x: Tensor  # [tokens, heads * head_dim]


@dataclass(frozen=True)
class Mixing:
    """A layer's attention: of what, and where it goes. Keys and values are in their pages, and turned, as queries."""

    attention: SelfAttention
    qkv: Tensor
    out: Tensor


DividedLines = tuple[Lines, Division]
"""Rows in lines, and how their keys are divided for the whole card."""
Pieces = Generator[Mixing, None, Tensor]
"""What computes a piece of the decoder whenever it is asked for the next attention; the last one gives the states."""


class Residual:
    """The decoder's running sum, and what is yet to be added to it."""

    def __init__(self, x: Tensor) -> None:
        """x [tokens, hidden] is added to in its place."""
        self._x = x
        self.delta: Tensor | None = None

    def room_for_bytes(self, linear: AdaptedLinear, adapter_tokens: AdapterTokens) -> Bytes | None:
        """Room for a linear's x, as many as of the sum, in bytes, where that is how it is multiplied."""
        return linear.room_for_bytes(len(self._x), self._x, adapter_tokens)

    def normed(self, norm: RMSNorm, made: Bytes | None = None, out: Tensor | None = None) -> Tensor:
        """Add what is to be added, and give the norm of the sum; in out, where one is given, and in bytes as well.

        With bytes and without out it is there in bytes alone: nothing is written to what is returned.
        """
        room = torch.empty_like(self._x) if out is None else out
        add_norm(self._x, self.delta, norm.weight, norm.eps, room if made is None else out, made)
        self.delta = None  # Its memory goes before the next product's output comes.
        return room


def compute(
    model: LanguageModel,
    embeddings: Tensor,
    packing: Packing,
    pool: KeyValuePool,
    frequencies: Tensor | None = None,
) -> Tensor:
    """The normed hidden states [tokens, hidden] of packed rows; the rows' keys and values go into their pages.

    embeddings [tokens, hidden] are overwritten; packing has the rows of few new tokens in lines; frequencies are the
    rotary ones, where they are on the device already.
    """
    if frequencies is None:
        frequencies = rotary_frequencies(model.config, embeddings.device)
    lines = divide_lines(model, packing)  # Before `_tabulate`, as masks are.
    pieces = in_pieces(model, embeddings, packing, pool, frequencies)
    while True:
        try:
            mix(next(pieces), packing, lines, pool)
        except StopIteration as end:
            return cast(Tensor, end.value)


def in_pieces(
    model: LanguageModel,
    embeddings: Tensor,
    packing: Packing,
    pool: KeyValuePool,
    frequencies: Tensor,
    room: Room | None = None,
) -> Pieces:
    """`compute`, but that whoever asks for the pieces computes attention."""
    packing.adapter_tokens.make_masks(len(packing.positions), embeddings.device)
    residual, step = Residual(embeddings), Step(packing, _tabulate(model, packing, frequencies), pool, room)
    for layer in cast(Iterable[DecoderLayer], model.layers):
        residual.delta = yield from _attend(layer.attention, layer.attention_norm, residual, step)
        residual.delta = _transform(layer.mlp, layer.mlp_norm, residual, step)
    return residual.normed(model.norm)


def _attend(attention: SelfAttention, norm: RMSNorm, residual: Residual, step: Step) -> Pieces:
    """A layer's attention: what is to be added to the running sum."""
    tokens, paging, room = step.packing.adapter_tokens, step.packing.paging, step.room
    assert paging is not None
    count, layer = len(step.packing.positions), attention.layer
    made = residual.room_for_bytes(attention.qkv, tokens)
    out = None if room is None else room.qkv
    qkv = attention.qkv.follow(partial(residual.normed, norm, made), count, tokens, made, out)
    del made
    pages, places = step.pool.layer(layer), (paging.token_pages, paging.token_offsets)
    rotate_and_keep(qkv, *step.rotary, *pages, *places, step.pool.scales(layer))
    if room is None:
        operand = attention.out.operand_for(count, tokens)
        x = qkv.new_empty(count, attention.widths[0]) if operand is None else attention.out.x_of(operand)
    else:
        operand, x = room.operand, room.x
    yield Mixing(attention, qkv, x)
    return attention.out.finish(x, operand, tokens)


def mix(mixing: Mixing, packing: Packing, all_lines: Sequence[DividedLines], pool: KeyValuePool) -> None:
    """Compute a layer's attention, of each row by what is for it."""
    attention, layer = mixing.attention, mixing.attention.layer
    pages, scales = pool.layer(layer), pool.scales(layer)
    heads = [width // attention.head_dim for width in attention.widths]
    qkv, out = (part.unflatten(-1, (-1, attention.head_dim)) for part in (mixing.qkv, mixing.out))
    query, key, value = qkv.split(heads, dim=1)  # [tokens, heads, head_dim]
    attention.attention.paged(query, key, value, *kept_layer(*pages, scales), packing, out)
    for lines, division in all_lines:
        asked = query[lines.tokens]
        if isinstance(lines.tokens, slice):
            attend(asked, *pages, lines.table, division, out[lines.tokens], scales)
            continue
        found = torch.empty_like(asked)
        attend(asked, *pages, lines.table, division, found, scales)
        out.index_copy_(0, lines.targets, found if lines.kept is None else found[lines.kept])


def _transform(mlp: MLP, norm: RMSNorm, residual: Residual, step: Step) -> Tensor:
    """The same of a layer's MLP."""
    packing = step.packing
    count = len(packing.positions)
    made = residual.room_for_bytes(mlp.gate_up, packing.adapter_tokens)
    gate_up = mlp.gate_up.follow(partial(residual.normed, norm, made), count, packing.adapter_tokens, made)
    made = residual.room_for_bytes(mlp.down, packing.adapter_tokens)

    def open_gate(out: Tensor | None) -> Tensor:
        room = gate_up.new_empty(count, gate_up.shape[1] // 2) if out is None else out
        gate(gate_up, room if made is None else out, made)  # As `normed`.
        return room

    return mlp.down.follow(open_gate, count, packing.adapter_tokens, made)


def divide_lines(model: LanguageModel, packing: Packing) -> tuple[DividedLines, ...]:
    """The keys of each form of lines, divided for the whole card."""
    assert packing.paging is not None
    divided = []
    for lines in packing.paging.lines:
        rows, dtype, device = len(lines.lengths), model.norm.weight.dtype, lines.lengths.device
        tiling = choose_tiling(rows, lines.new_tokens, dtype, device, fresh=False)
        made = make_division(model.config, rows, lines.new_tokens, tiling, device)
        divided.append((lines, replace(made, lengths=lines.lengths)))
        divide(divided[-1][1])
    return tuple(divided)


def _tabulate(model: LanguageModel, packing: Packing, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all tokens; not launched dependently, so that kernels after it may read what was made before
    it without waiting."""
    config, weight = model.config, model.norm.weight
    cos, sin = (weight.new_empty(len(packing.positions), 1, config.rotary_dim) for _ in range(2))
    tabulate(packing.positions, packing.long, frequencies, config.rope_scale, cos, sin)
    return cos, sin
