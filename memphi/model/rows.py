"""How the packed tokens of one step divide into rows, and where their keys and values lie in a pool of pages.

A `Row` is integers, made by whoever plans a step; `Packing` is the same on a device, made once per forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memphi.model.adapters import AdapterTokens
from memphi.model.kept import Kept

GATHER_TOKENS = 32768
"""Tokens whose keys and values are copied out of a pool at once for rows of one new token; a longer row goes alone."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step."""

    tokens: int
    """New tokens, computed in this step."""
    past: int = 0
    """Tokens that the sequence's pages hold already."""
    adapter: str | None = None
    long: bool = False
    """Whether the long rope factors apply; one value for the whole life of a cache."""
    pages: tuple[int, ...] = ()
    """The pages of the past and the new tokens, in order, perhaps more; used only where there is a pool."""


@dataclass(frozen=True)
class GatheredRow:
    """A row with a past whose keys and values are copied out of the pool by themselves."""

    tokens: slice
    """The row's new tokens among the packed ones."""
    keys: int
    """Past and new tokens."""
    pages: Tensor  # [pages] int64

    def gather(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """Copy what the row sees: [keys, kv_heads, head_dim]."""
        return kept.read(self.pages, dtype).flatten(0, 1)[: self.keys]


@dataclass(frozen=True)
class GatheredRows:
    """Rows of one new token each whose keys and values are copied out of the pool side by side."""

    tokens: Tensor  # [rows] int64: each row's packed token
    pages: Tensor  # [rows, most pages] int64; shorter rows repeat their last page
    seen: Tensor  # [rows, most pages * page_tokens] bool

    def gather(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """Copy what the rows see: [rows, most pages * page_tokens, kv_heads, head_dim]."""
        return kept.read(self.pages, dtype).flatten(1, 2)


@dataclass(frozen=True)
class Paging:
    """Where the rows' keys and values lie in a pool, and how to read them where no kernel walks the pages."""

    table: Tensor  # [rows, most pages] int32; shorter rows repeat their last page
    token_pages: Tensor  # [tokens] int64
    token_offsets: Tensor  # [tokens] int64: the place within the page
    begun_pages: Tensor | None  # [pages] int64: begun in this step and not filled by it
    whole: tuple[slice, ...]
    """The packed tokens of each row without a past: all its keys and values are new."""
    alone: tuple[GatheredRow, ...]
    together: tuple[GatheredRows, ...]

    def write(self, kept: Kept, new: Tensor) -> Tensor:
        """Put the new tokens' [tokens, kv_heads, head_dim] into a layer's pages; returns them as they will be read.

        A page's tokens after its row's end are zeros: what an earlier owner left could be NaN, which no mask hides.
        """
        if self.begun_pages is not None:
            kept.clear(self.begun_pages)
        return kept.write(self.token_pages, self.token_offsets, new)


@dataclass(frozen=True)
class Packing:
    """Rows laid end to end: the metadata that the decoder's layers share."""

    rows: tuple[Row, ...]
    bounds: Tensor  # [rows + 1] int32: the first packed token of each row, then the number of tokens
    positions: Tensor  # [tokens] int64
    long: Tensor  # [tokens] bool
    adapter_tokens: AdapterTokens
    """The packed tokens of each adapter that some row uses: all, a slice where they stand side by side, or an index."""
    paging: Paging | None
    """None where rows are whole and kept nowhere."""

    @property
    def lengths(self) -> list[int]:
        return [row.tokens for row in self.rows]


def pack(rows: Sequence[Row], device: torch.device, page_tokens: int | None = None) -> Packing:
    """Lay rows end to end; page_tokens is that of the pool which the rows' pages name, None without one."""
    lengths = np.array([row.tokens for row in rows])
    bounds = np.concatenate(([0], lengths.cumsum()))
    shifts = np.array([row.past for row in rows]) - bounds[:-1]
    positions = np.arange(bounds[-1]) + np.repeat(shifts, lengths)
    adapters = np.repeat(np.array([row.adapter or "" for row in rows]), lengths)
    return Packing(
        rows=tuple(rows),
        bounds=torch.from_numpy(bounds.astype(np.int32)).to(device),
        positions=torch.from_numpy(positions).to(device),
        long=torch.from_numpy(np.repeat(np.array([row.long for row in rows]), lengths)).to(device),
        adapter_tokens={
            name: _tokens_of(adapters == name, device) for name in sorted({row.adapter for row in rows if row.adapter})
        },
        paging=None if page_tokens is None else _page(rows, bounds, positions, page_tokens, device),
    )


def _tokens_of(uses: NDArray[np.bool_], device: torch.device) -> slice | Tensor | None:
    if uses.all():
        return None
    places = uses.nonzero()[0]
    if places[-1] - places[0] + 1 == len(places):
        return slice(int(places[0]), int(places[-1]) + 1)
    return torch.from_numpy(places).to(device)


def _page(rows: Sequence[Row], bounds: Integers, positions: Integers, page_tokens: int, device: torch.device) -> Paging:
    ends = np.array([row.past + row.tokens for row in rows])
    counts = -(-ends // page_tokens)
    table = _page_table(rows, counts)
    of_token = np.repeat(np.arange(len(rows)), np.diff(bounds))
    begun = table[np.arange(len(rows)), counts - 1][_are_begun(rows, ends, page_tokens)]
    single = [i for i, row in enumerate(rows) if row.past and row.tokens == 1]
    groups = _divide(single, counts.tolist(), GATHER_TOKENS // page_tokens)
    alone = [i for i, row in enumerate(rows) if row.past and row.tokens > 1] + [g[0] for g in groups if len(g) == 1]

    def place(numbers: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(numbers).to(device)

    return Paging(
        table=place(table.astype(np.int32)),
        token_pages=place(table[of_token, positions // page_tokens]),
        token_offsets=place(positions % page_tokens),
        begun_pages=place(begun) if begun.size else None,
        whole=tuple(slice(bounds[i], bounds[i + 1]) for i, row in enumerate(rows) if not row.past),
        alone=tuple(
            GatheredRow(slice(bounds[i], bounds[i + 1]), int(ends[i]), place(table[i, : counts[i]])) for i in alone
        ),
        together=tuple(
            GatheredRows(
                tokens=place(bounds[group]),
                pages=place(table[group, : counts[group].max()]),
                seen=place(np.arange(counts[group].max() * page_tokens) < ends[group, None]),
            )
            for group in groups
            if len(group) > 1
        ),
    )


def _page_table(rows: Sequence[Row], counts: Integers) -> Integers:
    """The pages that each row needs: [rows, most pages]; a shorter row's last page, which is its own, fills up."""
    table = np.empty((len(rows), counts.max()), dtype=np.int64)
    for line, row, count in zip(table, rows, counts, strict=True):
        assert len(row.pages) >= count, f"{len(row.pages)} pages cannot hold {row.past + row.tokens} tokens"
        line[:count] = row.pages[:count]
        line[count:] = row.pages[count - 1]
    return table


def _are_begun(rows: Sequence[Row], ends: Integers, page_tokens: int) -> NDArray[np.bool_]:
    """Whether each row begins its last page in this step and does not fill it."""
    past = np.array([row.past for row in rows])
    return (ends % page_tokens > 0) & (ends // page_tokens * page_tokens >= past)


def _divide(rows: Sequence[int], counts: Sequence[int], most_pages: int) -> list[list[int]]:
    """Sort rows by their pages and group them so that a group, filled up to its longest row, has most_pages at most."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: counts[i]):
        if groups and (len(groups[-1]) + 1) * counts[row] <= most_pages:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
