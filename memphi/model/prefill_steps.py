"""Steps of prompts over tensors that stay where they are, so that CUDA graphs can hold them: whole, with all rows in
lines, or in pieces, between which attention is launched kernel by kernel.
"""

from collections.abc import Collection, Generator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from memphi.memory.costs import (
    PREFILL_LINE_TOKENS,
    PREFILL_ROW_TOKENS,
    is_in_pieces,
    most_prefill_lines,
    prefill_lines,
)
from memphi.model.adapters import AdapterTokens
from memphi.model.decode import ADAPTERS
from memphi.model.language import DecoderLayer, KeyValuePool, LanguageModel
from memphi.model.prefill import DividedLines, Mixing, Room, compute, divide_lines, in_pieces, mix
from memphi.model.rotary import rotary_frequencies
from memphi.model.rows import Lines, Packing, Paging, Row, cut_lines, lay_out, pack
from memphi.model.upload import Staging


class PrefillInputs:
    """The numbers of a step of up to so many tokens, on the host and on the device, and its embeddings; and room for
    what attention between pieces reads and writes."""

    def __init__(self, model: LanguageModel, tokens: int, page_tokens: int) -> None:
        weight, lines = model.norm.weight, most_prefill_lines(tokens)
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
        self._attention = cast(DecoderLayer, model.layers[0]).attention
        mixed = tokens if is_in_pieces(tokens) else 0
        self._qkv = self.x.new_empty(mixed * sum(self._attention.widths))
        self._operand = self.x.new_empty(mixed * self._attention.out.width)

    def room(self, tokens: int, adapters: Collection[str]) -> Room:
        """For attention of a step of so many tokens under these adapters, the same of all layers."""
        (query, *_), out = self._attention.widths, self._attention.out
        qkv = self._qkv[: tokens * sum(self._attention.widths)].view(tokens, -1)
        if not adapters:
            return Room(qkv, None, self._operand[: tokens * query].view(tokens, -1))
        operand = self._operand[: tokens * out.width].view(tokens, -1)
        return Room(qkv, operand, out.x_of(operand))

    def packing(self, tokens: int, adapters: Collection[str], by_all: bool) -> Packing:
        """So many tokens of any rows, all of which are in lines where there are any."""
        device, lines = self.staging.device, prefill_lines(tokens)
        lined = Lines(
            new_tokens=PREFILL_LINE_TOKENS,
            tokens=device["line_tokens"][: lines * PREFILL_LINE_TOKENS],
            kept=device["kept"][:tokens],
            targets=self.targets[:tokens],
            lengths=device["line_lengths"][:lines],
            table=self.table[:lines],
        )
        places = device["token_pages"][:tokens], device["token_offsets"][:tokens]
        return Packing(
            rows=(),
            positions=device["positions"][:tokens],
            long=device["long"][:tokens],
            adapter_tokens=AdapterTokens({name: None if by_all else device[name][:tokens] for name in adapters}),
            whole=(),
            paging=Paging(*places, begun_pages=None, lines=(lined,) * bool(lines), continued=(), together=()),
        )

    def fill(self, rows: Sequence[Row], tokens: int) -> None:
        """Bring over a step of `tokens` tokens: these rows', and others that read and write nothing."""
        self.staging.wait()
        host, lines = self.staging.host, prefill_lines(tokens)
        host["token_pages"][:tokens] = -1
        host["line_lengths"][:lines] = 0
        for name in ("positions", "token_offsets", "kept"):
            host[name][:tokens] = 0
        host["line_tokens"][: lines * PREFILL_LINE_TOKENS] = 0
        width, n_lines = self._lay_out(rows, lines > 0) if rows else (0, 0)
        self.staging.send(0, self.staging.places["pages"][0] + 4 * n_lines * width)
        self.table[:n_lines, :width] = self.staging.device["pages"][: n_lines * width].view(n_lines, width)

    def _lay_out(self, rows: Sequence[Row], in_lines: bool) -> tuple[int, int]:
        """Write the rows' numbers; returns how many pages a line has at most, and how many lines there are."""
        laid = lay_out(rows)
        table, pages, offsets = laid.places(rows, self.page_tokens)
        self._write(
            positions=laid.positions,
            token_pages=pages,
            token_offsets=offsets,
            long=laid.long,
            **{name: laid.adapters == name for name in ADAPTERS},
        )
        if not in_lines:
            return 0, 0
        cut = cut_lines(range(len(rows)), laid, PREFILL_LINE_TOKENS)
        kept, lengths = cut.kept.nonzero()[0], cut.lengths
        self._write(kept=kept, line_tokens=cut.tokens, line_lengths=lengths, pages=table[cut.rows].ravel())
        return table.shape[1], len(cut.rows)

    def _write(self, **numbers: np.ndarray) -> None:
        for name, values in numbers.items():
            self.staging.host[name][: len(values)] = values


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
        self._packing = inputs.packing(tokens, adapters, by_all)
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


class PieceStep(PrefillStep):
    """The same of more tokens, in pieces that a CUDA graph each can hold, and attention after each but the last.

    Rows of many tokens are taken as a whole there, which in lines would take longer.
    """

    _rows: tuple[Packing, Sequence[DividedLines]] | None = None

    def fill(self, rows: Sequence[Row], embeddings: Tensor) -> None:
        super().fill(rows, embeddings)
        packing = pack(rows, self.states.device, self._inputs.page_tokens, in_lines=True)
        self._rows = packing, divide_lines(self._model, packing)

    def clear(self) -> None:
        super().clear()
        self._rows = None

    def pieces(self) -> Generator[Mixing, None, None]:
        """Compute a piece whenever it is asked for the next attention, and the last, with `states`, at the end."""
        packing, inputs = self._packing, self._inputs
        room = inputs.room(self._tokens, packing.adapter_tokens)
        states = yield from in_pieces(self._model, self.states, packing, self._pool, inputs.frequencies, room)
        self.states.copy_(states)

    def mix(self, mixing: Mixing) -> None:
        """Compute a layer's attention of the rows that were filled in."""
        if self._rows is not None:
            mix(mixing, *self._rows, self._pool)

    @torch.inference_mode()
    def run(self) -> Tensor:
        for mixing in self.pieces():
            self.mix(mixing)
        return self.states
