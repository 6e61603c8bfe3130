"""Every run of the tests tries the same examples, so that one says what the next will; none is held to a time.

`pytest --hypothesis-profile=default` tries others. Processes that share the work share the cores too; with `-n auto`
there is one for each core, as far as memory goes, but where there is a GPU one for all: tests measure its memory.
"""

import os
import shutil

import pytest
from hypothesis import settings

from memphi.memory.devices import this_machine

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


PROCESS_BYTES = 3 * 2**30
"""What a process and those that its tests start may take."""


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(processes: int) -> None:
    """Have torch, which is not imported yet, use a process' share of the cores, here and where tests start others."""
    share = max(count_cores() // processes, 1)
    os.environ |= {"OMP_NUM_THREADS": str(share), "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many processes `-n auto` stands for; 0: pytest's own."""
    if shutil.which("nvidia-smi"):
        return 0
    return min(count_cores(), this_machine().free_bytes // PROCESS_BYTES)


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share_cores(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
