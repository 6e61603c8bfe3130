"""What `--debug-cuda` watches: numbers that are none, and what the GPU's memory was used for when something failed.

Slow, and for finding a fault only. The commands call it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memphi.errors import CheckpointError, DeviceError, MemphiError, RequestError

HARMLESS = (RequestError, CheckpointError, DeviceError, BrokenPipeError)
"""What fails without the GPU: bad input, and a reader of the answer that went away."""
HISTORY_ENTRIES = 100_000
"""Of several KB each on the host; the oldest are forgotten."""


def watch_for_nan(model: nn.Module) -> list[RemovableHandle]:
    """From here on raise MemphiError naming the first module whose output holds NaN or infinity.

    Modules are looked at as they end, inner ones before those around them, and each is waited for. Removing the handles
    ends it.
    """
    return [module.register_forward_hook(_check(name or "the model")) for name, module in model.named_modules()]


def record_memory() -> None:
    """Let torch note who takes and returns memory on the GPU, and where in the code; starts CUDA."""
    torch.cuda.init()  # records made before that would be lost
    torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)


@contextmanager
def memory_kept(say: Callable[[str], None], folder: Path) -> Iterator[None]:
    """Where memory is recorded and the work inside fails, write the records to a file in the folder and say which."""
    try:
        yield
    except HARMLESS:
        raise
    except Exception:
        if _records():
            say(_write_records(folder / f"memphi-memory-{datetime.now():%Y%m%d-%H%M%S}.pickle"))
        raise


def _check(name: str) -> Callable[..., None]:
    def check(_module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401
        for tensor in _tensors(output):
            finite = torch.isfinite(tensor)
            if not bool(finite.all()):
                raise MemphiError(
                    f"the first output that is not finite is that of {name}: {int((~finite).sum())} of "
                    f"{tensor.numel()} numbers ({tensor.dtype}, {list(tensor.shape)}) are NaN or infinite; another "
                    "--dtype may help, and `memphi verify` says whether the weights compute what they should"
                )

    return check


def _tensors(output: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """The tensors of floating-point numbers in what a module returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _records() -> bool:
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isHistoryEnabled())


def _write_records(path: Path) -> str:
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except Exception as wrong:  # an error of the GPU itself can make it tell nothing more
        reason = next(iter(str(wrong).splitlines()), type(wrong).__name__)
        return f"what the GPU's memory was used for could not be written to {path}: {reason}"
    return f"{path} holds what the GPU's memory was used for; https://pytorch.org/memory_viz shows it"
