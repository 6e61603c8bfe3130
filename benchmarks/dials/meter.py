"""What the device has in use, read from outside while a process runs."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from benchmarks.dials.lines import say

SAMPLE_SECONDS = 0.02


class Meter(Protocol):
    """Reads how much of the device's memory is in use, by whomever."""

    source: str

    def used_bytes(self) -> int: ...


class NvmlMeter:
    """What nvidia-smi shows, from the library that it reads itself."""

    source = "NVML, as nvidia-smi shows it: memory of the whole device in use, CUDA's contexts included"

    def __init__(self) -> None:
        """Raises ImportError, or what NVML raises, where there is none."""
        self._nvml: Any = import_module("pynvml")
        self._nvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        by_index, by_uuid = self._nvml.nvmlDeviceGetHandleByIndex, self._nvml.nvmlDeviceGetHandleByUUID
        self._device = by_index(int(first)) if first.isdigit() else by_uuid(first.encode())

    def used_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)


class TorchMeter:
    """What CUDA says is not free; the reader's own context counts too, but was there before."""

    source = "torch.cuda.mem_get_info: memory of the whole device in use, CUDA's contexts included"

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self.used_bytes()

    def used_bytes(self) -> int:
        free_bytes, total_bytes = self._torch.cuda.mem_get_info()
        return int(total_bytes - free_bytes)


def find_meter(device: str) -> Meter | None:
    """The best meter for a device by name; None where nothing can be read."""
    if device == "cpu":
        return None
    try:
        return NvmlMeter()
    except Exception as reason:  # no library, no driver, or a driver that does not answer
        say(f"NVML is not there ({reason})")
    return TorchMeter() if import_module("torch").cuda.is_available() else None


@dataclass
class Seen:
    """What a meter read while a process ran."""

    source: str | None
    base_bytes: int = 0
    """In use without the process: before it began, or after it ended, whichever is less."""
    peak_bytes: int = 0
    """The most beyond that."""
    samples: int = 0
    longest_gap_seconds: float = 0.0


@contextmanager
def sampled(meter: Meter | None) -> Iterator[Seen]:
    """Read the meter every 20 ms while the block runs."""
    if meter is None:
        yield Seen(None)
        return
    seen, used, done = Seen(meter.source, meter.used_bytes()), [0], threading.Event()

    def sample() -> None:
        last = time.monotonic()
        while not done.wait(SAMPLE_SECONDS):
            used.append(meter.used_bytes())
            now = time.monotonic()
            seen.longest_gap_seconds, last = max(seen.longest_gap_seconds, round(now - last, 3)), now

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.samples, seen.base_bytes = len(used) - 1, min(seen.base_bytes, meter.used_bytes())
        seen.peak_bytes = max(used) - seen.base_bytes
