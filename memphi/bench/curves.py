"""How cost grows: with context, rows, crops and seconds of sound, and whether it grows as the arithmetic does."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

from memphi.bench.run import Bench
from memphi.bench.workloads import CurveName, Workload
from memphi.config import ModelConfig
from memphi.errors import MemphiError

PACE_TOKENS, ROW_TOKENS = 17, 128
TOLERANCE = 0.1
"""By how much an exponent may be above that of the arithmetic: times scatter."""
FEWEST_POINTS = 3


@dataclass(frozen=True)
class Curve:
    """A cost over one size."""

    says: str
    sizes: tuple[int, ...]
    workload: Callable[[int, ModelConfig], Workload]
    costs: tuple[str, ...]
    """Which costs of a point are looked at: first_token_seconds, seconds, token_seconds."""


def _context(tokens: int, config: ModelConfig) -> Workload:
    """The answer included, so that the size at which the model changes its position encoding is not crossed."""
    return Workload(f"context {tokens}", "pace", 1, tokens - PACE_TOKENS, PACE_TOKENS)


def _rows(rows: int, config: ModelConfig) -> Workload:
    return Workload(f"rows {rows}", "tokens", rows, 512, ROW_TOKENS)


def _crops(crops: int, config: ModelConfig) -> Workload:
    """A picture that fills a grid of so many crops, less the global view."""
    rows = next(n for n in range(math.isqrt(crops - 1), 0, -1) if (crops - 1) % n == 0)
    side = config.vision.crop_size
    return Workload(f"crops {crops}", "first token", images=1, size=(rows * side, (crops - 1) // rows * side))


def _seconds(seconds: int, config: ModelConfig) -> Workload:
    return Workload(f"seconds {seconds}", "first token", seconds=float(seconds))


CURVES: dict[CurveName, Curve] = {
    "context": Curve(
        "tokens of context", tuple(1024 << n for n in range(8)), _context, ("first_token_seconds", "token_seconds")
    ),
    "rows": Curve(
        "requests at once, of 512 tokens and 128 new ones", tuple(1 << n for n in range(10)), _rows, ("seconds",)
    ),
    "crops": Curve(
        "crops of one picture, the global view included",
        (2, 3, 5, 7, 10, 13, 17, 21, 26, 31, 37),
        _crops,
        ("first_token_seconds",),
    ),
    "seconds": Curve(
        "seconds of sound", (1, 2, 5, 10, 20, 40, 80, 160, 300, 600, 1200, 1800), _seconds, ("first_token_seconds",)
    ),
}


def measure_curve(bench: Bench, name: CurveName, scale: float = 1.0) -> dict[str, Any]:
    """Measure a curve's points up to a share of its largest size, smallest first, as far as there is time."""
    curve, config = CURVES[name], bench.engine.model.config
    largest = max(curve.sizes[-1] * scale, curve.sizes[FEWEST_POINTS - 1])
    points, not_run = list[dict[str, Any]](), dict[str, str]()
    for size in (size for size in curve.sizes if size <= largest):
        workload = curve.workload(size, config)
        try:
            points.append(_point(bench, workload, size))
        except MemphiError as reason:
            not_run[workload.name] = str(reason)
    return {
        "curve": name,
        "says": curve.says,
        "points": points,
        "growth": {cost: growth(points, cost) for cost in curve.costs},
        "not_run": not_run,
    }


def _point(bench: Bench, workload: Workload, size: int) -> dict[str, Any]:
    """One size's costs, and the least that they can be on this card."""
    record = bench.measure(workload)
    encode, prefill, decode = (record["phases"][name]["limit_seconds"] for name in ("encode", "prefill", "decode"))
    names = ("first_token_seconds", "seconds", "token_seconds", "requests", "answer_tokens", "peak_memory_bytes")
    limit = {
        "first_token_seconds": encode + prefill,
        "seconds": encode + prefill + decode,
        "token_seconds": decode / max(workload.answer_tokens - 1, 1),
    }
    return {"size": size, **{name: record[name] for name in names}, "repeats": record["repeats"], "limit": limit}


def growth(points: Sequence[Mapping[str, Any]], cost: str) -> dict[str, Any] | None:
    """The power of the size with which a cost grows, over the larger half of sizes, where fixed costs hide least.

    It may not be above that of the arithmetic, nor above 1 where that is less. None for fewer than three points.
    """
    upper = points[min(len(points) // 2, len(points) - FEWEST_POINTS) :]
    if len(points) < FEWEST_POINTS:
        return None
    sizes = [point["size"] for point in upper]
    exponent = power(sizes, [point[cost] for point in upper])
    least = power(sizes, [point["limit"][cost] for point in upper])
    return {
        "from_size": sizes[0],
        "exponent": exponent,
        "exponent_of_limit": least,
        "holds": exponent <= max(least, 1.0) + TOLERANCE,
    }


def power(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return linear_regression(xs, ys).slope
