"""What happens when the device has no memory left; the only file that catches an out-of-memory error.

Today the work fails with one sentence. The engine stays usable: a request that failed holds nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memphi.errors import DoesNotFitError

LOADING_ADVICE = "choose another device, or a number format with fewer bytes"
NAMELESS = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
"""What the CPU's allocator, the driver and CUDA's libraries say, which have no error class of their own."""
ANSWERING_ADVICE = (
    "send fewer or smaller attachments, one at a time (--each), ask for a shorter answer (--max-tokens), or choose "
    "another device"
)


@contextmanager
def told_plainly(work: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory inside into a DoesNotFitError that says what would work."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(f"{_name(device)} has too little memory for {work}{_state(device)}; {advice}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in NAMELESS)


def _name(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)


def _state(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return f" ({free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free)"
