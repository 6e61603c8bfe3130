"""How the packed tokens of one step divide into rows.

A `Row` is integers, made by whoever plans a step; `Packing` is the same on a device, made once per forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step."""

    tokens: int
    """New tokens, computed in this step."""
    past: int = 0
    """Tokens that the sequence's cache holds already."""
    adapter: str | None = None
    long: bool = False
    """Whether the long rope factors apply; one value for the whole life of a cache."""


@dataclass(frozen=True)
class Packing:
    """Rows laid end to end: the metadata that the decoder's layers share."""

    rows: tuple[Row, ...]
    bounds: Tensor  # [rows + 1] int32: the first packed token of each row, then the number of tokens
    positions: Tensor  # [tokens] int64
    long: Tensor  # [tokens] bool
    adapter_tokens: dict[str, Tensor | None]
    """For each adapter that some row uses: the packed tokens it applies to, or None where it applies to all."""

    @property
    def lengths(self) -> list[int]:
        return [row.tokens for row in self.rows]


def pack(rows: Sequence[Row], device: torch.device) -> Packing:
    """Lay rows end to end."""
    lengths = np.array([row.tokens for row in rows])
    bounds = np.concatenate(([0], lengths.cumsum()))
    shifts = np.array([row.past for row in rows]) - bounds[:-1]
    adapters = np.repeat(np.array([row.adapter or "" for row in rows]), lengths)
    return Packing(
        rows=tuple(rows),
        bounds=torch.from_numpy(bounds.astype(np.int32)).to(device),
        positions=torch.from_numpy(np.arange(bounds[-1]) + np.repeat(shifts, lengths)).to(device),
        long=torch.from_numpy(np.repeat(np.array([row.long for row in rows]), lengths)).to(device),
        adapter_tokens={
            name: _tokens_of(adapters == name, device) for name in sorted({row.adapter for row in rows if row.adapter})
        },
    )


def _tokens_of(uses: NDArray[np.bool_], device: torch.device) -> Tensor | None:
    return None if uses.all() else torch.from_numpy(uses.nonzero()[0]).to(device)
