"""How long products with weights in few bits take, beside the time that reading them would take, and beside bf16.

For each of the decoder's matrices and the head: what is chosen for so many rows, the kernel and what is for many rows,
with --sweep under every tiling too; under a CUDA graph, launched dependently, over copies that do not fit in the card's
cache. Limits are of the bytes of codes, scales and adapters' columns at the bandwidth of a large copy.
Usage: python -m benchmarks.quantised_products --out FILE [--schemes int4] [--rows 1,8] [--columns 256] [--sweep].
Without a GPU, TRITON_INTERPRET=1 tries it at small sizes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import product
from multiprocessing import get_context
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.launches import (
    LARGEST_ERROR,
    Sizes,
    copies_of,
    counts,
    error_of,
    find_device,
    make_parser,
    measure,
    measure_bandwidth,
)
from benchmarks.products import Matrix, matrices
from memphi.memory.costs import dequantised_numbers
from memphi.model.kernels import eight_bits, four_bits, skinny
from memphi.model.kernels.coded import VECTOR_ROWS, Columns
from memphi.model.kernels.parts import sum_up
from memphi.model.quant.weights import WEIGHTS, Fp8Weight, Int4Weight, Int8Weight, QuantisedWeight, multiply_by_blocks

MODULES: dict[str, ModuleType] = {"int8": eight_bits, "int4": four_bits, "fp8": eight_bits}
BYTE_BLOCKS = [
    *product((1, 2, 4), (2048,), (4, 8)),
    *product((2, 4, 8), (1024,), (2, 4, 8)),
    *product((2, 4, 8), (512,), (1, 2, 4)),
]
WORD_BLOCKS = [
    *product((1, 2, 4, 8), (128,), (1,)),
    *product((2, 4, 8), (256,), (2,)),
    *product((2, 4, 8), (512,), (4,)),
    (8, 128, 4),
]
"""Outputs, inputs or words, and warps of a program that sums number by number."""
BYTE_TILES = [*product((32, 64, 128), (128, 256), (3, 4, 5), (4, 8)), *product((256,), (128,), (3, 4), (4, 8))]
WORD_TILES = [
    *product((128,), (32, 64), (2, 3), (8, 16)),
    *product((128,), (32,), (2,), (4,)),
    *product((256,), (16, 32), (2, 3), (8, 16)),
]
"""Outputs, inputs or words, stages and warps of a program on tensor cores."""
PARTS = (1, 2, 3, 4, 5, 6, 8)
"""Into how many parts inputs are divided; nothing is compiled anew for that."""
OTHER_PARTS = tuple(f" {parts} parts" for parts in PARTS[2:])
"""Ways by these names are compiled with others."""
WORKERS = 12
"""Processes that compile what will be measured."""

Run = Callable[[Tensor, QuantisedWeight, Tensor, Columns | None], None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--schemes", default="int8,int4,fp8", help="separated by commas")
    parser.add_argument("--rows", type=counts, default="1,8,64,256", help="row counts, separated by commas")
    parser.add_argument("--columns", type=int, default=0, help="adapters' columns beside each weight but the head")
    parser.add_argument("--only", help="matrices to measure, by name, separated by commas")
    parser.add_argument("--sweep", action="store_true", help="try every tiling")
    options = parser.parse_args(arguments)
    device, sizes = find_device(parser)
    cases = [
        (scheme, matrix, rows)
        for scheme, rows in product(options.schemes.split(","), options.rows)
        for matrix in matrices(sizes, 0)
        if scheme == "int8" or matrix.name != "head"
        if not options.only or matrix.name in options.only.split(",")
    ]
    if device.type == "cuda":
        compile_ahead({(scheme, matrix.n_in, rows) for scheme, matrix, rows in cases}, options.columns, options.sweep)
    bandwidth = measure_bandwidth(device, sizes)
    print(f"copying: {bandwidth / 1e12:.2f} TB/s", flush=True)
    figures = []
    for scheme, matrix, rows in cases:
        columns = 0 if matrix.name == "head" else options.columns
        figures.append(measure_product(scheme, matrix, rows, columns, options.sweep, sizes, device, bandwidth))
        write_document(options.out, device, options.commit, {"bytes_per_second": bandwidth, "figures": figures})
    return 0 if all(figure["largest_relative_error"] < LARGEST_ERROR for figure in figures) else 1


def measure_product(
    scheme: str,
    matrix: Matrix,
    rows: int,
    columns: int,
    sweep: bool,
    sizes: Sizes,
    device: torch.device,
    bandwidth: float,
) -> dict[str, Any]:
    """Time of one product by every way, the best first, and of the same in bf16."""
    weight = random_weight(scheme, matrix.n_out, matrix.n_in, device)
    n_bytes = sum(buffer.nbytes for buffer in weight.buffers()) + matrix.n_out * (columns + 2 * bool(columns))
    weights = [weight, *(random_weight(scheme, matrix.n_out, matrix.n_in, device) for _ in copies_of(n_bytes, sizes))]
    make: Callable[..., Tensor] = partial(torch.randn, device=device, dtype=sizes.dtype)
    operand, out = make(rows, columns + matrix.n_in), make(rows, matrix.n_out)
    x = operand[:, columns:]
    beside = [random_columns(matrix.n_out, operand[:, :columns]) for _ in weights]
    expected, seconds, errors = torch.empty_like(out), dict[str, float](), dict[str, float]()
    MODULES[scheme].plain_multiply(x, *weight.buffers(), expected, beside[0])
    for name, run in ways(scheme, rows, sweep).items():
        try:
            out.zero_()
            run(x, weight, out, beside[0])
            errors[name] = error_of([out], [expected])
            launches = [partial(run, x, each, out, added) for each, added in zip(weights, beside, strict=True)]
            seconds[name] = measure(launches, device)
        except Exception as reason:  # A tiling that a card has no room for is no result.
            print(f"{scheme} {matrix.name}, {rows} rows, {name}: {type(reason).__name__}", flush=True)
    seconds["bf16"] = measure_bf16(x, matrix.n_out, matrix.n_in + columns, out, sizes, device)
    best = sorted(seconds, key=lambda name: seconds[name])
    limit = n_bytes / bandwidth
    told = ", ".join(f"{name} {seconds[name] * 1e6:.1f}" for name in best[:6])
    print(f"{scheme:4} {matrix.name:8} {rows:3} rows: limit {limit * 1e6:.1f} us; {told}; chosen "
          f"{seconds['chosen'] * 1e6:.1f}, bf16 {seconds['bf16'] * 1e6:.1f}", flush=True)  # fmt: skip
    return {
        "scheme": scheme,
        "matrix": matrix.name,
        "out": matrix.n_out,
        "in": matrix.n_in,
        "columns": columns,
        "rows": rows,
        "bytes": n_bytes,
        "limit_microseconds": round(limit * 1e6, 3),
        "largest_relative_error": max(errors.values(), default=0.0),
        "relative_errors": errors,
        "microseconds": {name: round(seconds[name] * 1e6, 3) for name in best},
    }


def measure_bf16(x: Tensor, n_out: int, n_in: int, out: Tensor, sizes: Sizes, device: torch.device) -> float:
    """The same in 16 bits, with adapters as columns of the same matrix."""
    copies = copies_of(n_out * n_in * sizes.dtype.itemsize, sizes)
    wide = torch.randn(len(x), n_in, device=device, dtype=sizes.dtype)
    weights = [torch.randn(n_out, n_in, device=device, dtype=sizes.dtype) for _ in copies]
    run = skinny.multiply if len(x) <= skinny.most_rows(device) else skinny.plain_multiply
    return measure([partial(run, wide, weight, out) for weight in weights], device)


def random_weight(scheme: str, n_out: int, n_in: int, device: torch.device) -> QuantisedWeight:
    """Codes as they fall, of numbers about as large as a trained weight's."""
    with device:
        weight = WEIGHTS[scheme](n_out, n_in)
        if isinstance(weight, Int4Weight):
            weight.codes.random_(0, 256)
            weight.affine[..., 0] = 0.2 / n_in**0.5
            weight.affine[..., 1].normal_(0, 0.1 / n_in**0.5)
        elif isinstance(weight, Fp8Weight):
            weight.codes.view(torch.uint8).random_(0, 120)
            weight.scale.uniform_(0.004 / n_in**0.5, 0.008 / n_in**0.5)
        else:
            assert isinstance(weight, Int8Weight)
            weight.codes.random_(-127, 128)
            weight.scale.uniform_(0.01 / n_in**0.5, 0.02 / n_in**0.5)
    weight.kernels = True
    return weight


def random_columns(n_out: int, t: Tensor) -> Columns | None:
    """Those of one adapter, for a t [rows, ranks] that stands beside x; None for no ranks."""
    if not t.shape[1]:
        return None
    with t.device:
        codes = torch.randint(-127, 128, (n_out, t.shape[1]), dtype=torch.int8)
        return Columns(codes, torch.full((1, n_out), 0.001, dtype=torch.bfloat16), (t,))


def ways(scheme: str, rows: int, sweep: bool) -> Mapping[str, Run]:
    """Ways to compute a product by name: the one that is chosen, each for few and for many rows, and every tiling."""
    module = MODULES[scheme]
    tried: dict[str, Run] = {"chosen": multiply, "kernel": partial(multiply_few, module), "many": multiply_many}
    if scheme == "fp8":
        tried["many slowly"] = multiply_slowly
    if sweep:
        tried |= tilings(module, rows)
    return tried


def tilings(module: ModuleType, rows: int) -> Iterator[tuple[str, Run]]:
    """Every tiling that such rows can take."""
    blocks, tiles = (WORD_BLOCKS, WORD_TILES) if module is four_bits else (BYTE_BLOCKS, BYTE_TILES)
    if rows <= VECTOR_ROWS:
        for block in blocks:
            if rows == 1 or rows * block[0] * block[1] <= 2 * module.SUMS * 32 * block[2]:
                yield "vector {}x{}, {} warps".format(*block), partial(with_block, module, block)
    if rows > 1:
        for tile, parts in product(tiles, PARTS):
            name = "tile {}x{}, {} stages, {} warps, {} parts".format(*tile, parts)
            yield name, partial(with_tile, module, tile, parts)


def multiply(x: Tensor, weight: QuantisedWeight, out: Tensor, columns: Columns | None) -> None:
    if weight.is_for_few(x):
        sum_up(weight.multiply_few(x, out, columns), out)
    else:
        multiply_many(x, weight, out, columns)


def multiply_few(module: ModuleType, x: Tensor, weight: QuantisedWeight, out: Tensor, columns: Columns | None) -> None:
    sum_up(module.multiply(x, *weight.buffers(), out, columns), out)


def multiply_many(x: Tensor, weight: QuantisedWeight, out: Tensor, columns: Columns | None) -> None:
    if columns is None:
        weight.multiply_many(x, out, dequantised_numbers(len(x)))
        return
    ranks, b = columns.ranks, Int8Weight(0, 0)
    b.codes, b.scale, b.kernels = columns.codes, columns.scale[0], True
    if weight.makes_blocks(x):
        operand = x.as_strided((len(x), ranks + x.shape[1]), x.stride(), x.storage_offset() - ranks)
        writers = [(b.write_block, slice(0, ranks)), (weight.write_block, slice(ranks, operand.shape[1]))]
        multiply_by_blocks(
            writers, [(operand, slice(0, operand.shape[1]), slice(0, len(x)))], out, dequantised_numbers(len(x))
        )
        return
    weight.multiply_many(x, out)
    wide = x.new_empty(columns.codes.shape)
    b.write_block(0, wide)
    out.addmm_(columns.t[0], wide.t())


def multiply_slowly(x: Tensor, weight: QuantisedWeight, out: Tensor, columns: Columns | None) -> None:
    """As `multiply_many`, where torch adds up all that it multiplies in fp32."""
    product = torch._scaled_mm

    def slowly(*factors: Any, **options: Any) -> Tensor:  # noqa: ANN401
        return product(*factors, **{**options, "use_fast_accum": False})

    with patch.object(torch, "_scaled_mm", slowly):
        multiply_many(x, weight, out, columns)


def with_block(
    module: ModuleType,
    block: tuple[int, int, int],
    x: Tensor,
    weight: QuantisedWeight,
    out: Tensor,
    columns: Columns | None,
) -> None:
    with (
        patch.object(module, "choose_block", lambda *_: block),
        patch.object(module, "vector_rows", lambda _: VECTOR_ROWS),
    ):
        multiply_few(module, x, weight, out, columns)


def with_tile(
    module: ModuleType,
    tile: tuple[int, int, int, int],
    parts: int,
    x: Tensor,
    weight: QuantisedWeight,
    out: Tensor,
    columns: Columns | None,
) -> None:
    with (
        patch.object(module, "choose_tile", lambda *_: tile),
        patch.object(module, "choose_parts", lambda *_: parts),
        patch.object(module, "vector_rows", lambda _: 0),
    ):
        multiply_few(module, x, weight, out, columns)


def compile_ahead(cases: set[tuple[str, int, int]], columns: int, sweep: bool) -> None:
    """Have processes compile all that will be measured, so that it lies in Triton's cache on disk."""
    jobs = [
        (scheme, n_in, rows, beside, name)
        for scheme, n_in, rows in sorted(cases)
        for beside in sorted({0, columns})
        for name in ways(scheme, rows, sweep)
        if name != "chosen" and not name.startswith("many") and not name.endswith(OTHER_PARTS)
    ]
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs, chunksize=max(1, len(jobs) // (4 * WORKERS))))


def compile_one(job: tuple[str, int, int, int, str]) -> None:
    """One way at a size that changes nothing of what is compiled."""
    scheme, n_in, rows, columns, name = job
    device, make = torch.device("cuda"), partial(torch.zeros, device="cuda", dtype=torch.bfloat16)
    weight = random_weight(scheme, 512, n_in, device)
    beside = random_columns(512, make(rows, columns))
    with suppress(Exception):  # Told when it is measured.
        ways(scheme, rows, sweep=True)[name](make(rows, n_in), weight, make(rows, 512), beside)


if __name__ == "__main__":
    sys.exit(main())
