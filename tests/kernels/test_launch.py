"""Where kernels run, and what is said where they do not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memphi.model.kernels import launch

CUDA = torch.device("cuda", 0)
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from memphi.model.kernels import division, gate, launch, norm, paged, rotary
out = torch.empty(1, 4)
gate.plain_gate(torch.ones(1, 8), out)
print(launch.why_not_built(), out.sum() > 2)
"""


@pytest.fixture(autouse=True)
def fresh_answers():
    functions = (launch.why_not_available, launch.capability, launch.launch_options)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def test_definitions_need_no_triton():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert finished.stdout == "Triton is not installed tensor(True)\n", finished.stderr


def test_the_host_is_no_place_for_kernels():
    assert launch.why_not_available(torch.device("cpu")) == "cpu is no CUDA device"
    assert not launch.is_available(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "found", "obstacle"),
    [
        ((7, 0), "/usr/bin/gcc", "compute capability 7.0 is older than 7.5"),
        ((8, 6), None, "Triton needs a C compiler: install gcc"),
        ((8, 6), "/usr/bin/gcc", None),
    ],
)
def test_what_a_card_needs(monkeypatch, capability, found, obstacle):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: found)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CPATH", "/somewhere")
    assert launch.why_not_available(CUDA) == obstacle


@pytest.mark.parametrize(("capability", "dependent"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_launches_depend_on_the_card(monkeypatch, capability, dependent):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    options = launch.launch_options(CUDA)
    assert options["dependent"] == dependent
    assert options.get("launch_pdl", False) == dependent
