"""How long products of a few rows with a weight take under many tilings, beside the time that reading it would take.

Every tiling of `memphi.model.kernels.skinny` and torch's own product, for each of the decoder's matrices, with and
without an adapter's columns; under a CUDA graph, launched dependently, over copies that do not fit in the card's cache.
Usage: python -m benchmarks.products --out FILE [--rows 1,8]. Without a GPU, TRITON_INTERPRET=1 tries it at small sizes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.launches import (
    LARGEST_ERROR,
    Launch,
    Sizes,
    copies_of,
    counts,
    error_of,
    find_device,
    make_parser,
    measure,
    measure_bandwidth,
)
from memphi.model.kernels import skinny

VECTOR_BLOCKS = [
    *product((1, 2, 4), (2048, 4096), (4, 8)),
    *product((2, 4, 8), (1024,), (2, 4, 8)),
    *product((4, 8, 16), (512,), (4, 8)),
    *product((16, 32), (256,), (4, 8)),
]
"""Outputs and inputs of a program, and its warps."""
TILES = [*product((16, 32, 64, 128), (64, 128, 256), (3, 5), (4, 8))]
"""The same, with stages before the warps."""


@dataclass(frozen=True)
class Matrix:
    """A weight of the decoder, with the columns of adapters that may stand beside it."""

    name: str
    n_out: int
    n_in: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=counts, default="1,2,4,8,16,32,64", help="row counts, separated by commas")
    parser.add_argument(
        "--columns", type=counts, default="0,256", help="columns of adapters beside each weight, as --rows"
    )
    options = parser.parse_args(arguments)
    device, sizes = find_device(parser)
    bandwidth = measure_bandwidth(device, sizes)
    figures = []
    for rows, columns in product(options.rows, options.columns):
        for matrix in matrices(sizes, columns):
            figures.append(measure_matrix(matrix, rows, sizes, device, bandwidth))
            write_document(options.out, device, options.commit, {"bytes_per_second": bandwidth, "figures": figures})
    return 0 if all(figure["largest_relative_error"] < LARGEST_ERROR for figure in figures) else 1


def matrices(sizes: Sizes, columns: int) -> Iterator[Matrix]:
    """The weights of a layer, and the head, which no adapter adapts."""
    config = sizes.config
    hidden, inner = config.hidden_size, config.intermediate_size
    yield Matrix("qkv", (config.heads + 2 * config.kv_heads) * config.head_dim, hidden + columns)
    yield Matrix("out", hidden, config.heads * config.head_dim + columns)
    yield Matrix("gate_up", 2 * inner, hidden + columns)
    yield Matrix("down", hidden, inner + columns)
    if not columns:
        yield Matrix("head", config.vocab_size, hidden)


def measure_matrix(matrix: Matrix, rows: int, sizes: Sizes, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """Time of one product under every tiling that such rows can take, the best first."""
    n_bytes = matrix.n_out * matrix.n_in * sizes.dtype.itemsize
    make = partial(torch.randn, device=device, dtype=sizes.dtype)
    weights = [make(matrix.n_out, matrix.n_in) / matrix.n_in**0.5 for _ in copies_of(n_bytes, sizes)]
    x, out = make(rows, matrix.n_in), make(rows, matrix.n_out)
    skinny.plain_multiply(x, weights[0], out)
    expected, seconds, errors = out.clone(), dict[str, float](), [0.0]
    for name, run in ways(rows, device).items():
        try:
            out.zero_()
            run(x, weights[0], out)
            errors.append(error_of([out], [expected]))
            seconds[name] = measure(launches(run, x, weights, out), device)
        except Exception as reason:  # A tiling that a card has no room for is no result.
            print(f"{matrix.name}, {rows} rows, {name}: {type(reason).__name__}", flush=True)
    best = sorted(seconds, key=lambda name: seconds[name])
    limit = n_bytes / bandwidth
    told = ", ".join(f"{name} {seconds[name] * 1e6:.1f}" for name in best[:4])
    print(f"{matrix.name:8} {matrix.n_in:5} in, {rows:3} rows: limit {limit * 1e6:.1f} us; {told}; torch "
          f"{seconds['torch'] * 1e6:.1f}, chosen {seconds['chosen'] * 1e6:.1f}", flush=True)  # fmt: skip
    return {
        "matrix": matrix.name,
        "out": matrix.n_out,
        "in": matrix.n_in,
        "rows": rows,
        "bytes": n_bytes,
        "limit_microseconds": round(limit * 1e6, 3),
        "largest_relative_error": max(errors),
        "microseconds": {name: round(seconds[name] * 1e6, 3) for name in best},
    }


def launches(
    run: Callable[[Tensor, Tensor, Tensor], None], x: Tensor, weights: Sequence[Tensor], out: Tensor
) -> list[Launch]:
    return [partial(run, x, weight, out) for weight in weights]


def ways(rows: int, device: torch.device) -> Mapping[str, Callable[[Tensor, Tensor, Tensor], None]]:
    """Ways to compute a product by name: torch's, the one that is chosen, and every tiling."""
    tried: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"torch": skinny.plain_multiply}
    tried["chosen"] = skinny.multiply if rows <= skinny.most_rows(device) else skinny.plain_multiply
    if rows <= skinny.VECTOR_ROWS:
        for block in VECTOR_BLOCKS:
            if rows * block[0] * block[1] <= 2 * skinny.SUMS * 32 * block[2]:
                tried["vector {}x{}, {} warps".format(*block)] = partial(with_block, block)
    if rows > 1:
        for tile in TILES:
            tried["tile {}x{}, {} stages, {} warps".format(*tile)] = partial(with_tile, tile)
    return tried


def with_block(block: tuple[int, int, int], x: Tensor, weight: Tensor, out: Tensor) -> None:
    with patch.object(skinny, "choose_block", lambda *_: block), patch.object(skinny, "vector_rows", lambda _: 4):
        skinny.multiply(x, weight, out)


def with_tile(tile: tuple[int, int, int, int], x: Tensor, weight: Tensor, out: Tensor) -> None:
    with patch.object(skinny, "choose_tile", lambda *_: tile), patch.object(skinny, "vector_rows", lambda _: 0):
        skinny.multiply(x, weight, out)


if __name__ == "__main__":
    sys.exit(main())
