"""Settings of the process that CUDA and torch's allocator read once, so they have to be made before CUDA starts.

Knows environment variables; imports no torch, so that the commands can make them first, and `load` after them.
"""

import os
import sys
from typing import Literal

from memphi.errors import DeviceError

AllocatorName = Literal["default", "expandable", "split128"]

ALLOCATORS: dict[AllocatorName, str] = {
    "default": "",
    "expandable": "expandable_segments:True",
    "split128": "max_split_size_mb:128,garbage_collection_threshold:0.8,max_non_split_rounding_mb:512",
}
"""What each name tells torch's allocator."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch looks for that, in its order: the first that is set is the only one that counts."""


def use_allocator(name: AllocatorName) -> str | None:
    """Tell torch's CUDA allocator how to cut its memory; returns what keeps it from being told, in words.

    That is a person's own setting, which stays. Raises DeviceError where CUDA has started, and for an unknown name.
    """
    if name not in ALLOCATORS:
        raise DeviceError(f"there is no allocator {name!r}; use {', '.join(ALLOCATORS)}")
    wanted = ALLOCATORS[name]
    own = next((variable for variable in ALLOCATOR_VARIABLES if variable in os.environ), None)
    if not wanted or (own and os.environ[own] == wanted):
        return None
    if own:
        return f"{own}={os.environ[own]} is set and stays as it is; unset it to use the allocator {name}"
    if cuda_has_started():
        raise DeviceError(f"the allocator {name} has to be chosen before this program first uses CUDA")
    # Every torch since 2.9 reads this one; some warn of the older names.
    os.environ["PYTORCH_ALLOC_CONF"] = wanted
    return None


def wait_for_launches() -> None:
    """Let every kernel end before the next starts, so that an error shows where it happened; costs much speed.

    Raises DeviceError where CUDA has started.
    """
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        return
    if cuda_has_started():
        raise DeviceError("CUDA can be debugged only if this is asked for before this program first uses it")
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"


def cuda_has_started() -> bool:
    """Whether this process holds a CUDA context of torch's."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
