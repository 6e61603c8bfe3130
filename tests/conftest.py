"""Every run of the tests tries the same examples, so that one says what the next will; none is held to a time.

`pytest --hypothesis-profile=default` tries others. Processes that share the work share the cores too; with `-n auto`
there is one for each core, but where there is a GPU one for all: tests measure its memory.
"""

import os
import shutil

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def share_cores(processes: int) -> None:
    """Have torch, which is not imported yet, use a process' share of the cores, here and where tests start others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ |= {"OMP_NUM_THREADS": str(max(cores // processes, 1)), "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """What `-n auto` stands for; None: what pytest-xdist takes it for."""
    return 0 if shutil.which("nvidia-smi") else None


if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share_cores(int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
