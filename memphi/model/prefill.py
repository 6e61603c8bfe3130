"""Rows of any number of new tokens through the kernels, over a pool: prompts, their chunks, and answers beside them.

`LanguageModel.forward`, over the same rows, is the definition. What torch does number by number in a pass over memory
for each operation, a kernel does in one pass, and leaves it where the next product reads it. For gradients there is the
definition alone.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from memphi.memory.costs import PREFILL_LINE_TOKENS, PREFILL_ROW_TOKENS, prefill_lines
from memphi.model.adapters import AdaptedLinear, AdapterTokens
from memphi.model.decode import ADAPTERS
from memphi.model.kept import kept_layer
from memphi.model.kernels.division import Division, choose_tiling, divide, make_division
from memphi.model.kernels.gate import gate
from memphi.model.kernels.norm import add_norm
from memphi.model.kernels.paged import attend
from memphi.model.kernels.rotary import rotate_and_keep, tabulate
from memphi.model.kernels.rounding import Bytes
from memphi.model.language import MLP, DecoderLayer, KeyValuePool, LanguageModel, RMSNorm, SelfAttention
from memphi.model.rotary import rotary_frequencies
from memphi.model.rows import Lines, Packing, Paging, Row, cut_lines, lay_out
from memphi.model.upload import Staging


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
    lines = _divide_lines(model, packing)  # This, and masks, before `_tabulate`, which is not launched dependently.
    packing.adapter_tokens.make_masks(len(packing.positions), embeddings.device)
    step = Step(packing, _tabulate(model, packing, frequencies), lines, pool)
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
    made = residual.room_for_bytes(attention.qkv, packing.adapter_tokens)
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
    made = residual.room_for_bytes(mlp.gate_up, packing.adapter_tokens)
    gate_up = mlp.gate_up.follow(partial(residual.normed, norm, made), count, packing.adapter_tokens, made)
    made = residual.room_for_bytes(mlp.down, packing.adapter_tokens)

    def open_gate(out: Tensor | None) -> Tensor:
        room = gate_up.new_empty(count, gate_up.shape[1] // 2) if out is None else out
        gate(gate_up, room if made is None else out, made)  # As `normed`.
        return room

    return mlp.down.follow(open_gate, count, packing.adapter_tokens, made)


def _divide_lines(model: LanguageModel, packing: Packing) -> tuple[tuple[Lines, Division], ...]:
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
    config, weight = model.config, model.norm.weight
    cos, sin = (weight.new_empty(len(packing.positions), 1, config.rotary_dim) for _ in range(2))
    tabulate(packing.positions, packing.long, frequencies, config.rope_scale, cos, sin)
    return cos, sin


class PrefillInputs:
    """The numbers of a step of up to so many tokens in lines, on the host and on the device, and its embeddings."""

    def __init__(self, model: LanguageModel, tokens: int, page_tokens: int) -> None:
        weight, lines = model.norm.weight, prefill_lines(tokens)
        self.page_tokens = page_tokens
        self._most_pages = -(-PREFILL_ROW_TOKENS // page_tokens)
        self.staging = Staging(
            {
                "positions": (tokens, np.int32),
                "token_pages": (tokens, np.int32),
                "token_offsets": (tokens, np.int32),
                **dict.fromkeys(("long", *ADAPTERS), (tokens, np.bool_)),
                "kept": (tokens, np.int64),
                "line_tokens": (lines * PREFILL_LINE_TOKENS, np.int64),
                "line_lengths": (lines, np.int32),
                "pages": (lines * self._most_pages, np.int32),
            },
            weight.device,
        )
        self.table = torch.zeros((lines, self._most_pages), dtype=torch.int32, device=weight.device)
        """The pages of each line's row."""
        self.targets = torch.arange(tokens, device=weight.device)
        self.frequencies = rotary_frequencies(model.config, weight.device)
        self.x = torch.zeros((tokens, model.config.hidden_size), dtype=weight.dtype, device=weight.device)
        """Embeddings, and after a step the normed hidden states."""

    def fill(self, rows: Sequence[Row], tokens: int) -> None:
        """Bring over a step of `tokens` tokens: these rows', and others that read and write nothing."""
        self.staging.wait()
        host, lines = self.staging.host, prefill_lines(tokens)
        host["token_pages"][:tokens] = -1
        host["line_lengths"][:lines] = 0
        for name in ("positions", "token_offsets", "kept"):
            host[name][:tokens] = 0
        host["line_tokens"][: lines * PREFILL_LINE_TOKENS] = 0
        width, n_lines = self._lay_out(rows) if rows else (0, 0)
        self.staging.send(0, self.staging.places["pages"][0] + 4 * n_lines * width)
        self.table[:n_lines, :width] = self.staging.device["pages"][: n_lines * width].view(n_lines, width)

    def _lay_out(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Write the rows' numbers; returns how many pages a line has at most, and how many lines there are."""
        host, laid = self.staging.host, lay_out(rows)
        table, pages, offsets = laid.places(rows, self.page_tokens)
        cut = cut_lines(range(len(rows)), laid, PREFILL_LINE_TOKENS)
        numbers = {
            "positions": laid.positions,
            "token_pages": pages,
            "token_offsets": offsets,
            "long": laid.long,
            **{name: laid.adapters == name for name in ADAPTERS},
            "kept": cut.kept.nonzero()[0],
            "line_tokens": cut.tokens,
            "line_lengths": cut.lengths,
            "pages": table[cut.rows].ravel(),
        }
        for name, values in numbers.items():
            host[name][: len(values)] = values
        return table.shape[1], len(cut.rows)


class PrefillStep:
    """`compute` for up to so many packed tokens of any rows, over tensors that stay where they are.

    Nothing is read on the host and nothing decided by numbers on the device, so a CUDA graph can hold it. All rows are
    in lines, whatever they have behind them.
    """

    def __init__(
        self,
        model: LanguageModel,
        pool: KeyValuePool,
        inputs: PrefillInputs,
        tokens: int,
        adapters: Collection[str] = (),
        by_all: bool = False,
    ) -> None:
        """adapters that may be used, by_all: the one there is, by all tokens; their linears must be packed."""
        self._model, self._pool, self._inputs, self._tokens = model, pool, inputs, tokens
        device, lines = inputs.staging.device, prefill_lines(tokens)
        lined = Lines(
            new_tokens=PREFILL_LINE_TOKENS,
            tokens=device["line_tokens"][: lines * PREFILL_LINE_TOKENS],
            kept=device["kept"][:tokens],
            targets=inputs.targets[:tokens],
            lengths=device["line_lengths"][:lines],
            table=inputs.table[:lines],
        )
        places = device["token_pages"][:tokens], device["token_offsets"][:tokens]
        self._packing = Packing(
            rows=(),
            positions=device["positions"][:tokens],
            long=device["long"][:tokens],
            adapter_tokens=AdapterTokens({name: None if by_all else device[name][:tokens] for name in adapters}),
            whole=(),
            paging=Paging(*places, begun_pages=None, lines=(lined,), continued=(), together=()),
        )
        self.states = inputs.x[:tokens]
        """What a run computes: normed hidden states [tokens, hidden]; the next run of any step replaces them."""

    def fill(self, rows: Sequence[Row], embeddings: Tensor) -> None:
        """Say what the next run computes: these rows, and the embeddings of their new tokens [tokens, hidden]."""
        self._inputs.fill(rows, self._tokens)
        self.states[: len(embeddings)] = embeddings

    def clear(self) -> None:
        """Have the next run read and write nothing."""
        self._inputs.fill([], self._tokens)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Write the keys and values of the new tokens; returns `states`."""
        inputs = self._inputs
        self.states.copy_(compute(self._model, self.states, self._packing, self._pool, inputs.frequencies))
        return self.states
