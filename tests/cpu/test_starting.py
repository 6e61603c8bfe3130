"""Libraries that start beside the loading of a model never fail it, and are done when it is."""

import threading
import time

import pytest
import torch

from memphi.engine import device

CUDA = torch.device("cuda")


@pytest.fixture
def started(monkeypatch):
    """What is started takes a while, and fails where it is told to."""
    log, failures = [], []

    def start(_):
        time.sleep(0.1)
        log.append("started")
        if failures:
            raise failures[0]

    monkeypatch.setattr(device, "compile_ahead", lambda run, on: start(on))
    monkeypatch.setattr(device, "current", lambda on: torch.device("cpu"))
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device, **kept: torch.ones(*sizes, **kept))
    return log, failures


@pytest.mark.parametrize("error", [None, RuntimeError("no such library"), torch.OutOfMemoryError("out of memory")])
def test_who_comes_after_waits_for_it_and_hears_of_no_failure(started, error):
    log, failures = started
    failures += [error] if error else []
    with device.starting_libraries(CUDA):
        log.append("loaded")
    assert log == ["loaded", "started"]


def test_what_fails_beside_it_is_told_when_it_is_over(started):
    log, _ = started
    with pytest.raises(ValueError, match="a damaged file"), device.starting_libraries(CUDA):
        raise ValueError("a damaged file")
    assert log == ["started"]


def test_without_a_gpu_nothing_starts():
    with device.starting_libraries(torch.device("cpu")):
        assert "memphi-libraries" not in {thread.name for thread in threading.enumerate()}
