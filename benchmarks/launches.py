"""What benchmarks of kernels share: at what sizes, over how much memory, how launches are timed and how near they are.

A kernel runs under a CUDA graph, launch after launch, over copies of its tensors that together do not fit in the card's
cache. Without a GPU, TRITON_INTERPRET=1 tries it at small sizes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from memphi import official
from memphi.config import LanguageConfig, ModelConfig
from memphi.model.kernels import launch
from memphi.model.kernels.division import Tiling

Launch = Callable[[], object]

REPLAYS, LAUNCHES = 15, 64
"""How often a graph is timed, and how many launches it has, where they take no longer than this."""
GRAPH_SECONDS = 0.03
MOST_COPIES = 64
LARGEST_ERROR = 0.02
"""What rounding to 16 bits explains, relative to what the definition finds."""
TILINGS = {
    "32x5": Tiling(4, 64, 32, 5, 4, 128, early=False),
    "32x7": Tiling(4, 64, 32, 7, 4, 128, early=False),
    "32x5, 2 warps": Tiling(4, 64, 32, 5, 2, None, early=False),
    "32x5, 1 warp": Tiling(4, 64, 32, 5, 1, None, early=False),
    "32x5, early, 1 warp": Tiling(4, 64, 32, 5, 1, None, early=True),
    "32x3, early, 1 warp": Tiling(4, 64, 32, 3, 1, None, early=True),
    "64x3, early, 1 warp": Tiling(4, 64, 64, 3, 1, None, early=True),
    "64x3, early, 2 warps": Tiling(4, 64, 64, 3, 2, None, early=True),
    "32x5, 1 warp, small units": Tiling(4, 32, 32, 5, 1, None, early=False),
    "32x5, 1 warp, 2 programs": Tiling(2, 64, 32, 5, 1, None, early=False),
    "32x5, 8 programs": Tiling(8, 64, 32, 5, 4, 128, early=False),
    "64x5": Tiling(4, 64, 64, 5, 4, None, early=False),
    "32x5, early": Tiling(4, 64, 32, 5, 4, None, early=True),
    "32x5, early, small units": Tiling(4, 32, 32, 5, 4, None, early=True),
    "64x3, early": Tiling(4, 64, 64, 3, 4, None, early=True),
    "64x5, early": Tiling(4, 64, 64, 5, 4, None, early=True),
    "64x5, early, 2 programs": Tiling(2, 64, 64, 5, 4, None, early=True),
    "128x3, early": Tiling(4, 128, 128, 3, 8, None, early=True),
}
"""By keys at once and stages; four programs a multiprocessor and four warps where nothing is said."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: the official sizes, or ones that the interpreter gets through."""

    config: LanguageConfig
    rows: tuple[int, ...]
    """Of the kernels that know no past."""
    lengths: Mapping[str, tuple[int, ...]]
    """Rows of attention by name, each with as many tokens."""
    drafts: Mapping[str, tuple[int, ...]]
    """The same with eight new tokens each."""
    chain: tuple[int, ...]
    tilings: Mapping[str, Tiling]
    """Of attention over pages, beside the one that is chosen."""
    ranks: tuple[int, int]
    """Of the two adapters."""
    copied_bytes: int
    """What the copies of a kernel's tensors take together at least: more than any card's cache."""
    dtype: torch.dtype


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """With what every benchmark of kernels is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    return parser


def find_device(parser: argparse.ArgumentParser) -> tuple[torch.device, Sizes]:
    """What is there to measure on, and the sizes for it; ends the program where kernels cannot run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if obstacle := launch.why_not_available(device):
        parser.error(f"{obstacle}; without a GPU, set TRITON_INTERPRET=1")
    return device, official_sizes() if device.type == "cuda" else small_sizes()


def counts(text: str) -> list[int]:
    """For arguments: counts separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not counts separated by commas, as 1,8,64 is")
    return [int(part) for part in parts]


def official_sizes() -> Sizes:
    one_long = (100_000, *[512] * 63)
    uneven = tuple(64 + 18 * i for i in range(64))
    return Sizes(
        config=ModelConfig.from_folder(official.folder()).language,
        rows=(1, 8, 64, 256, 8192),
        lengths={
            **{f"1 x {n}": (n,) for n in (512, 762, 8192, 100_000)},
            **{f"{rows} x {n}": (n,) * rows for rows, n in ((2, 640), (4, 640), (8, 1024), (16, 640))},
            **{f"{rows} x {n}": (n,) * rows for rows, n in ((64, 576), (64, 640), (256, 576), (256, 640))},
            "64 uneven": uneven,
            "1 long, 63 short": one_long,
        },
        drafts={"1 x 2048": (2048,), "16 x 1024": (1024,) * 16},
        chain=(1, 8, 64),
        tilings=TILINGS,
        ranks=(256, 320),
        copied_bytes=256 * 2**20,
        dtype=torch.bfloat16,
    )


def small_sizes() -> Sizes:
    from tests.checkpoints import tiny_config

    import_module("tests.kernels.interpreter")
    return Sizes(
        config=tiny_config(hidden_size=96).language,
        rows=(1, 3, 6),
        lengths={"1 x 20": (20,), "2 uneven": (5, 40)},
        drafts={"1 x 20": (20,)},
        chain=(1,),
        tilings={"32x5, early": TILINGS["32x5, early"]},
        ranks=(6, 9),
        copied_bytes=2,
        dtype=torch.float32,
    )


def measure_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.ones(4 * sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure([partial(target.copy_, source)], device)


def measure(launches: Sequence[Launch], device: torch.device) -> float:
    """Seconds of one launch: the median over replays of a graph of many, one after the other."""
    started = time.perf_counter()
    run_all(launches)
    if device.type != "cuda":
        return (time.perf_counter() - started) / len(launches)
    torch.cuda.synchronize()
    started = time.perf_counter()  # Now that all is compiled.
    run_all(launches)
    torch.cuda.synchronize()
    most = int(GRAPH_SECONDS / (time.perf_counter() - started))
    rounds = max(1, min(-(-LAUNCHES // len(launches)), most))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            run_all(launches)
    times = []
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return float(statistics.median(times[3:])) / (rounds * len(launches))


def run_all(launches: Sequence[Launch]) -> None:
    for run in launches:
        run()


def copies_of(n_bytes: int, sizes: Sizes) -> range:
    return range(min(MOST_COPIES, max(2, -(-sizes.copied_bytes // n_bytes))))


def error_of(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative distance; NaN where one of them has any."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
    return float(torch.stack([(f - e).norm() / e.norm().clamp(min=1e-30) for f, e in pairs]).max())
