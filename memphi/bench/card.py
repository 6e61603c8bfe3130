"""What this very device reaches: bytes a second and operations a second, measured in about two seconds.

So every figure stands beside the limit of the card that it was measured on, throttled or shared as that may be.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from memphi.bench.document import device_name
from memphi.bench.limits import Card

MEASURE_SECONDS = 0.5
"""For each of the four kinds of work."""
READ_NUMBERS, PRODUCT_SIDE, BATCH = {"cuda": 2**29, "cpu": 2**24}, {"cuda": 8192, "cpu": 768}, {"cuda": 16, "cpu": 1}
"""Far more than a cache holds; large enough for the highest rate; and how many are timed at once."""
FREE_SHARE = 4
"""The matrix read takes no more than one part in so many of what is free, and a copy of it is made."""


@torch.inference_mode()
def measure_card(device: torch.device, dtype: torch.dtype) -> Card:
    """The most that plain operations reach: of adding up, multiplying and copying, and of a large product."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    card = Card(device_name(device), _bandwidth(device, dtype, kind), _rate(device, dtype, kind))
    if kind == "cuda":
        torch.cuda.empty_cache()
    return card


def _bandwidth(device: torch.device, dtype: torch.dtype, kind: str) -> float:
    """Bytes a second."""
    weights = torch.ones(_rows(device, dtype, kind), 4096, device=device, dtype=dtype)
    x, target = torch.ones(1, 4096, device=device, dtype=dtype), torch.empty_like(weights)
    reads: tuple[tuple[int, Callable[[], object]], ...] = (
        (weights.nbytes, lambda: weights.sum(dtype=torch.float32)),
        (weights.nbytes, lambda: F.linear(x, weights)),
        (2 * weights.nbytes, lambda: target.copy_(weights)),
    )
    return max(n_bytes / _least_seconds(work, device, BATCH[kind]) for n_bytes, work in reads)


def _rate(device: torch.device, dtype: torch.dtype, kind: str) -> float:
    """Operations a second."""
    side = PRODUCT_SIDE[kind]
    left, right = (torch.full((side, side), 0.01, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _least_seconds(lambda: left @ right, device, BATCH[kind])


def _rows(device: torch.device, dtype: torch.dtype, kind: str) -> int:
    """How many rows of 4096 numbers are read."""
    most = READ_NUMBERS[kind]
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // FREE_SHARE // dtype.itemsize)
    return max(most // 4096, 1)


def _least_seconds(work: Callable[[], object], device: torch.device, batch: int) -> float:
    """The shortest that one of several took."""
    work()
    least, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < end:
        wait_for(device)
        started = time.perf_counter()
        for _ in range(batch):
            work()
        wait_for(device)
        least = min(least, (time.perf_counter() - started) / batch)
    return least


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
