"""Numbers from the host to a device that has other things to do first."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED_BYTES = 16
"""Kernels are compiled for addresses that are multiples of this, and again for others."""


def upload(numbers: NDArray[np.generic], device: torch.device) -> Tensor:
    """The numbers on a device, which is not waited for.

    A copy out of memory that the system may move would wait until the device has done all that was asked of it before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Staging:
    """Named numbers, one after the other on the host and likewise on the device, which one copy brings over."""

    def __init__(self, sizes: Mapping[str, tuple[int, Any]], device: torch.device) -> None:
        """sizes: how many numbers there are of each name, and their numpy dtype."""
        self.places: dict[str, tuple[int, int]] = {}
        """Where the bytes of each name begin and end."""
        end = 0
        for name, (count, dtype) in sizes.items():
            self.places[name] = (end, end + count * np.dtype(dtype).itemsize)
            end = -(-self.places[name][1] // ALIGNED_BYTES) * ALIGNED_BYTES
        on_gpu = device.type == "cuda"
        self._staged = torch.zeros(end, dtype=torch.uint8, pin_memory=on_gpu)
        self.sent = torch.zeros(end, dtype=torch.uint8, device=device) if on_gpu else self._staged
        """The bytes on the device, which on a CPU are the host's."""
        self._copied = torch.cuda.Event() if on_gpu else None
        staged = self._staged.numpy()
        self.host = {name: staged[slice(*self.places[name])].view(dtype) for name, (_, dtype) in sizes.items()}
        """The numbers of each name, to be written."""
        self.device = {
            name: self.sent[slice(*self.places[name])].view(torch.from_numpy(self.host[name]).dtype) for name in sizes
        }
        """The same on the device."""

    def wait(self) -> None:
        """Wait for the copy before, and for nothing else: what it reads may not change."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, first: int, end: int) -> None:
        """Bring bytes over."""
        if self._copied is not None:
            self.sent[first:end].copy_(self._staged[first:end], non_blocking=True)
            self._copied.record()
