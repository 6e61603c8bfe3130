"""Numbers from the host to a device that has other things to do first."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(numbers: NDArray[np.generic], device: torch.device) -> Tensor:
    """The numbers on a device, which is not waited for.

    A copy out of memory that the system may move would wait until the device has done all that was asked of it before.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    if device.type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
