"""Whether and how kernels are launched on a device. Everything that imports Triton gets it here.

Under TRITON_INTERPRET=1, which has to be set before this is imported, kernels run on the CPU in Triton's interpreter.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

triton: Any = importlib.import_module("triton") if importlib.util.find_spec("triton") else None
tl: Any = importlib.import_module("triton.language") if triton else None

if TYPE_CHECKING:
    Tile: TypeAlias = Any
    constexpr: TypeAlias = Any
else:
    Tile, constexpr = (tl.tensor, tl.constexpr) if triton else (Any, Any)
"""How a kernel's parameters are annotated: a pointer, number or block of numbers; what is known when it is compiled.
Triton reads the annotations' text, so files with kernels have `from __future__ import annotations`."""

OLDEST_CAPABILITY = (7, 5)
TENSOR_CAPABILITY = (8, 0)
"""Since when Triton multiplies blocks of 16 bits on tensor cores."""
E4M3_CAPABILITY = (8, 9)
"""Since when cards, and Triton for them, know floats of 8 bits."""
ROOMY_CAPABILITY = ((9, 0), (10, 0))
"""Where a program may have 227 KiB of a multiprocessor's own memory, and so more of a matrix under way at once."""
FEW_ROWS, MOST_WARPS = 256, 32
"""Up to so many rows, the most that were tried, more warps took less on an H200: norms of 64 rows half as long."""
DEPENDENT_CAPABILITY = (9, 0)
"""Since when a kernel may start while the one before it still runs (programmatic dependent launch)."""


_compiles_alone = ContextVar("compiles_alone", default=False)
"""Whether kernels that are launched here and now are compiled and not run."""


class Kernel(triton.JITFunction if triton else object):  # type: ignore[misc]  # Triton may be absent
    """A kernel, compiled at its first launch, or by `compile_ahead`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.run, grid=grid, warmup=_compiles_alone.get())


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """Triton's form of a kernel; the function as it is where there is no Triton.

    It is compiled anew where a number becomes 1 or a multiple of 16, or is one no longer.
    """
    return jit_for_any()(function)


def jit_for_any(*numbers: str) -> Callable[[Callable[..., Any]], Any]:
    """The same, but whatever these are: counts that hardly come twice, as of a prompt's tokens."""
    if triton is None:
        return lambda function: function
    return functools.partial(triton.jit if is_interpreted() else Kernel, do_not_specialize=numbers)


def is_interpreted() -> bool:
    return bool(triton and triton.knobs.runtime.interpret)


def is_available(device: torch.device) -> bool:
    return why_not_available(device) is None


@functools.cache
def why_not_available(device: torch.device) -> str | None:
    """What keeps kernels from running on a device, in words; None: nothing does."""
    if is_interpreted():
        return None if device.type == "cpu" else "Triton's interpreter runs on the CPU alone"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device} is no CUDA device"
    if capability(device) < OLDEST_CAPABILITY:
        return "compute capability {}.{} is older than 7.5".format(*capability(device))
    return why_not_built()


def why_not_built() -> str | None:
    """What of a machine's software keeps kernels from being built, in words; None: nothing does.

    Triton compiles a small C module for every kernel that it launches; looks where it looks.
    """
    if triton is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc"
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    found = Path(paths["include"], "Python.h").exists() or os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    return None if found else f"Triton needs Python's C headers in {paths['include']}: install python3-dev"


def compile_ahead(run: Callable[[], object], device: torch.device) -> None:
    """Have the kernels that `run` launches compiled and loaded, one on each core of the host, and run none of them.

    Once on a machine each takes up to seconds. What else `run` does is done, with whatever stands where kernels would
    have written: where it reads and writes must not depend on that. What cannot be compiled is left to who launches it.
    """
    if not is_available(device) or is_interpreted():
        return
    with _Compiler(device) as compiler, triton.AsyncCompileMode(compiler, ignore_errors=True):
        token = _compiles_alone.set(True)
        try:
            run()
        finally:
            _compiles_alone.reset(token)


class _Compiler(ThreadPoolExecutor):
    """What is to compile kernels in it also loads them, and builds what launches them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(os.cpu_count(), initializer=_go_to, initargs=(device,))

    def submit(self, compile_it: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]  # Triton gives no more
        return super().submit(_load, compile_it)


def _go_to(device: torch.device) -> None:
    """Make a device this thread's own; one without a number is."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _load(compile_it: Callable[[], Any]) -> Any:  # noqa: ANN401
    kernel = compile_it()
    kernel.run  # noqa: B018  # Is loaded when it is first asked for.
    return kernel


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """A device's compute capability; the interpreter stands for a card without dependent launch."""
    return (8, 0) if is_interpreted() else torch.cuda.get_device_capability(device)


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keywords that every launch gets; a kernel has the parameter `dependent: constexpr`.

    Where `dependent` holds, the kernel may have been started while the ones before it still ran. It begins with
    `tl.extra.cuda.gdc_launch_dependents()`, which lets the next one start as soon as there is room. Before it reads
    anything that the step computed, and before its first write, it has `tl.extra.cuda.gdc_wait()`, which returns when
    everything launched earlier has ended. At least one program of every launch has to wait.

    A kernel that lets the next one start after it has waited itself is one that the next may run beside: what was
    there before both, that one may read without waiting, past the cache of its multiprocessor (".cg"), which may
    hold what was there earlier still.
    """
    if capability(device) < DEPENDENT_CAPABILITY:
        return {"dependent": False}
    return {"dependent": True, "launch_pdl": True}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device works on side by side; a small number in the interpreter, so that few are tried."""
    return 4 if is_interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def warps_of_row(rows: int, usual: int) -> int:
    """Warps of a program that has a row to itself: few rows leave a card idle, so they get as many as there may be."""
    return MOST_WARPS if rows <= FEW_ROWS else usual


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller: the only sizes that blocks have."""
    return 1 << (number - 1).bit_length()


def fit_block(rows: int, block_out: int, block_in: int, warps: int, most_sums: int) -> tuple[int, int, int]:
    """Outputs, inputs and warps of a program that sums number by number.

    For more than one row no thread keeps more than most_sums sums.
    """
    while rows > 1 and rows * block_out * block_in > most_sums * 32 * warps:
        if warps < 8:
            warps *= 2
        elif block_out > 1:
            block_out //= 2
        else:
            block_in //= 2
    return block_out, block_in, warps
