"""Devices and number formats by the names that people give them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

from memphi.errors import DeviceError
from memphi.memory import costs
from memphi.memory.devices import DeviceFacts, this_machine
from memphi.memory.learned import key_of, recall

DtypeName = Literal["bf16", "fp16", "fp32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """The device called `auto` (the GPU where there is one, else the CPU), cuda, cuda:N, cpu or mps (untested).

    Raises DeviceError for a name that means nothing, and for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "," in name:
        raise DeviceError(
            f"{name!r} is several devices, and one is needed here; memphi serve and a list in memphi.load take several"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is no device; use auto, cuda, cuda:0, cpu or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise DeviceError(f"this machine has no {device.type} device that torch can use; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no {name}; this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, on which Triton launches and whatever names no device is made."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def find_dtype(name: str) -> torch.dtype:
    """The number format called bf16, fp16 or fp32; raises DeviceError for another name."""
    if name not in _DTYPES:
        raise DeviceError(f"{name!r} is no number format of memphi's; use {', '.join(_DTYPES)}")
    return _DTYPES[name]


def device_facts(device: torch.device) -> DeviceFacts:
    """A device as the planner sees it: what is free counts what CUDA and torch's allocator hold in this process."""
    if device.type != "cuda":
        return this_machine()
    properties = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = costs.context("cuda", properties.name).bytes + torch.cuda.memory_reserved(device)
    return DeviceFacts(
        "cuda",
        properties.name,
        total_bytes,
        min(free_bytes + own_bytes, total_bytes),
        (properties.major, properties.minor),
        recall(key_of(properties.name)),
    )


def cap_allocator(device: torch.device, n_bytes: int | None) -> None:
    """Let torch's allocator take no more than this of a CUDA device, or all there is (None).

    Beyond, it raises an out-of-memory error.
    """
    if device.type == "cuda":
        total_bytes = torch.cuda.mem_get_info(device)[1]
        share = 1.0 if n_bytes is None else min(n_bytes / total_bytes, 1.0)
        # Unlike the rest of torch, this call takes no device without a number.
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(share, index)


@contextmanager
def capping_allocator(device: torch.device, n_bytes: int) -> Iterator[None]:
    """Cap it from here on; where what is done in here fails it has all again, for the process goes on without it."""
    cap_allocator(device, n_bytes)
    try:
        yield
    except BaseException:
        cap_allocator(device, None)
        raise
