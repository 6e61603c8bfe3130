"""Rows of any number of new tokens through the kernels, over a pool: prompts, their chunks, and answers beside them.

`LanguageModel.forward`, over the same rows, is the definition. What torch does number by number in a pass over memory
for each operation, a kernel does in one pass, and leaves it where the next product reads it. For gradients there is the
definition alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from memphi.model.adapters import AdaptedLinear
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
    lines: tuple[tuple[Lines, Division], ...]
    pool: KeyValuePool


class Residual:
    """The decoder's running sum, and what is yet to be added to it."""

    def __init__(self, x: Tensor) -> None:
        """x [tokens, hidden] is added to in its place."""
        self._x = x
        self.delta: Tensor | None = None

    def room_for_bytes(self, linear: AdaptedLinear) -> Bytes | None:
        """Room for a linear's x, a norm of the sum, in bytes, where that is how it is multiplied."""
        return linear.room_for_bytes(len(self._x), self._x)

    def normed(self, norm: RMSNorm, made: Bytes | None = None, out: Tensor | None = None) -> Tensor:
        """Add what is to be added, and give the norm of the sum; in out, where one is given, and in bytes as well."""
        out = torch.empty_like(self._x) if out is None else out
        add_norm(self._x, self.delta, norm.weight, norm.eps, out, made)
        self.delta = None  # Its memory goes before the next product's output comes.
        return out


def compute(model: LanguageModel, embeddings: Tensor, packing: Packing, pool: KeyValuePool) -> Tensor:
    """The normed hidden states [tokens, hidden] of packed rows; the rows' keys and values go into their pages.

    embeddings [tokens, hidden] are overwritten; packing has the rows of few new tokens in lines.
    """
    lines = _divide_lines(model, packing)  # Before `_tabulate`, which is not launched dependently.
    step = Step(packing, _tabulate(model, packing), lines, pool)
    residual = Residual(embeddings)
    for layer in cast(Iterable[DecoderLayer], model.layers):
        residual.delta = _attend(layer.attention, layer.attention_norm, residual, step)
        residual.delta = _transform(layer.mlp, layer.mlp_norm, residual, step)
    return residual.normed(model.norm)


def _attend(attention: SelfAttention, norm: RMSNorm, residual: Residual, step: Step) -> Tensor:
    """A layer's attention: what is to be added to the running sum."""
    packing, paging = step.packing, step.packing.paging
    assert paging is not None
    count, pages, scales = len(packing.positions), step.pool.layer(attention.layer), step.pool.scales(attention.layer)
    made = residual.room_for_bytes(attention.qkv)
    qkv = attention.qkv.follow(partial(residual.normed, norm, made), count, packing.adapter_tokens, made)
    del made
    rotate_and_keep(qkv, *step.rotary, *pages, paging.token_pages, paging.token_offsets, scales)
    heads = [width // attention.head_dim for width in attention.widths]
    query, key, value = qkv.view(count, -1, attention.head_dim).split(heads, dim=1)  # [tokens, heads, head_dim]

    def mix(out: Tensor | None) -> Tensor:
        out = torch.empty_like(qkv[:, : attention.widths[0]]) if out is None else out
        heads = out.unflatten(-1, (-1, attention.head_dim))
        attention.attention.paged(query, key, value, *kept_layer(*pages, scales), packing, heads)
        for lines, division in step.lines:
            asked = query[lines.tokens]
            if isinstance(lines.tokens, slice):
                attend(asked, *pages, lines.table, division, heads[lines.tokens], scales)
                continue
            found = torch.empty_like(asked)
            attend(asked, *pages, lines.table, division, found, scales)
            heads.index_copy_(0, lines.targets, found if lines.kept is None else found[lines.kept])
        return out

    return attention.out.follow(mix, count, packing.adapter_tokens)


def _transform(mlp: MLP, norm: RMSNorm, residual: Residual, step: Step) -> Tensor:
    """The same of a layer's MLP."""
    packing = step.packing
    count = len(packing.positions)
    made = residual.room_for_bytes(mlp.gate_up)
    gate_up = mlp.gate_up.follow(partial(residual.normed, norm, made), count, packing.adapter_tokens, made)
    made = residual.room_for_bytes(mlp.down)

    def open_gate(out: Tensor | None) -> Tensor:
        out = gate_up.new_empty(count, gate_up.shape[1] // 2) if out is None else out
        gate(gate_up, out, made)
        return out

    return mlp.down.follow(open_gate, count, packing.adapter_tokens, made)


def _divide_lines(model: LanguageModel, packing: Packing) -> tuple[tuple[Lines, Division], ...]:
    """The keys of each form of lines, divided for the whole card."""
    assert packing.paging is not None
    divided = []
    for lines in packing.paging.lines:
        rows, dtype, device = len(lines.lengths), model.norm.weight.dtype, lines.lengths.device
        tiling = choose_tiling(rows, lines.new_tokens, dtype, device, fresh=False)
        made = make_division(model.config, rows, lines.new_tokens, tiling, device, fresh=False)
        divided.append((lines, replace(made, lengths=lines.lengths)))
        divide(divided[-1][1])
    return tuple(divided)


def _tabulate(model: LanguageModel, packing: Packing) -> tuple[Tensor, Tensor]:
    config, weight = model.config, model.norm.weight
    cos, sin = (weight.new_empty(len(packing.positions), 1, config.rotary_dim) for _ in range(2))
    frequencies = rotary_frequencies(config, weight.device)
    tabulate(packing.positions, packing.long, frequencies, config.rope_scale, cos, sin)
    return cos, sin
