"""On a GPU: the allocator is told in time, and a failure leaves records of its memory."""

import os
import subprocess
import sys

import pytest
import torch

from memphi.engine.settings import ALLOCATOR_VARIABLES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run(code, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **settings)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


@pytest.mark.parametrize("imports", ["", "import torch; "], ids=["before torch", "after torch"])
@pytest.mark.parametrize(("name", "grows"), [("default", "False"), ("split128", "False"), ("expandable", "True")])
def test_the_allocator_is_used(name, grows, imports):
    code = (
        f"{imports}from memphi.engine.settings import use_allocator; use_allocator({name!r})\n"
        "import torch; held = torch.zeros(1 << 24, device='cuda')\n"
        "print(*{segment['is_expandable'] for segment in torch.cuda.memory_snapshot()})"
    )
    assert run(code) == [grows]


def test_a_failure_leaves_records(tmp_path):
    code = (
        "from pathlib import Path; import torch\n"
        "from memphi.engine.settings import wait_for_launches; wait_for_launches()\n"
        "from memphi.engine.watch import memory_kept, record_memory\n"
        "record_memory()\n"
        "try:\n"
        "    with memory_kept(print, Path()):\n"
        "        held = torch.zeros(1 << 24, device='cuda')\n"
        "        torch.zeros(1 << 50, device='cuda')\n"
        "except torch.OutOfMemoryError:\n"
        "    pass"
    )
    said = run(code, cwd=tmp_path)
    assert [said[0]] == [path.name for path in tmp_path.iterdir()]
    assert (tmp_path / said[0]).stat().st_size > 1000
