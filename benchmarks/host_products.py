"""How long a CPU takes for the products of a decoder layer with weights in bf16, and quantised by each way there is.

Usage: python -m benchmarks.host_products --out FILE
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.document import write_document
from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.config import LanguageConfig
from memphi.model.quant.host import HostInt4Weight, HostInt8Weight
from memphi.model.quant.weights import Int4Weight, Int8Weight

ROWS = (1, 4, 16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of the activations")
    parser.add_argument("--repeat", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    options = parser.parse_args()
    figures = {
        name: measure(*shape, options.rows, options.repeat)
        for name, shape in linears(read_config(official.folder()).language).items()
    }
    document = {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    write_document(options.out, torch.device("cpu"), options.commit, document | {"milliseconds": figures})


def linears(language: LanguageConfig) -> dict[str, tuple[int, int]]:
    """A decoder layer's: (in, out)."""
    hidden, inner = language.hidden_size, language.intermediate_size
    return {
        "qkv": (hidden, (language.heads + 2 * language.kv_heads) * language.head_dim),
        "out": (language.heads * language.head_dim, hidden),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


@torch.inference_mode()
def measure(n_in: int, n_out: int, rows: tuple[int, ...], repeat: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, by the number of rows."""
    weight = torch.randn(n_out, n_in, dtype=torch.bfloat16) / n_in**0.5
    int8, int4 = Int8Weight(n_out, n_in), Int4Weight(n_out, n_in)
    int8.store(0, weight)
    int4.store(0, weight)
    host8, host4 = HostInt8Weight(int8), HostInt4Weight(int4)
    wide = weight.float()
    ways: dict[str, Callable[[Tensor], Any]] = {
        "bf16": lambda x: x @ weight.t(),
        "fp32": lambda x: x.float() @ wide.t(),
        "int8 as defined": int8,
        "int8 by ATen": host8,
        "int4 as defined": int4,
        "int4 by ATen": host4,
        # It takes more than 16 rows only.
        "int8 times int8": lambda x: torch._int_mm(x.to(torch.int8).repeat(-(-17 // len(x)), 1), int8.codes.t()),
    }
    inputs = [torch.randn(count, n_in, dtype=torch.bfloat16) for count in rows]
    return {name: {str(len(x)): _median_ms(way, x, repeat) for x in inputs} for name, way in ways.items()}


def _median_ms(way: Callable[[Tensor], Any], x: Tensor, repeat: int) -> float:
    way(x)
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        way(x)
        seconds.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(seconds), 3)


if __name__ == "__main__":
    main()
