"""How the keys of a step are divided among programs.

Rows differ in length by orders of magnitude, and a CUDA graph fixes the number of programs. So the keys of all rows are
divided once a step into units of about the same size, as many as keep the device busy; in every layer a program takes
one unit and one head of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memphi.config import LanguageConfig
from memphi.model.kernels.launch import (
    TENSOR_CAPABILITY,
    Tile,
    capability,
    constexpr,
    jit,
    multiprocessors,
    power_of_two,
    tl,
)

UNIT_FIELDS = 8
"""Numbers of a unit: its row, or -1 where there is none; the first of its keys and their end; the row's first unit and
how many it has; the row's length; two that fill up."""
FEW_ROWS, SOME_ROWS = 16, 64
"""Up to FEW_ROWS units are small, since a step waits for what a program does one thing after another. Beyond them
units are as few as all run at once. Beyond SOME_ROWS codes go through one warp each."""


@dataclass(frozen=True)
class Tiling:
    """How many units there are, and how a program walks over its own."""

    programs: int
    """Units and heads of keys for each multiprocessor, were all rows one."""
    unit_tokens: int
    """Keys of a unit come in multiples of this."""
    tokens: int
    """Keys at once."""
    stages: int
    """Steps under way at once: to find the pages of a block is one, to read it another, so that of n about n / 2 blocks
    are being read."""
    warps: int
    registers: int | None
    """Of a thread at most."""
    early: bool
    """Whether a program reads its first keys before what computes the queries has ended."""
    parts: int = 32
    """What units found for each query, so much of it is put together at once."""


@dataclass(frozen=True)
class Division:
    """The keys of a step in units: tensors that stay where they are, for rows of equally many new tokens each."""

    lengths: Tensor
    """[rows] int32: tokens of each row, all the new ones included; 0 where a row only fills up a batch."""
    units: Tensor  # [units, UNIT_FIELDS] int32
    sums: Tensor  # [units, kv_heads, queries, head_dim] fp32: what a unit found, to be divided by its total
    weights: Tensor  # [units, kv_heads, queries, 2] fp32: the largest score of each query, and its total
    arrived: Tensor  # [rows, kv_heads] int32: units that have ended; zeros between launches
    new_tokens: int
    """Of every row."""
    tiling: Tiling


def choose_tiling(
    rows: int, new_tokens: int, dtype: torch.dtype, device: torch.device, *, fresh: bool, in_codes: bool = False
) -> Tiling:
    """The tiling for a card; small where there are no tensor cores for the numbers, since registers have to hold it.

    in_codes: keys and values are kept in 8 bits. The best that were measured on an H200.
    """
    if dtype == torch.float32 or capability(device) < TENSOR_CAPABILITY:
        return Tiling(programs=4, unit_tokens=64, tokens=16, stages=3, warps=8, registers=None, early=False)
    if not fresh:
        registers = 128 if new_tokens == 1 else None
        return Tiling(programs=4, unit_tokens=64, tokens=32, stages=5, warps=4, registers=registers, early=False)
    if in_codes and rows <= FEW_ROWS:
        return Tiling(programs=2, unit_tokens=128, tokens=128, stages=3, warps=4, registers=None, early=True, parts=64)
    if in_codes and rows > SOME_ROWS:
        return Tiling(programs=4, unit_tokens=64, tokens=32, stages=3, warps=1, registers=None, early=True, parts=64)
    if rows == 1:
        return Tiling(programs=3, unit_tokens=32, tokens=32, stages=3, warps=4, registers=None, early=True, parts=128)
    if rows <= FEW_ROWS:
        return Tiling(programs=4, unit_tokens=32, tokens=32, stages=3, warps=2, registers=None, early=True, parts=64)
    return Tiling(programs=2, unit_tokens=64, tokens=64, stages=3, warps=2, registers=None, early=True, parts=64)


def make_division(
    config: LanguageConfig, rows: int, new_tokens: int, tiling: Tiling, device: torch.device, units: int | None = None
) -> Division:
    """A division for `attend`, and with one new token a row for `attend_new`; all rows empty.

    units: where it is not `units_of` them.
    """
    units = units or units_of(tiling, rows, config.kv_heads, device)
    parts = (units, config.kv_heads, new_tokens * config.heads // config.kv_heads)
    return Division(
        lengths=torch.zeros(rows, dtype=torch.int32, device=device),
        units=torch.full((units, UNIT_FIELDS), -1, dtype=torch.int32, device=device),
        sums=torch.empty((*parts, config.head_dim), dtype=torch.float32, device=device),
        weights=torch.empty((*parts, 2), dtype=torch.float32, device=device),
        arrived=torch.zeros((rows, config.kv_heads), dtype=torch.int32, device=device),
        new_tokens=new_tokens,
        tiling=tiling,
    )


def units_of(tiling: Tiling, rows: int, kv_heads: int, device: torch.device) -> int:
    """Units of a division: as many as keep the device busy, and one for what is left of each row."""
    return max(1, tiling.programs * multiprocessors(device) // kv_heads) + rows


def plain_divide(division: Division) -> None:
    """Divide the rows' keys evenly, in whole blocks, among the units there are; the definition.

    Every row has a unit, if only an empty one.
    """
    rows, units, least = len(division.lengths), len(division.units), division.tiling.unit_tokens
    keys = division.lengths.long()
    most = _round_up(_ceil(keys.sum(), units - rows).clamp(min=1), least)
    shares = _round_up(_ceil(keys, _ceil(keys, most).clamp(min=1)).clamp(min=1), least)
    counts = _ceil(keys, shares).clamp(min=1)
    firsts = counts.cumsum(0) - counts
    unit_rows = torch.repeat_interleave(torch.arange(rows, device=keys.device), counts)
    begins = (torch.arange(len(unit_rows), device=keys.device) - firsts[unit_rows]) * shares[unit_rows]
    ends = torch.minimum(begins + shares[unit_rows], keys[unit_rows])
    columns = (unit_rows, begins, ends, firsts[unit_rows], counts[unit_rows], division.lengths[unit_rows])
    division.units.fill_(-1)
    division.units[: len(unit_rows), : len(columns)] = torch.stack(columns, dim=1).int()


def divide(division: Division) -> None:
    """As `plain_divide`, one program a row, once a step.

    Not launched dependently, and nor may be what comes next (`tabulate` is not): layers read the units without waiting.
    """
    rows, units = len(division.lengths), len(division.units)
    _divide[(rows,)](
        *(division.lengths, division.units, units),
        row_block=max(512, power_of_two(rows)),  # Hardly ever more than one form to compile.
        unit_block=32,
        fields=UNIT_FIELDS,
        least=division.tiling.unit_tokens,
        num_warps=1,
    )


def _ceil(numbers: Tensor, by: Tensor | int) -> Tensor:
    return (numbers + by - 1) // by


def _round_up(numbers: Tensor, to: int) -> Tensor:
    return _ceil(numbers, to) * to


@jit
def _divide(
    lengths: Tile,
    units: Tile,
    n_units: Tile,
    row_block: constexpr,
    unit_block: constexpr,
    fields: constexpr,
    least: constexpr,
) -> None:
    row, rows, numbers = tl.program_id(0), tl.num_programs(0), tl.arange(0, row_block)
    keys = tl.load(lengths + numbers, numbers < rows, other=0).to(tl.int32)
    most = tl.cdiv(tl.maximum(tl.cdiv(tl.sum(keys, 0), n_units - rows), 1), least) * least
    shares = tl.cdiv(tl.maximum(tl.cdiv(keys, tl.maximum(tl.cdiv(keys, most), 1)), 1), least) * least
    counts = tl.where(numbers < rows, tl.maximum(tl.cdiv(keys, shares), 1), 0)
    first = tl.sum(tl.where(numbers < row, counts, 0), 0)
    count = tl.sum(tl.where(numbers == row, counts, 0), 0)
    share = tl.sum(tl.where(numbers == row, shares, 0), 0)
    end = tl.sum(tl.where(numbers == row, keys, 0), 0)
    for start in range(0, count, unit_block):
        places = start + tl.arange(0, unit_block)
        inside = places < count
        at = units + (first + places) * fields
        tl.store(at, tl.zeros_like(places) + row, inside)
        tl.store(at + 1, places * share, inside)
        tl.store(at + 2, tl.minimum((places + 1) * share, end), inside)
        tl.store(at + 3, tl.zeros_like(places) + first, inside)
        tl.store(at + 4, tl.zeros_like(places) + count, inside)
        tl.store(at + 5, tl.zeros_like(places) + end, inside)
    if row == rows - 1:
        for start in range(first + count, n_units, unit_block):
            places = start + tl.arange(0, unit_block)
            tl.store(units + places * fields, tl.zeros_like(places) - 1, places < n_units)
