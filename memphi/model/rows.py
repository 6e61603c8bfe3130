"""How the packed tokens of one step divide into rows.

Integers only, made by whoever plans a step; `Packing` is the same on a device, made once per forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    starts: tuple[int, ...]
    """First packed token of each row."""
    positions: Tensor  # [tokens] int64
    long: Tensor  # [tokens] bool
    adapter_tokens: dict[str, Tensor | None]
    """For each adapter that some row uses: the packed tokens it applies to, or None where it applies to all."""

    @property
    def last_tokens(self) -> list[int]:
        """The packed index of each row's last token."""
        return [start + row.tokens - 1 for start, row in zip(self.starts, self.rows, strict=True)]


def pack(rows: Sequence[Row], device: torch.device) -> Packing:
    """Lay rows end to end."""
    starts: list[int] = []
    positions: list[int] = []
    long: list[bool] = []
    adapters: list[str | None] = []
    for row in rows:
        starts.append(len(positions))
        positions.extend(range(row.past, row.past + row.tokens))
        long.extend([row.long] * row.tokens)
        adapters.extend([row.adapter] * row.tokens)
    return Packing(
        rows=tuple(rows),
        starts=tuple(starts),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        long=torch.tensor(long, dtype=torch.bool, device=device),
        adapter_tokens={name: _tokens_of(name, adapters, device) for name in sorted({a for a in adapters if a})},
    )


def _tokens_of(name: str, adapters: list[str | None], device: torch.device) -> Tensor | None:
    if all(adapter == name for adapter in adapters):
        return None
    return torch.tensor([i for i, adapter in enumerate(adapters) if adapter == name], dtype=torch.int64, device=device)
