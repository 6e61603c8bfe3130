"""What a step of answers takes, under a CUDA graph: all of it, and without each of its parts in turn.

Kernels hide each other: what a part adds is what a step takes less without it. The decoder is that of the official
sizes with random weights, but has fewer layers, so that weights and keys still do not fit in the card's cache.
Usage: python -m benchmarks.steps --out FILE. Without a GPU, TRITON_INTERPRET=1 tries it at small sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, get_args
from unittest.mock import patch

import torch

from benchmarks.document import write_document
from benchmarks.launches import counts, find_device, make_parser, measure
from memphi import official
from memphi.cache.pool import PagePool, make_pool
from memphi.checkpoint.random import random_model
from memphi.config import CacheFormat, ModelConfig, Scheme
from memphi.memory.costs import page_tokens
from memphi.model import adapters, decode
from memphi.model.decode import Buffers, DecodeStep
from memphi.model.kernels import narrow
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant import linears, packed
from memphi.model.rows import Row

LAYERS = 8
SETS: Mapping[str, tuple[str | None, ...]] = {
    "none": (None,),
    "vision": ("vision",),
    "none, vision, speech": (None, "speech", "vision"),
}
PARTS: Mapping[str, tuple[tuple[Any, str], ...]] = {
    "attention": ((decode, "attend_new"),),
    "norms": ((decode, "add_norm"),),
    "gates, where they are no part of a product": ((adapters, "gate"), (linears, "gate"), (packed, "gate")),
    "what A makes": ((narrow, "narrow"),),
    "choice": ((decode, "choose"),),
}
"""Where each part of a step is called from."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--schemes", default="bf16,int8,int4,fp8", help="separated by commas")
    parser.add_argument("--rows", type=counts, default="1,16,64,256", help="row counts, separated by commas")
    parser.add_argument("--tokens", type=int, default=580, help="of every row, its new one included")
    parser.add_argument("--cache-format", choices=get_args(CacheFormat), default="plain")
    options = parser.parse_args(arguments)
    schemes = options.schemes.split(",")
    if options.tokens < 1 or not all(options.rows):
        parser.error("rows and tokens must be 1 or more")
    if not set(schemes) <= set(get_args(Scheme)):
        parser.error(f"schemes must be among {', '.join(get_args(Scheme))}")
    device, _ = find_device(parser)
    figures = []
    for scheme in schemes:
        model = make_model(scheme, device)
        for rows, in_use in product(options.rows, SETS):
            if rows < len(SETS[in_use]):
                continue  # No row would use the last.
            figures.append(measure_step(model, rows, in_use, options.tokens, options.cache_format))
            write_document(options.out, device, options.commit, {"layers": LAYERS, "figures": figures})
    return 0


def make_model(scheme: Scheme, device: torch.device) -> Phi4MM:
    config, dtype = _sizes(device)
    config = replace(config, language=replace(config.language, layers=min(LAYERS, config.language.layers)))
    model = random_model(config, device, dtype, packed=True, scheme=scheme)
    model.use_kernels(True)
    return model


def _sizes(device: torch.device) -> tuple[ModelConfig, torch.dtype]:
    """The official model, or one that the interpreter gets through."""
    if device.type == "cuda":
        return ModelConfig.from_folder(official.folder()), torch.bfloat16
    from tests.checkpoints import tiny_config

    return tiny_config(), torch.float32


def measure_step(
    model: Phi4MM, rows: int, in_use: str, tokens: int, cache_format: CacheFormat = "plain"
) -> dict[str, Any]:
    """Milliseconds of a step of so many rows, and what each part adds to them."""
    size = page_tokens(cache_format)
    pages = -(-tokens // size)
    pool = make_pool(model.config.language, rows * pages, model.dtype, model.device, size, cache_format)
    pool.ensure(range(rows * pages))
    whole = _seconds(model, pool, rows, in_use, tokens)
    added = {}
    for part in PARTS:
        with left_out(part):
            added[part] = whole - _seconds(model, pool, rows, in_use, tokens)
    told = ", ".join(f"{part} {seconds * 1e3:.3f}" for part, seconds in added.items())
    print(f"{model.config.scheme}, {rows} rows, {in_use}: {whole * 1e3:.3f} ms; {told}", flush=True)
    return {
        "scheme": model.config.scheme,
        "cache_format": cache_format,
        "rows": rows,
        "tokens": tokens,
        "adapters": in_use,
        "milliseconds": round(whole * 1e3, 4),
        "added_milliseconds": {part: round(seconds * 1e3, 4) for part, seconds in added.items()},
    }


@torch.inference_mode()
def _seconds(model: Phi4MM, pool: PagePool, rows: int, in_use: str, tokens: int) -> float:
    """Of one step, its rows sorted by their adapters as the engine has them."""
    pages = -(-tokens // pool.page_tokens)
    names = sorted(SETS[in_use][i % len(SETS[in_use])] or "" for i in range(rows))
    made = [
        Row(1, tokens - 1, name or None, False, tuple(range(i * pages, (i + 1) * pages)))
        for i, name in enumerate(names)
    ]
    buffers = Buffers(model.language, pool, rows, pages)
    step = DecodeStep(model.language, pool, buffers, rows, {name for name in names if name})
    step.fill(made, [1] * rows)
    return measure([step.run], model.device)


@contextmanager
def left_out(part: str) -> Iterator[None]:
    """Steps are run without one of their parts, whatever comes of it."""
    with ExitStack() as patches:
        for module, name in PARTS[part]:
            patches.enter_context(patch.object(module, name, lambda *_: None))
        yield


if __name__ == "__main__":
    raise SystemExit(main())
