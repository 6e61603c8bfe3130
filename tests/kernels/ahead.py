"""Kernels compiled for a card that is not here: what is launched is compiled, measured and not run."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from memphi.model.kernels import launch

SHARED_BYTES = {
    (7, 5): 64 * 2**10,
    (8, 0): 163 * 2**10,
    (8, 6): 99 * 2**10,
    (8, 9): 99 * 2**10,
    (9, 0): 227 * 2**10,
    (12, 0): 99 * 2**10,
}
"""Shared memory that one block of threads may have, by compute capability (CUDA's programming guide)."""
REGISTERS = 65536
"""Of a multiprocessor, on every one of these cards."""
REPORT = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a card."""

    name: str
    threads: int
    registers: int
    """Of a thread."""
    shared_bytes: int
    stack_bytes: int
    """Of a thread, for what has no registers."""
    is_dependent: bool


class AbsentCard:
    """Triton's driver for a card of which only the compute capability is known."""

    def __init__(self, capability):
        self._capability = 10 * capability[0] + capability[1]

    def get_current_device(self):
        return self._capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compiled_for(capability):
    """What is launched in here, with tensors on the CPU; the list of what came of it fills as it goes."""
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *arguments, warmup, **options):
        made = run(kernel, *arguments, warmup=True, **options)
        compiled.append(_measure(kernel.__name__, made))

    card = SimpleNamespace(multi_processor_count=132)
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        patch.object(torch.cuda, "get_device_properties", lambda device: card),
    ):
        _forget()
        driver.set_active(AbsentCard(capability))
        try:
            yield compiled
        finally:
            driver._active = None
            _forget()


def _forget():
    for function in (launch.capability, launch.launch_options, launch.multiprocessors):
        function.cache_clear()


def _measure(name, made):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, REPORT.search(printed).groups())
    metadata = made.metadata
    return Compiled(name, 32 * metadata.num_warps, registers, metadata.shared, stack, metadata.launch_pdl)
