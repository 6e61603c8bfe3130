"""What attention over pages takes where it stands in a step: between the product before it and the one after.

By itself a kernel hides nothing and is hidden by nothing. So each layer's qkv product in int4, its attention under
each tiling, and its out product are launched dependently under a CUDA graph, over weights and keys that do not fit in
the card's cache; and the products alone. Usage: python -m benchmarks.between --out FILE [--rows 1] [--tokens 580].
Without a GPU, TRITON_INTERPRET=1 tries it at small sizes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

import torch

from benchmarks.document import write_document
from benchmarks.launches import Launch, Sizes, counts, find_device, make_parser, measure
from benchmarks.quantised_products import multiply_few, random_weight
from benchmarks.scenes import Scene, choose, make_scene, qkv_width
from memphi.model.kernels import four_bits
from memphi.model.kernels.division import Tiling
from memphi.model.quant.weights import QuantisedWeight

LAYERS = 32
PROGRAMS = (2, 3, 4)
BLOCKS = [
    *product((32, 64), (32,), (3,), (2, 4), (64, 128), (True,)),
    (64, 64, 3, 4, 128, True),
    (64, 32, 5, 1, 32, False),
    (64, 32, 5, 4, 32, False),
]
"""Keys of a unit and at once, stages, warps, parts put together at once, and whether the first keys are read early."""

Layer = tuple[QuantisedWeight, QuantisedWeight]
"""The weights of the products before and after one layer's attention."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=counts, default="1,4,16,64", help="row counts, separated by commas")
    parser.add_argument("--tokens", type=counts, default="580", help="tokens of every row, as --rows")
    options = parser.parse_args(arguments)
    if not all((*options.rows, *options.tokens)):
        parser.error("rows and tokens must be 1 or more")
    device, sizes = find_device(parser)
    figures = []
    for rows, tokens in product(options.rows, options.tokens):
        figures.append(measure_scene(make_scene((tokens,) * rows, 1, sizes, device), sizes))
        write_document(options.out, device, options.commit, {"figures": figures})
    return 0


def measure_scene(scene: Scene, sizes: Sizes) -> dict[str, Any]:
    """Microseconds of a layer without attention, and with it under every tiling, the best first."""
    layers = make_layers(scene, sizes)
    run: Callable[[Tiling | None], float] = partial(measure_layers, scene, layers, sizes)
    alone, seconds = run(None), {"chosen": run(choose(scene, sizes, fresh=True))}
    rows, tokens = len(scene.lengths), scene.lengths[0]
    for name, tiling in tilings().items():
        try:
            seconds[name] = run(tiling)
        except Exception as reason:  # A tiling that a card has no room for is no result.
            print(f"{rows} x {tokens}, {name}: {type(reason).__name__}", flush=True)
    best = dict(sorted(seconds.items(), key=lambda item: item[1]))
    told = ", ".join(f"{name} {(taken - alone) * 1e6:.2f}" for name, taken in list(best.items())[:6])
    print(f"{rows} x {tokens}: products {alone * 1e6:.2f} us; with attention more by {told}; "
          f"chosen {(seconds['chosen'] - alone) * 1e6:.2f}", flush=True)  # fmt: skip
    times = {"products alone": alone, **best}
    return {
        "rows": rows,
        "tokens": tokens,
        "microseconds": {name: round(taken * 1e6, 3) for name, taken in times.items()},
    }


def make_layers(scene: Scene, sizes: Sizes) -> list[Layer]:
    config, device = sizes.config, scene.pool.device
    made = partial(random_weight, "int4", device=device)
    return [
        (made(qkv_width(config), config.hidden_size), made(config.hidden_size, config.hidden_size))
        for _ in range(LAYERS if device.type == "cuda" else 1)
    ]


def measure_layers(scene: Scene, layers: Sequence[Layer], sizes: Sizes, tiling: Tiling | None) -> float:
    """Seconds of one layer; without a tiling, of its products alone."""
    x, y = torch.randn(2, len(scene.lengths), sizes.config.hidden_size, device=scene.pool.device, dtype=sizes.dtype)
    attentions = scene.launches(scene.divide(sizes, tiling)) if tiling else [lambda: None]

    def run(layer: Layer, attend: Launch) -> None:
        before, after = layer
        multiply_few(four_bits, x, before, scene.qkv, None)
        attend()
        multiply_few(four_bits, scene.out.flatten(1), after, y, None)

    launches = [partial(run, *each) for each in zip(layers, cycle(attentions), strict=False)]
    return measure(launches, scene.pool.device)


def tilings() -> Mapping[str, Tiling]:
    """By what they are."""
    found = {}
    for programs, (unit, tokens, stages, warps, parts, early) in product(PROGRAMS, BLOCKS):
        name = f"{programs} programs, units of {unit}, {tokens}x{stages}, {warps} warps, {parts} parts"
        tiling = Tiling(programs, unit, tokens, stages, warps, None, early=early, parts=parts)
        found[name + ", early" * early] = tiling
    return found


if __name__ == "__main__":
    raise SystemExit(main())
