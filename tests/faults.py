"""Let memory run out at a chosen allocation: every operation of torch's that makes a tensor, and every call that puts
memory behind pages, is counted, and some of them fail.
"""

import gc
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memphi.cache.pool import PagePool

KINDS: dict[str, Callable[[], Exception]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "host": MemoryError,
    "CPU allocator": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "runtime": lambda: RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable asserts."),
    "driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
}
"""Every way in which running out of memory is told."""


class From:
    """All numbers from one on, below another: for `Faults(at=...)`."""

    def __init__(self, first: int, end: float = float("inf")) -> None:
        self.first, self.end = first, end

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number < self.end


class Faults(TorchDispatchMode):
    """While active, in this thread: counts allocations, and lets those at the numbers given fail."""

    def __init__(
        self, at: Container[int] = (), error: Callable[[], Exception] = KINDS["torch"], pool: PagePool | None = None
    ) -> None:
        """at counts from 0; pool's calls of `ensure` count too."""
        super().__init__()
        self.allocations = 0
        self.raised = 0
        self.at = at
        self._error = error
        self._pool = pool

    def __enter__(self) -> "Faults":
        if self._pool is not None:
            self._pool.ensure = self._ensure  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._pool is not None:
            del self._pool.ensure  # The class's own shows again.
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _allocates(func):
            self._count()
        return func(*args, **(kwargs or {}))

    def _ensure(self, pages: Any) -> None:
        self._count()
        assert self._pool is not None
        PagePool.ensure(self._pool, pages)

    def _count(self) -> None:
        number, self.allocations = self.allocations, self.allocations + 1
        if number in self.at:
            self.raised += 1
            raise self._error()


@contextmanager
def failing(owner: object, name: str, error: Callable[[], Exception], times: float = float("inf")) -> Iterator[None]:
    """Let so many calls of a method fail; the others do what they did."""
    original = getattr(owner, name)
    left = times

    def fail(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        if left > 0:
            left -= 1
            raise error()
        return original(*arguments, **named)

    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _allocates(func: Any) -> bool:
    """Whether an operation returns a tensor that is no view of, nor the same as, one that it was given."""
    return any(value.alias_info is None and "Tensor" in str(value.type) for value in func._schema.returns)


@contextmanager
def older_spared():
    """Every failure collects garbage: of what is there before the block none is, whatever an engine says meanwhile."""
    gc.collect()
    gc.freeze()
    try:
        with patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
            yield
    finally:
        gc.unfreeze()
