"""What may be asked of the benchmark; its own processes are asked in the same way."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import benchmarks.dials
from memphi.memory.costs import GIB, MIB

CHILDREN = ("dial", "calibrate", "neighbour")
"""What each process of the benchmark's own does."""
NO_DIAL = "none"


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.dials", description=benchmarks.dials.__doc__)
    parser.add_argument(
        "--dial", type=_size, action="append", default=[], metavar="SIZE", help="as in 16GiB, or none; repeats"
    )
    parser.add_argument("--requests", type=int, default=60, help="requests a dial")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of one dial, loading included")
    parser.add_argument("--calibrate", type=float, default=0.0, metavar="SECONDS", help="first run single steps")
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--model", default="random", help="random, demo or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: bf16; fp32 for --dial none, where no answer may hang on rounding")
    parser.add_argument("--scheme", default="bf16", help="of the weights; auto: what the plan chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--turn", type=float, default=4.0, metavar="SECONDS", help="how long a neighbour stays, or is away"
    )
    parser.add_argument("--small", action="store_true", help="tiny requests, to try the benchmark itself")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.child and not options.out:
        parser.error("--out is needed")
    return options


def _size(text: str) -> int | None:
    """Bytes from 16GiB, 512MiB or a number; None for no dial."""
    if text == NO_DIAL:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|MiB|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 16GiB, 512MiB, a number of bytes, or none")
    return int(float(match[1]) * {"GiB": GIB, "MiB": MIB, "": 1}[match[2]])


def dial_name(n_bytes: int | None) -> str:
    if n_bytes is None:
        return NO_DIAL
    return f"{n_bytes / GIB:g}GiB" if n_bytes >= GIB else f"{n_bytes / MIB:g}MiB"
