"""Devices and number formats by the names that people give them."""

from typing import Literal

import torch

from memphi.errors import DeviceError

DtypeName = Literal["bf16", "fp16", "fp32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """The device called `auto` (the GPU where there is one, else the CPU), cuda, cuda:N, cpu or mps (untested).

    Raises DeviceError for a name that means nothing, and for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def find_dtype(name: str) -> torch.dtype:
    """The number format called bf16, fp16 or fp32; raises DeviceError for another name."""
    if name not in _DTYPES:
        raise DeviceError(f"{name!r} is no number format of memphi's; use {', '.join(_DTYPES)}")
    return _DTYPES[name]
