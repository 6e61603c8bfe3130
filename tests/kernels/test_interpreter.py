"""Runs the tests of all kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import OUTSIDE

pytest.importorskip("triton")
INSIDE = sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in OUTSIDE)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", INSIDE)
def test_kernels_equal_their_definitions_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
