"""How long each of the decoder's kernels takes, beside the time that the bytes it moves would take.

Every kernel is compared with its definition first. Then it runs under a CUDA graph, launch after launch, over copies of
its tensors that together do not fit in the card's cache. Attention is tried under several tilings; the small kernels of
a layer also as a chain, launched dependently and not.
Usage: python -m benchmarks.kernels --out FILE. Without a GPU, TRITON_INTERPRET=1 tries all of it at small sizes.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.launches import (
    LARGEST_ERROR,
    TILINGS,
    Launch,
    Sizes,
    copies_of,
    error_of,
    find_device,
    make_parser,
    measure,
    measure_bandwidth,
)
from benchmarks.scenes import PAGE_TOKENS, Scene, choose, layer_of, make_pool, make_scene, qkv_width, table_of
from memphi.cache.pool import CODE_DTYPES
from memphi.memory.costs import SCALE_BYTES
from memphi.model.kept import quantise
from memphi.model.kernels import (
    choice,
    codes,
    dequantise,
    division,
    gate,
    launch,
    narrow,
    norm,
    paged,
    rotary,
    shares,
    skinny,
)
from memphi.model.kernels.coded import Columns
from memphi.model.kernels.division import Division, Tiling
from memphi.model.rotary import rotary_frequencies

MOST_SCORED_ROWS = 256
NARROW_TILES = [
    *product((16,), (16,), (64, 128), (2, 3), (4, 8)),
    *product((16,), (16,), (64, 128), (2,), (16,)),
    *product((16,), (8, 32), (64, 128), (3,), (8,)),
    *product((32,), (16,), (64, 128), (2,), (4, 8)),
    (64, 16, 64, 2, 8),
]
"""Rows, outputs and inputs of a warp of a program that multiplies by an adapter's A, its stages and warps."""
LARGE_NARROW_TILES = [
    (128, 64, 64, 4, 4),
    (128, 128, 64, 3, 8),
    (128, 128, 64, 5, 8),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
]
"""The same for many rows, with the inputs of all warps."""
ADDED_TILES = [(128, 64, 64, 3, 4), (128, 128, 64, 3, 8), (128, 256, 64, 3, 8), (64, 128, 64, 4, 4), (64, 64, 64, 3, 4)]
"""Rows, outputs, columns, stages and warps of a program that adds adapters to a product."""


@dataclass(frozen=True)
class Case:
    """A kernel at one size: a launch for each copy of its tensors, of the kernel as of other ways to do it."""

    kernel: str
    size: str
    n_bytes: int
    error: float
    """How far the kernel is from its definition, relative to what that says."""
    launches: Mapping[str, Sequence[Launch]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="kernels to measure, by name, separated by commas")
    options = parser.parse_args(arguments)
    device, sizes = find_device(parser)
    bandwidth = measure_bandwidth(device, sizes)
    print(f"copying: {bandwidth / 1e12:.2f} TB/s", flush=True)
    figures = [
        measure_case(case, bandwidth, device)
        for name, cases in CASES.items()
        if not options.only or name in options.only.split(",")
        for case in cases(sizes, device)
    ]
    write_document(options.out, device, options.commit, {"bytes_per_second": round(bandwidth), "figures": figures})
    return 0 if all(figure["relative_error"] < LARGEST_ERROR for figure in figures) else 1


def measure_case(case: Case, bandwidth: float, device: torch.device) -> dict[str, Any]:
    seconds = {name: measure(launches, device) for name, launches in case.launches.items()}
    limit = case.n_bytes / bandwidth
    print(f"{case.kernel:16} {case.size:18} error {case.error:.1e}, limit {limit * 1e6:7.2f} us", flush=True)
    for name, taken in seconds.items():
        print(f"    {name:28} {taken * 1e6:8.2f} us  {case.n_bytes / taken / 1e12:5.2f} TB/s", flush=True)
    return {
        "kernel": case.kernel,
        "size": case.size,
        "bytes": case.n_bytes,
        "relative_error": case.error,
        "limit_microseconds": round(limit * 1e6, 3),
        "microseconds": {name: round(taken * 1e6, 3) for name, taken in seconds.items()},
    }


@contextmanager
def independently() -> Iterator[None]:
    """Launches in here are not dependent, whatever the card."""
    with patch.object(launch, "capability", lambda device: (8, 0)):
        launch.launch_options.cache_clear()
        yield
    launch.launch_options.cache_clear()


# --- kernels that know no past ---------------------------------------------------------------------------------------


def norm_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width, eps = sizes.config.hidden_size, sizes.config.norm_eps
    for rows in sizes.rows:
        make = partial(torch.randn, device=device, dtype=sizes.dtype)
        n_bytes = (4 * rows + 1) * width * sizes.dtype.itemsize
        sets = [(make(rows, width), make(rows, width), make(width)) for _ in copies_of(n_bytes, sizes)]
        found, expected = torch.empty_like(sets[0][0]), torch.empty_like(sets[0][0])
        x, delta, weight = sets[0]
        norm.plain_add_norm(x.clone(), delta, weight, eps, expected)
        norm.add_norm(x.clone(), delta, weight, eps, found)
        error = error_of([found], [expected])

        def launches(run: Callable[..., None], sets: list[Any] = sets, out: Tensor = found) -> list[Launch]:
            # What is added is nothing, or the sums would grow from replay to replay.
            return [partial(run, x, delta.zero_(), weight, eps, out) for x, delta, weight in sets]

        yield Case(
            "add_norm",
            f"{rows} rows",
            n_bytes,
            error,
            {
                "plain": launches(norm.plain_add_norm),
                **{
                    f"{warps} warps": launches(partial(with_constant, norm, "WARPS", warps, norm.add_norm))
                    for warps in (4, 8, 16)
                },
            },
        )


def with_constant(module: Any, name: str, value: Any, run: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
    """Run a kernel as if a constant of its module had another value."""
    with patch.object(module, name, value):
        run(*arguments)


def gate_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width = sizes.config.intermediate_size
    for rows in sizes.rows:
        n_bytes = 3 * rows * width * sizes.dtype.itemsize
        sets = [torch.randn(rows, 2 * width, device=device, dtype=sizes.dtype) for _ in copies_of(n_bytes, sizes)]
        found, expected = (torch.empty(rows, width, device=device, dtype=sizes.dtype) for _ in range(2))
        gate.plain_gate(sets[0], expected)
        gate.gate(sets[0], found)
        yield Case(
            "gate",
            f"{rows} rows",
            n_bytes,
            error_of([found], [expected]),
            {
                "plain": [partial(gate.plain_gate, wide, found) for wide in sets],
                **{
                    f"{block} a program": [
                        partial(with_constant, gate, "BLOCK", block, gate.gate, wide, found) for wide in sets
                    ]
                    for block in (512, 1024, 2048)
                },
            },
        )


def choice_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    vocabulary, pieces = sizes.config.vocab_size, choice.pieces_of(sizes.config.vocab_size)
    forbidden = torch.arange(vocabulary, device=device) % 7 == 0
    for rows in sizes.rows:
        if rows > MOST_SCORED_ROWS:
            continue
        n_bytes = rows * vocabulary * sizes.dtype.itemsize
        sets = [torch.randn(rows, vocabulary, device=device, dtype=sizes.dtype) for _ in copies_of(n_bytes, sizes)]
        lengths = torch.ones(rows, dtype=torch.int32, device=device)
        best, places = (torch.empty(rows, pieces, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32))
        found, expected = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        choice.plain_choose(sets[0], forbidden, lengths, expected)
        choice.choose(sets[0], forbidden, lengths, best, places, found)
        yield Case(
            "choose",
            f"{rows} rows",
            n_bytes,
            error_of([found], [expected]),
            {
                "plain": [partial(choice.plain_choose, logits, forbidden, lengths, found) for logits in sets],
                "kernel": [partial(choice.choose, logits, forbidden, lengths, best, places, found) for logits in sets],
            },
        )


def rotary_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    config, itemsize = sizes.config, sizes.dtype.itemsize
    frequencies = rotary_frequencies(config, device)
    for rows in sizes.rows:
        positions = torch.randint(0, config.max_tokens, (rows,), device=device)
        long = positions > config.short_tokens
        expected, found = (table_of(rows, sizes, device) for _ in range(2))
        turn = (positions, long, frequencies, config.rope_scale)
        rotary.plain_tabulate(*turn, *expected)
        rotary.tabulate(*turn, *found)
        yield Case(
            "tabulate",
            f"{rows} rows",
            4 * rows * config.rotary_dim * itemsize,
            error_of(found, expected),
            {
                "plain": [partial(rotary.plain_tabulate, *turn, *found)],
                "kernel": [partial(rotary.tabulate, *turn, *found)],
            },
        )
        yield keeping_case(rows, found, sizes, device)


def keeping_case(rows: int, table: tuple[Tensor, Tensor], sizes: Sizes, device: torch.device) -> Case:
    """Tokens of one row over pages out of order, as in prefill."""
    config = sizes.config
    pages = -(-rows // PAGE_TOKENS)
    turned = rows * (config.heads + config.kv_heads) * config.rotary_dim
    n_bytes = 2 * (turned + rows * 2 * config.kv_heads * config.head_dim) * sizes.dtype.itemsize
    copies = copies_of(n_bytes, sizes)
    pool, order = make_pool(pages, len(copies), sizes, device), torch.randperm(pages, device=device)
    tokens = torch.arange(rows, device=device)
    places = (order[tokens // PAGE_TOKENS], tokens % PAGE_TOKENS)
    sets = [torch.randn(rows, qkv_width(config), device=device, dtype=sizes.dtype) for _ in copies]
    expected, found = sets[0].clone(), sets[0].clone()
    rotary.plain_rotate_and_keep(expected, *table, *layer_of(pool, 0), *places)
    kept = pool[:, 0].clone()
    run = rotary.rotate_and_keep
    run(found, *table, *layer_of(pool, 0), *places)
    error = error_of([found, pool[:, 0]], [expected, kept])
    return Case(
        "rotate_and_keep",
        f"{rows} rows",
        n_bytes,
        error,
        {
            "kernel": [partial(run, qkv, *table, *layer_of(pool, i), *places) for i, qkv in enumerate(sets)],
        },
    )


# --- adapters --------------------------------------------------------------------------------------------------------


def narrow_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """What adapters make of x: a third of the rows under none, then as many under the one, then under the other."""
    for rows in sizes.rows:
        for n_in in (sizes.config.hidden_size, sizes.config.intermediate_size):
            for is_coded in (False, True) if rows <= narrow.MOST_ROWS else (True,):
                yield narrow_case(rows, n_in, is_coded, sizes, device)


def narrow_case(rows: int, n_in: int, is_coded: bool, sizes: Sizes, device: torch.device) -> Case:
    make, border, n_out = partial(torch.randn, device=device, dtype=sizes.dtype), sizes.ranks[0], sum(sizes.ranks)
    n_bytes = n_out * n_in * (1 if is_coded else sizes.dtype.itemsize) + rows * (n_in + n_out) * sizes.dtype.itemsize
    thirds = torch.arange(rows, device=device) * 3 // rows
    sets = []
    for _ in copies_of(n_bytes, sizes):
        a, operand, scale = make(n_out, n_in) / n_in**0.5, make(rows, n_in + n_out), None
        if is_coded:
            a = (a * n_in**0.5 * 32).to(torch.int8)
            scale = torch.full((n_out,), 1 / (32 * n_in**0.5), device=device, dtype=torch.bfloat16)
        scales = (None, None) if scale is None else scale.split([border, n_out - border])
        first = narrow.Narrow(a[:border], 2.0, thirds == 1, operand[:, :border], scales[0])
        second = narrow.Narrow(a[border:], 1.0, thirds == 2, operand[:, border + n_in :], scales[1])
        sets.append((operand[:, border : border + n_in], [first, second]))
    found = []
    for run in (narrow.plain_narrow, narrow.narrow):
        run(*sets[0])
        found.append([part.t.clone() for part in sets[0][1]])

    def launches(run: Callable[..., None]) -> list[Launch]:
        return [partial(run, x, parts) for x, parts in sets]

    def wide_first(x: Tensor, parts: Sequence[narrow.Narrow], run: Callable[..., None]) -> None:
        """With both As, which follow each other, made 16 bits before, as packed adapters are."""
        first, wide = parts[0], x.new_empty(n_out, n_in)
        assert first.a_scale is not None
        codes, scale = first.a.as_strided(wide.shape, wide.stride()), first.a_scale.as_strided((n_out,), (1,))
        dequantise.dequantise(codes, scale, wide)
        parts = [replace(part, a=a, a_scale=None) for part, a in zip(parts, wide.split(sizes.ranks), strict=True)]
        run(x, parts)

    def by_spans(x: Tensor, parts: Sequence[narrow.Narrow]) -> None:
        """By torch's products, of the rows of each adapter."""
        for number, part in enumerate(parts, 1):
            span = slice(-(-number * rows // 3), -(-(number + 1) * rows // 3))
            narrow.plain_narrow(x[span], [replace(part, uses=None, t=part.t[span])])

    ways = {"plain": launches(narrow.plain_narrow), "as chosen": launches(narrow.narrow)}
    if rows > narrow.MOST_ROWS:
        ways["codes as they are"] = ways.pop("as chosen")
        ways["as chosen, by masks"] = launches(partial(wide_first, run=narrow.narrow))
        ways["as chosen, by spans"] = launches(partial(wide_first, run=by_spans))
        for tile in LARGE_NARROW_TILES:
            on_tiles = partial(with_constant, narrow, "choose_tile", lambda *_, tile=tile: tile, narrow.narrow)
            run = partial(wide_first, run=on_tiles)
            ways["tile {}x{}x{}, {} stages, {} warps".format(*tile)] = launches(run)
    elif rows > skinny.VECTOR_ROWS:
        all_rows = partial(with_constant, narrow, "vector_rows")
        ways["number by number"] = launches(partial(all_rows, lambda *_: rows, narrow.narrow))
        for tile in NARROW_TILES:
            on_tiles = partial(with_constant, narrow, "choose_tile", lambda *_, tile=tile: tile, narrow.narrow)
            run = partial(all_rows, lambda *_: 0, on_tiles)
            ways["tile {}x{}x{}, {} stages, {} warps".format(*tile)] = launches(run)
    size = f"{rows} rows, {n_in}" + ", int8" * is_coded
    return Case("narrow", size, n_bytes, error_of(found[1], found[0]), ways)


def added_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """What adapters add to a product of the most rows, a third of which use the one, and a third the other."""
    for n_out in (sizes.config.hidden_size, qkv_width(sizes.config), 2 * sizes.config.intermediate_size):
        yield added_case(max(sizes.rows), n_out, sizes, device)


def added_case(rows: int, n_out: int, sizes: Sizes, device: torch.device) -> Case:
    make, border, ranks = partial(torch.randn, device=device, dtype=sizes.dtype), sizes.ranks[0], sum(sizes.ranks)
    n_bytes = n_out * ranks + rows * (2 * ranks // 3 + 4 * n_out // 3) * sizes.dtype.itemsize
    thirds = torch.arange(rows, device=device) * 3 // rows
    first, last = -(-rows // 3), -(-2 * rows // 3)
    masks, spans = (thirds == 1, thirds == 2), (slice(first, last), slice(last, rows))
    sets = []
    for _ in copies_of(n_bytes, sizes):
        codes = torch.randint(-127, 128, (n_out, ranks), device=device, dtype=torch.int8)
        t, scale = make(rows, ranks), torch.full((2, n_out), 1 / (64 * ranks**0.5), device=device, dtype=torch.bfloat16)
        for mask, part in zip(masks, t.split(sizes.ranks, 1), strict=True):
            part.mul_(mask[:, None])
        sets.append((make(rows, n_out), Columns(codes, scale, (t[:, :border], t[:, border:]))))
    found = [y.clone() for y, _ in (sets[0], sets[0])]
    shares.plain_add_to(found[0], sets[0][1])
    shares.add_to(found[1], sets[0][1], masks)

    def by_spans(y: Tensor, columns: Columns) -> None:
        """With every B made wide first, and torch's products."""
        for (codes, scale, t), span in zip(columns.parts, spans, strict=True):
            wide = y.new_empty(codes.shape)
            dequantise.dequantise(codes, scale, wide)
            y[span].addmm_(t[span], wide.t())

    def launches(run: Callable[..., None]) -> list[Launch]:
        return [partial(run, y, columns) for y, columns in sets]

    ways = {"as chosen": launches(partial(shares.add_to, uses=masks)), "by spans": launches(by_spans)}
    for tile in ADDED_TILES:
        run = partial(with_constant, shares, "ADDED_TILE", tile, partial(shares.add_to, uses=masks))
        ways["tile {}x{}x{}, {} stages, {} warps".format(*tile)] = launches(run)
    return Case("add_to", f"{rows} rows, {n_out}", n_bytes, error_of(found[1:], found[:1]), ways)


# --- attention over pages --------------------------------------------------------------------------------------------


def attention_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for name, lengths in sizes.lengths.items():
        yield fresh_case(name, make_scene(lengths, 1, sizes, device), sizes.tilings, sizes)
        yield kept_case(name, make_scene(lengths, 1, sizes, device), sizes)
    for name, lengths in sizes.drafts.items():
        yield kept_case(f"{name}, 8 new", make_scene(lengths, 8, sizes, device), sizes)


def fresh_case(name: str, scene: Scene, tilings: Mapping[str, Tiling], sizes: Sizes) -> Case:
    usual = choose(scene, sizes, fresh=True)
    made = scene.divide(sizes, usual)
    expected, pool = torch.empty_like(scene.out), scene.pool[:, :1].clone()
    paged.plain_attend_new(scene.qkv, *scene.rotary, *layer_of(pool, 0), scene.table, made, expected)
    scene.launches(made)[0]()
    error = error_of([scene.out, scene.pool[:, 0]], [expected, pool[:, 0]])
    divided = {"as chosen": usual, **tilings}
    return Case(
        "attend_new",
        name,
        scene.n_bytes,
        error,
        {name: scene.launches(scene.divide(sizes, tiling)) for name, tiling in divided.items()},
    )


def kept_case(name: str, scene: Scene, sizes: Sizes) -> Case:
    made = scene.divide(sizes, choose(scene, sizes, fresh=False))
    expected, query = torch.empty_like(scene.out), scene.out.clone()
    paged.plain_attend(query, *layer_of(scene.pool, 0), scene.table, made, expected)
    runs = [partial(paged.attend, query, *layer, scene.table, made, scene.out) for layer in scene.layers]
    runs[0]()
    return Case("attend", name, scene.n_bytes, error_of([scene.out], [expected]), {"as chosen": runs})


def coded_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Attention over keys and values in 8 bits."""
    for name, lengths in sizes.lengths.items():
        for cache_format, code in CODE_DTYPES.items():
            if codes.why_not_kept(cache_format, device) is None:
                yield coded_case(f"{name}, {cache_format}", make_scene(lengths, 1, sizes, device), code, sizes)


def coded_case(name: str, scene: Scene, code: torch.dtype, sizes: Sizes) -> Case:
    config, expected = sizes.config, torch.empty_like(scene.out)
    layers = [quantise(layer, code) for layer in scene.pool.unbind(1)]
    kept = [(*numbers.unbind(1), scales.movedim(1, -1).contiguous()) for numbers, scales in layers]
    made = scene.divide(sizes, choose(scene, sizes, fresh=True, in_codes=True))

    def attend(run: Callable[..., None], number: int, out: Tensor) -> Launch:
        keys, values, scales = kept[number]
        return partial(run, scene.qkv, *scene.rotary, keys, values, scene.table, made, out, scales)

    attend(paged.plain_attend_new, 0, expected)()
    attend(paged.attend_new, 0, scene.out)()
    n_bytes = sum(scene.lengths) * 2 * config.kv_heads * (config.head_dim + SCALE_BYTES)
    runs = [attend(paged.attend_new, number, scene.out) for number in range(len(kept))]
    return Case("attend_new, 8 bits", name, n_bytes, error_of([scene.out], [expected]), {"as chosen": runs})


def divide_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    for name, lengths in sizes.lengths.items():
        scene = make_scene(tuple(min(length, 600) for length in lengths), 1, sizes, device)
        made = scene.divide(sizes, choose(scene, sizes, fresh=True))
        found = made.units.clone()
        division.plain_divide(made)
        differing = float((found[:, 0] != made.units[:, 0]).sum())
        yield Case("divide", name, made.units.nbytes, differing, {"kernel": [partial(division.divide, made)]})


# --- a layer's small kernels, one after the other --------------------------------------------------------------------


def chain_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Norm, attention, norm and gate of one layer after another, without the products between them."""
    for rows in sizes.chain:
        length = 640 if device.type == "cuda" else 20
        scene = make_scene((length,) * rows, 1, sizes, device)
        usual = choose(scene, sizes, fresh=True)
        tilings = {"as chosen": usual, "early": TILINGS["64x5, early"], "not early": TILINGS["32x5"]}
        chains = {name: chain_of(scene, scene.divide(sizes, tiling), sizes) for name, tiling in tilings.items()}
        chains["not dependent"] = [partial(run_independently, run) for run in chains["as chosen"]]
        yield Case("chain", f"{rows} x {length}", scene.n_bytes, 0.0, chains)


def chain_of(scene: Scene, made: Division, sizes: Sizes) -> list[Launch]:
    config, rows, dtype, device = sizes.config, len(scene.lengths), sizes.dtype, scene.pool.device
    x, hidden = torch.randn(2, rows, config.hidden_size, device=device, dtype=dtype)
    weight, nothing = torch.ones(config.hidden_size, device=device, dtype=dtype), torch.zeros_like(x)
    wide = torch.randn(rows, 2 * config.intermediate_size, device=device, dtype=dtype)
    narrow = torch.empty(rows, config.intermediate_size, device=device, dtype=dtype)

    def layer(attend: Launch) -> None:
        norm.add_norm(x, nothing, weight, config.norm_eps, hidden)
        attend()
        norm.add_norm(x, nothing, weight, config.norm_eps, hidden)
        gate.gate(wide, narrow)

    return [partial(layer, attend) for attend in scene.launches(made)]


def run_independently(run: Launch) -> None:
    with independently():
        run()


CASES: Mapping[str, Callable[[Sizes, torch.device], Iterator[Case]]] = {
    "norm": norm_cases,
    "gate": gate_cases,
    "rotary": rotary_cases,
    "choice": choice_cases,
    "narrow": narrow_cases,
    "add_to": added_cases,
    "divide": divide_cases,
    "attention": attention_cases,
    "codes": coded_cases,
    "chain": chain_cases,
}

if __name__ == "__main__":
    sys.exit(main())
