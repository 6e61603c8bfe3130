"""One new token of each of some rows through the kernels, over tensors that stay where they are.

`LanguageModel.forward` and `logits`, over the same rows, are the definition. Nothing is read on the host and nothing
decided by numbers on the device, so a CUDA graph can hold a step and serve rows of any length and mode with it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from memphi.model.adapters import AdapterTokens
from memphi.model.kernels.choice import choose, pieces_of
from memphi.model.kernels.division import Division, Tiling, choose_tiling, divide, make_division, units_of
from memphi.model.kernels.norm import add_norm
from memphi.model.kernels.paged import attend_new
from memphi.model.kernels.rotary import tabulate
from memphi.model.language import DecoderLayer, KeyValuePool, LanguageModel
from memphi.model.rotary import rotary_frequencies
from memphi.model.rows import Row
from memphi.model.upload import Staging

ADAPTERS = ("vision", "speech")


@dataclass  # Not frozen, though nobody changes it: one is made for every row of every step, three times as fast so.
class Chosen:
    """An id that only the device knows yet: what the step before chooses for one of its rows."""

    row: int


class Inputs:
    """The numbers of a step of up to `rows` rows, on the host and on the device; one copy brings all of them over."""

    def __init__(self, rows: int, most_pages: int, page_tokens: int, device: torch.device) -> None:
        """A row has most_pages pages at most."""
        self.page_tokens = page_tokens
        sizes: dict[str, tuple[int, Any]] = {
            "chosen": (rows, np.int64),
            "given": (rows, np.int64),
            "sources": (rows, np.int64),
            "lengths": (rows, np.int32),
            "positions": (rows, np.int32),
        }
        sizes |= dict.fromkeys(("long", *ADAPTERS), (rows, np.bool_))
        sizes |= {"pages": (rows * most_pages, np.int32)}
        self._lines: list[tuple[int, ...]] = []
        """The pages that stand in the lines of the staged table, which are `_width` apart."""
        self._width = 0
        self._staging = staging = Staging(sizes, device)
        self._given_at, given_end = staging.places["given"]
        self.chosen = staging.device["chosen"]
        """What a step chooses for its rows, [rows]: it lies before all that is copied, for the next step to read."""
        self.known = staging.sent[:given_end].view(torch.int64)
        """The ids chosen by the step before, and those that the host gives."""
        self.sources = staging.device["sources"]
        """Where among those each row has its id, [rows]."""
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        """Room for them, [rows]."""
        self.lengths = staging.device["lengths"]
        """[rows]: past and new tokens; 0 where a row only fills up the step: it reads and writes nothing."""
        self.positions, self.long = staging.device["positions"], staging.device["long"]
        self.masks = {name: staging.device[name] for name in ADAPTERS}
        """The rows that use each adapter: [rows] bool."""
        self.table = torch.zeros((rows, most_pages), dtype=torch.int32, device=device)
        """The pages of each row; those that a row does not need are not read, and may be any number."""

    @torch.inference_mode()
    def fill(self, rows: Sequence[Row], ids: Sequence[int | Chosen], count: int) -> None:
        """Bring over a step of `count` rows: these, and others that fill it up; waits only for the copy before."""
        self._staging.wait()
        host, filled = self._staging.host, len(rows)
        past = [row.past for row in rows]
        given = self._given_at // host["given"].itemsize
        adapters = [row.adapter for row in rows]
        for name, values in (
            ("given", [0 if isinstance(number, Chosen) else number for number in ids]),
            ("sources", [n.row if isinstance(n, Chosen) else given + place for place, n in enumerate(ids)]),
            ("lengths", [tokens + 1 for tokens in past]),
            ("positions", past),
            ("long", [row.long for row in rows]),
            *((name, [own == name for own in adapters] if name in adapters else 0) for name in ADAPTERS),
        ):
            host[name][:filled] = values
            host[name][filled:count] = 0
        width = max(past, default=-1) // self.page_tokens + 1
        self._fill_table(rows, width)
        self._send(filled, width)

    def _fill_table(self, rows: Sequence[Row], width: int) -> None:
        """Write the rows' pages into lines close together, so that few bytes are copied; from there the device spreads
        them. What stands there already is left: most rows have the pages that they had in the step before.
        """
        for row in rows:
            assert len(row.pages) * self.page_tokens > row.past, f"{row.pages} cannot hold {row.past + 1} tokens"
        standing, self._lines = self._lines if width == self._width else [], []  # None, should this one fail.
        table = self._staging.host["pages"][: len(rows) * width].reshape(len(rows), width)
        lines = [row.pages for row in rows]
        for place, (pages, before) in enumerate(zip_longest(lines, standing[: len(lines)])):
            if pages is not before:
                # As many as there is room for: these may be the row's pages for longer than it needs so few of them.
                table[place, : len(pages)] = pages[:width]
        self._lines, self._width = lines, width

    def _send(self, filled: int, width: int) -> None:
        pages_at, _ = self._staging.places["pages"]
        self._staging.send(self._given_at, pages_at + 4 * filled * width)
        self.table[:filled, :width] = self._staging.device["pages"][: filled * width].view(filled, width)


class Buffers:
    """The tensors of a step of up to `rows` rows, of which a step of fewer uses the beginnings; one set serves all.

    A kernel that has been started early waits before it writes, so each tensor may be used again and again in a step.
    """

    def __init__(self, model: LanguageModel, pool: KeyValuePool, rows: int, most_pages: int) -> None:
        config, weight = model.config, model.norm.weight
        dtype, device = weight.dtype, weight.device
        self._in_codes = pool.scales(0) is not None
        first = cast(DecoderLayer, model.layers[0])

        def room(*shape: int) -> Tensor:
            return torch.empty((rows, *shape), dtype=dtype, device=device)

        self.rows = rows
        self.x, self.delta = room(config.hidden_size), room(config.hidden_size)
        self.inputs = Inputs(rows, most_pages, pool.page_tokens, device)
        tilings = [self._tiling(count) for count in range(1, rows + 1)]
        units = max(units_of(tiling, count, config.kv_heads, device) for count, tiling in enumerate(tilings, 1))
        self.division = make_division(config, rows, 1, tilings[-1], device, units)
        self.frequencies = rotary_frequencies(config, device)
        self.cos, self.sin = room(1, config.rotary_dim), room(1, config.rotary_dim)
        # The inputs of the linears, of which all but one are as wide as the model, with room for adapters.
        self.operand, self.inner = room(first.mlp.gate_up.width), room(first.mlp.down.width)
        self.qkv = room(first.attention.qkv.out_features)
        self.gate_up = room(first.mlp.gate_up.out_features)
        self.normed, self.logits = room(config.hidden_size), room(config.vocab_size)
        pieces = pieces_of(config.vocab_size)
        self.best = torch.empty((rows, pieces), dtype=torch.float32, device=device)
        self.places = torch.empty((rows, pieces), dtype=torch.int32, device=device)

    def division_of(self, rows: int) -> Division:
        """The division of a step of so many rows."""
        whole, tiling = self.division, self._tiling(rows)
        units = units_of(tiling, rows, whole.sums.shape[1], whole.sums.device)
        return replace(
            whole,
            lengths=self.inputs.lengths[:rows],
            units=whole.units[:units],
            sums=whole.sums[:units],
            weights=whole.weights[:units],
            arrived=whole.arrived[:rows],
            tiling=tiling,
        )

    def _tiling(self, rows: int) -> Tiling:
        x = self.x
        return choose_tiling(rows, 1, x.dtype, x.device, fresh=True, in_codes=self._in_codes)


class DecodeStep:
    """The step of exactly `rows` rows in which these adapters may be used; their linears must be packed."""

    def __init__(
        self,
        model: LanguageModel,
        pool: KeyValuePool,
        buffers: Buffers,
        rows: int,
        adapters: Collection[str] = (),
        forbidden: Tensor | None = None,
    ) -> None:
        """forbidden [vocab_size] bool: ids that are never chosen; None: all may be."""
        self._model, self._pool, self._buffers = model, pool, buffers
        self._rows = rows
        self.logits = buffers.logits[:rows]
        """What a run computes: [rows, vocab_size]; the next run of any step with these buffers replaces it."""
        self.chosen = buffers.inputs.chosen[:rows]
        """The likeliest id of each row, [rows]; the same holds of it, but for rows that only fill up a step."""
        if forbidden is None:
            forbidden = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.logits.device)
        self._forbidden = forbidden
        self._division = buffers.division_of(rows)
        masks = {name: buffers.inputs.masks[name][:rows] for name in ADAPTERS if name in adapters}
        self._uses = AdapterTokens(masks)

    def fill(self, rows: Sequence[Row], ids: Sequence[int | Chosen]) -> None:
        """Say what the next run computes: one token of each of these rows, which may be fewer than the step's.

        The run before it may still go on, also where it is what chooses an id.
        """
        assert all(row.tokens == 1 for row in rows)
        self._buffers.inputs.fill(rows, ids, self._rows)

    def clear(self) -> None:
        """Have the next run read, write and choose nothing."""
        self._buffers.inputs.fill([], [], self._rows)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Write the keys and values of the new tokens; returns `logits`, of which `chosen` has the largest.

        Of `divide`, `tabulate` and the embeddings none is launched dependently, so that all later kernels may read
        what was filled in, and the units, without waiting.
        """
        buffers, inputs, model, rows = self._buffers, self._buffers.inputs, self._model, self._rows
        x, delta = buffers.x[:rows], None
        cos, sin = buffers.cos[:rows], buffers.sin[:rows]
        divide(self._division)
        tabulate(inputs.positions[:rows], inputs.long[:rows], buffers.frequencies, model.config.rope_scale, cos, sin)
        torch.index_select(inputs.known, 0, inputs.sources[:rows], out=inputs.ids[:rows])
        model.embedding.look_up(inputs.ids[:rows], x)
        for number, layer in enumerate(cast(Iterable[DecoderLayer], model.layers)):
            delta = self._attend(layer, number, x, delta, (cos, sin))
            delta = self._transform(layer, x, delta)
        normed = buffers.normed[:rows]
        add_norm(x, delta, model.norm.weight, model.norm.eps, normed)
        model.embedding.score(normed, self.logits)
        best, places = buffers.best[:rows], buffers.places[:rows]
        choose(self.logits, self._forbidden, inputs.lengths[:rows], best, places, self.chosen)
        return self.logits

    def _attend(
        self, layer: DecoderLayer, number: int, x: Tensor, delta: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x += the delta before, if any; returns what the layer's attention adds, in parts."""
        operand, qkv = self._buffers.operand[: self._rows], self._buffers.qkv[: self._rows]
        attention, norm = layer.attention, layer.attention_norm
        in_bytes = attention.qkv.room_for_bytes(self._rows, x, self._uses)
        add_norm(x, delta, norm.weight, norm.eps, attention.qkv.x_of(operand), in_bytes)
        qkv = attention.qkv.apply_in_parts(operand, self._uses, qkv, in_bytes)
        heads = attention.out.x_of(operand).unflatten(1, (-1, attention.head_dim))
        pages, scales = self._pool.layer(number), self._pool.scales(number)
        attend_new(qkv, *rotary, *pages, self._buffers.inputs.table, self._division, heads, scales)
        return attention.out.apply_in_parts(operand, self._uses, self._buffers.delta[: self._rows])

    def _transform(self, layer: DecoderLayer, x: Tensor, delta: Tensor) -> Tensor:
        """x += delta; returns what the layer's MLP adds, in parts."""
        operand, inner = self._buffers.operand[: self._rows], self._buffers.inner[: self._rows]
        gate_up, norm = self._buffers.gate_up[: self._rows], layer.mlp_norm
        in_bytes, opened = (
            each.room_for_bytes(self._rows, x, self._uses) for each in (layer.mlp.gate_up, layer.mlp.down)
        )
        add_norm(x, delta, norm.weight, norm.eps, layer.mlp.gate_up.x_of(operand), in_bytes)
        layer.mlp.gate_up.apply_gated(operand, self._uses, gate_up, layer.mlp.down.x_of(inner), in_bytes, opened)
        return layer.mlp.down.apply_in_parts(inner, self._uses, self._buffers.delta[: self._rows], opened)
