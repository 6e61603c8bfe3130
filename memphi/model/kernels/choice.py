"""The likeliest id of each row: what a greedy request chooses, without its scores ever leaving the step."""

from __future__ import annotations

import torch
from torch import Tensor

from memphi.model.kernels.launch import Tile, constexpr, jit, launch_options, power_of_two, tl

BLOCK, WARPS = 2048, 4
"""Scores that one program looks at, and its warps."""


def pieces_of(vocab_size: int) -> int:
    """Into how many pieces a row's scores are cut, the best of each of which is found first."""
    return -(-vocab_size // BLOCK)


def plain_choose(logits: Tensor, forbidden: Tensor, lengths: Tensor, chosen: Tensor) -> None:
    """chosen = the id with the largest score, the first of equals; the definition.

    logits [rows, vocab_size], each row contiguous; forbidden [vocab_size] bool is True for ids that are never chosen;
    lengths [rows]: a row of length 0 only fills up a step, and what is in its place stays; chosen [rows] int64. NaN is
    as large as infinity.
    """
    scores = logits.float().masked_fill(forbidden, float("-inf"))
    ids = scores.masked_fill(scores.isnan(), float("inf")).argmax(-1)
    chosen.copy_(torch.where(lengths > 0, ids, chosen))


def choose(logits: Tensor, forbidden: Tensor, lengths: Tensor, best: Tensor, places: Tensor, chosen: Tensor) -> None:
    """As `plain_choose`, one program for each piece of a row and then one for each row.

    best [rows, pieces] fp32 and places [rows, pieces] int32 are room for what the first found.
    """
    (rows, size), pieces, options = logits.shape, best.shape[1], launch_options(logits.device)
    _find[(rows, pieces)](
        *(logits, forbidden, best, places, logits.stride(0), pieces),
        size=size,
        block=BLOCK,
        num_warps=WARPS,
        **options,
    )
    _choose[(rows,)](*(best, places, lengths, chosen, pieces), block=power_of_two(pieces), num_warps=1, **options)


@jit
def _find(
    logits: Tile,
    forbidden: Tile,
    best: Tile,
    places: Tile,
    logits_stride: Tile,
    pieces: Tile,
    size: constexpr,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = piece * block + tl.arange(0, block)
    inside = columns < size
    never = tl.load(forbidden + columns, inside, other=1) != 0
    if dependent:
        tl.extra.cuda.gdc_wait()
    scores = tl.load(logits + row * logits_stride + columns, inside, other=0).to(tl.float32)
    scores = tl.where(scores == scores, scores, float("inf"))  # NaN
    scores = tl.where(never, float("-inf"), scores)
    score, place = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row * pieces + piece, score)
    tl.store(places + row * pieces + piece, piece * block + place)


@jit
def _choose(
    best: Tile,
    places: Tile,
    lengths: Tile,
    chosen: Tile,
    pieces: Tile,
    block: constexpr,
    dependent: constexpr,
) -> None:
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()
    row, numbers = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    length = tl.load(lengths + row)
    if dependent:
        tl.extra.cuda.gdc_wait()
    scores = tl.load(best + row * pieces + numbers, numbers < pieces, other=float("-inf"))
    _, piece = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(chosen + row, tl.load(places + row * pieces + piece).to(tl.int64), length > 0)
