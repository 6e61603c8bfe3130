"""Kernels are tested in Triton's interpreter on the CPU and, where there is one, on a GPU.

Triton has to be told of its interpreter before it is imported, and other tests import it for other ends. So the tests
of kernels are collected where TRITON_INTERPRET=1, which is what `test_interpreter.py` sets for all of them in a process
of its own, and where there is a GPU.
"""

import os
from importlib import import_module

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OUTSIDE = {
    "test_compile.py",
    "test_compile_ahead.py",
    "test_compile_coded.py",
    "test_compile_skinny.py",
    "test_interpreter.py",
    "test_launch.py",
}
"""Files that have nothing to do in the interpreter."""


def pytest_ignore_collect(collection_path):
    """True where a file has nothing to do here; None, and never False, leaves the question to others."""
    if collection_path.suffix != ".py":
        return None
    outside = collection_path.name in OUTSIDE
    ignored = outside if INTERPRETED else not outside and not torch.cuda.is_available()
    return ignored or None


def pytest_configure():
    if INTERPRETED:
        import_module("tests.kernels.interpreter")


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def few_programs(monkeypatch):
    """Large programs of products with codes: the interpreter takes as long for a small one."""
    if INTERPRETED:
        for name, block in (("eight_bits", (64, 64, 8)), ("four_bits", (64, 16, 8))):
            monkeypatch.setattr(import_module(f"memphi.model.kernels.{name}"), "BLOCK", block)
