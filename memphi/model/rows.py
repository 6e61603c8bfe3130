"""How the packed tokens of one step divide into rows, and where their keys and values lie in a pool of pages.

A `Row` is integers, made by whoever plans a step; `Packing` is the same on a device, made once per forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memphi.memory.costs import (
    GATHER_TOKENS,
    LINE_TOKENS,
    MOST_LINED_TOKENS,
    RECURRING_TOKENS,
    divided,
    recurring,
)
from memphi.model.adapters import AdapterTokens
from memphi.model.kept import Kept
from memphi.model.upload import upload

Integers = NDArray[np.int64]


@dataclass  # Not frozen, though nobody changes it: one is made for every row of every step, three times as fast so.
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
class WholeRows:
    """Rows side by side without a past: all that they see is new."""

    tokens: slice
    """Their new tokens among the packed ones."""
    lengths: tuple[int, ...]
    bounds: Tensor  # [rows + 1] int32: each row's first token among these, then their number


@dataclass(frozen=True)
class ContinuedRows:
    """Rows side by side with a past, whose keys and values are copied out of the pool end to end."""

    tokens: slice
    """Their new tokens among the packed ones."""
    lengths: tuple[int, ...]
    bounds: Tensor  # [rows + 1] int32, as of whole rows
    key_lengths: tuple[int, ...]
    """Past and new tokens."""
    key_bounds: Tensor  # [rows + 1] int32: the same among the keys
    pages: Tensor  # [keys] int64
    offsets: Tensor  # [keys] int64: the place within the page

    def gather(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """Copy what the rows see: [keys, kv_heads, head_dim]."""
        return kept.read((self.pages, self.offsets), dtype)


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
class Lines:
    """Rows of few new tokens over their past, cut into lines of equally many for the kernel that walks the pages."""

    new_tokens: int
    """Of every line."""
    tokens: slice | Tensor
    """Each place's packed token, [lines * new_tokens]; places before a row's first repeat it. A slice where they
    stand side by side."""
    kept: Tensor | None  # [n] int64: the places that are not such; None: all
    targets: Tensor  # [n] int64: the packed tokens of the places that are kept
    lengths: Tensor  # [lines] int32: tokens of the row up to the line's last
    table: Tensor  # [lines, most pages] int32: the row's pages


@dataclass(frozen=True)
class Paging:
    """Where the rows' keys and values lie in a pool, and how to read them where no kernel walks the pages."""

    token_pages: Tensor  # [tokens] int64
    token_offsets: Tensor  # [tokens] int64: the place within the page
    begun_pages: Tensor | None  # [pages] int64: begun in this step and not filled by it
    lines: tuple[Lines, ...]
    """The rows that are left to a kernel; the others with a past are continued, or of one new token and together."""
    continued: tuple[ContinuedRows, ...]
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
    positions: Tensor  # [tokens] int64
    long: Tensor  # [tokens] bool
    adapter_tokens: AdapterTokens
    """The packed tokens of each adapter that some row uses: all, a slice where they stand side by side, or an index."""
    whole: tuple[WholeRows, ...]
    paging: Paging | None
    """None where rows are whole and kept nowhere."""

    @property
    def lengths(self) -> list[int]:
        return [row.tokens for row in self.rows]


def pack(rows: Sequence[Row], device: torch.device, page_tokens: int | None = None, in_lines: bool = False) -> Packing:
    """Lay rows end to end; page_tokens is that of the pool which the rows' pages name, None without one.

    With a pool a long row is two: what recurs of it, and the rest, which sees that in the pages. in_lines: rows of few
    new tokens over a past are left to the kernel that walks the pages.
    """
    if page_tokens is not None:
        rows = [part for row in rows for part in (_parts(row) if row.tokens > RECURRING_TOKENS else (row,))]
    laid = lay_out(rows)
    return Packing(
        rows=tuple(rows),
        positions=upload(laid.positions, device),
        long=upload(laid.long, device),
        adapter_tokens=AdapterTokens(
            {
                name: _tokens_of(laid.adapters == name, device)
                for name in sorted({row.adapter for row in rows if row.adapter})
            }
        ),
        whole=tuple(_whole(group, laid.bounds, device) for group in _divide_whole(rows)),
        paging=None if page_tokens is None else _page(rows, laid, page_tokens, device, in_lines),
    )


@dataclass(frozen=True)
class Laid:
    """Rows laid end to end, as numbers on the host."""

    bounds: Integers
    """[rows + 1]: each row's first packed token, then their number."""
    ends: Integers
    """[rows]: past and new tokens."""
    positions: Integers  # [tokens]
    long: NDArray[np.bool_]  # [tokens]
    adapters: NDArray[np.str_]  # [tokens]: "" for none

    def places(self, rows: Sequence[Row], page_tokens: int) -> tuple[Integers, Integers, Integers]:
        """The pages of each row [rows, most pages], and of each token the page and the place within it."""
        table = _page_table(rows, -(-self.ends // page_tokens))
        of_token = np.repeat(np.arange(len(rows)), np.diff(self.bounds))
        return table, table[of_token, self.positions // page_tokens], self.positions % page_tokens


def lay_out(rows: Sequence[Row]) -> Laid:
    """Lay rows end to end."""
    lengths, past = np.array([row.tokens for row in rows]), np.array([row.past for row in rows])
    bounds = np.concatenate(([0], lengths.cumsum()))
    return Laid(
        bounds,
        past + lengths,
        np.arange(bounds[-1]) + np.repeat(past - bounds[:-1], lengths),
        np.repeat(np.array([row.long for row in rows]), lengths),
        np.repeat(np.array([row.adapter or "" for row in rows]), lengths),
    )


def _tokens_of(uses: NDArray[np.bool_], device: torch.device) -> slice | Tensor | None:
    if uses.all():
        return None
    places = uses.nonzero()[0]
    if places[-1] - places[0] + 1 == len(places):
        return slice(int(places[0]), int(places[-1]) + 1)
    return upload(places, device)


def _page(rows: Sequence[Row], laid: Laid, page_tokens: int, device: torch.device, in_lines: bool) -> Paging:
    bounds, ends = laid.bounds, laid.ends
    counts = -(-ends // page_tokens)
    table, token_pages, token_offsets = laid.places(rows, page_tokens)
    begun = table[np.arange(len(rows)), counts - 1][_are_begun(rows, ends, page_tokens)]
    lined = {i for i, row in enumerate(rows) if in_lines and row.past and row.tokens <= MOST_LINED_TOKENS}
    single = [i for i, row in enumerate(rows) if row.past and row.tokens == 1 and i not in lined]
    groups = _divide(single, counts.tolist(), GATHER_TOKENS // page_tokens)
    alone = [i for i, row in enumerate(rows) if row.past and row.tokens > 1 and i not in lined]
    alone += [group[0] for group in groups if len(group) == 1]

    def place(numbers: NDArray[np.generic]) -> Tensor:
        return upload(numbers, device)

    return Paging(
        token_pages=place(token_pages),
        token_offsets=place(token_offsets),
        begun_pages=place(begun) if begun.size else None,
        lines=tuple(
            _line_up(group, laid, table, page_tokens, new_tokens, device)
            for new_tokens, group in (
                (1, [i for i in sorted(lined) if rows[i].tokens == 1]),
                (LINE_TOKENS, [i for i in sorted(lined) if rows[i].tokens > 1]),
            )
            if group
        ),
        continued=tuple(
            _continue(group, bounds, ends, table, page_tokens, device)
            for group in _divide_continued(sorted(alone), rows, GATHER_TOKENS)
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


def _whole(group: range, bounds: Integers, device: torch.device) -> WholeRows:
    own = bounds[group.start : group.stop + 1]
    return WholeRows(slice(int(own[0]), int(own[-1])), tuple(np.diff(own).tolist()), _as_bounds(own, device))


def _continue(
    group: range, bounds: Integers, ends: Integers, table: Integers, page_tokens: int, device: torch.device
) -> ContinuedRows:
    own, keys = bounds[group.start : group.stop + 1], ends[group.start : group.stop]
    key_bounds = np.concatenate(([0], keys.cumsum()))
    places = np.arange(key_bounds[-1]) - np.repeat(key_bounds[:-1], keys)
    return ContinuedRows(
        tokens=slice(int(own[0]), int(own[-1])),
        lengths=tuple(np.diff(own).tolist()),
        bounds=_as_bounds(own, device),
        key_lengths=tuple(keys.tolist()),
        key_bounds=_as_bounds(key_bounds, device),
        pages=upload(table[np.repeat(np.array(group), keys), places // page_tokens], device),
        offsets=upload(places % page_tokens, device),
    )


def _line_up(
    group: Sequence[int], laid: Laid, table: Integers, page_tokens: int, new_tokens: int, device: torch.device
) -> Lines:
    cut = cut_lines(group, laid, new_tokens)
    tokens, kept = cut.tokens, cut.kept

    def place(numbers: NDArray[np.generic]) -> Tensor:
        return upload(numbers, device)

    return Lines(
        new_tokens=new_tokens,
        tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if (np.diff(tokens) == 1).all() else place(tokens),
        kept=None if kept.all() else place(kept.nonzero()[0]),
        targets=place(tokens[kept]),
        lengths=place(cut.lengths.astype(np.int32)),
        table=place(table[cut.rows, : -(-cut.lengths.max() // page_tokens)].astype(np.int32)),
    )


@dataclass(frozen=True)
class Cut:
    """Rows cut into lines of equally many places, as numbers on the host."""

    rows: Integers  # [lines]: the row of each
    tokens: Integers  # [lines * new tokens]: each place's packed token, as in `Lines`
    kept: NDArray[np.bool_]  # [lines * new tokens]: the places that do not repeat another
    lengths: Integers  # [lines]: tokens of the row up to the line's last


def cut_lines(group: Sequence[int], laid: Laid, new_tokens: int) -> Cut:
    """Cut some of the rows into lines; those of a row end where it ends, so that only its first may begin before it."""
    bounds, ends = laid.bounds, laid.ends
    counts = -(-np.diff(bounds)[group] // new_tokens)
    of_line = np.repeat(np.array(group), counts)
    after = new_tokens * (np.repeat(counts.cumsum(), counts) - 1 - np.arange(len(of_line)))
    places = (bounds[of_line + 1] - after)[:, None] + np.arange(-new_tokens, 0)  # [lines, new_tokens]
    first = bounds[of_line, None]
    return Cut(of_line, np.maximum(places, first).ravel(), (places >= first).ravel(), ends[of_line] - after)


def _as_bounds(bounds: Integers, device: torch.device) -> Tensor:
    return upload((bounds - bounds[0]).astype(np.int32), device)


def _page_table(rows: Sequence[Row], counts: Integers) -> Integers:
    """The pages that each row needs: [rows, most pages]; a shorter row's last page, which is its own, fills up."""
    table = np.empty((len(rows), counts.max()), dtype=np.int64)
    for line, row, count in zip(table, rows, counts.tolist(), strict=True):
        assert len(row.pages) >= count, f"{len(row.pages)} pages cannot hold {row.past + row.tokens} tokens"
        line[:count] = row.pages[:count]
        line[count:] = row.pages[count - 1]
    return table


def _are_begun(rows: Sequence[Row], ends: Integers, page_tokens: int) -> NDArray[np.bool_]:
    """Whether each row begins its last page in this step and does not fill it."""
    past = np.array([row.past for row in rows])
    return (ends % page_tokens > 0) & (ends // page_tokens * page_tokens >= past)


def recurs(tokens: int) -> bool:
    """Whether a row of so many new tokens is long, and likely to come again: it stands alone."""
    return tokens > 0 and recurring(tokens) == tokens


def _parts(row: Row) -> list[Row]:
    return [replace(row, tokens=new, past=past) for new, past in divided([(row.tokens, row.past)])]


def _divide_whole(rows: Sequence[Row]) -> list[range]:
    """Rows without a past, as far as they stand side by side; those whose length recurs each alone."""
    groups: list[range] = []
    for i, row in enumerate(rows):
        if row.past:
            continue
        follows = groups and groups[-1].stop == i and not recurs(row.tokens) and not recurs(rows[i - 1].tokens)
        groups[-1:] = [range(groups[-1].start, i + 1)] if follows else [*groups[-1:], range(i, i + 1)]
    return groups


def _divide_continued(numbers: Sequence[int], rows: Sequence[Row], most_keys: int) -> list[range]:
    """Such rows as far as they stand side by side and have most_keys keys in all; a longer one, and one whose length
    recurs, goes alone."""
    groups: list[range] = []
    keys = 0
    for i in numbers:
        own = rows[i].past + rows[i].tokens
        keys += own
        beside = groups and groups[-1].stop == i and keys <= most_keys
        if beside and not recurs(rows[i].tokens) and not recurs(rows[i - 1].tokens):
            groups[-1] = range(groups[-1].start, i + 1)
        else:
            groups.append(range(i, i + 1))
            keys = own
    return groups


def _divide(rows: Sequence[int], counts: Sequence[int], most_pages: int) -> list[list[int]]:
    """Sort rows by their pages and group them so that a group, filled up to its longest row, has most_pages at most."""
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda i: counts[i]):
        if groups and (len(groups[-1]) + 1) * counts[row] <= most_pages:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
