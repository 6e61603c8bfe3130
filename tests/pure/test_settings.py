"""What is said to torch's allocator and to CUDA before they start, and who has the last word."""

import os
import sys
from types import SimpleNamespace

import pytest

from memphi.engine import settings
from memphi.engine.settings import ALLOCATOR_VARIABLES, ALLOCATORS, use_allocator, wait_for_launches
from memphi.errors import DeviceError


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """An environment in which nobody has set anything, and no torch is there."""
    for name in (*ALLOCATOR_VARIABLES, "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.setenv(name, "")  # so that what a test leaves is undone
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return os.environ


def start_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True)))


def set_variables(environment):
    return {name: environment[name] for name in ALLOCATOR_VARIABLES if name in environment}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_allocator_is_one_variable_and_the_default_none(environment, name):
    assert use_allocator(name) is None
    wanted = ALLOCATORS[name]
    assert set_variables(environment) == ({"PYTORCH_ALLOC_CONF": wanted} if wanted else {})


@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
def test_a_person_s_own_setting_stays_and_is_told(environment, variable):
    environment[variable] = "max_split_size_mb:64"
    assert use_allocator("default") is None
    told = use_allocator("expandable")
    assert told.startswith(f"{variable}=max_split_size_mb:64 is set and stays")
    assert set_variables(environment) == {variable: "max_split_size_mb:64"}


def test_asking_for_what_is_set_already_is_fine_at_any_time(environment, monkeypatch):
    assert use_allocator("split128") is None
    start_cuda(monkeypatch)
    assert use_allocator("split128") is None
    assert use_allocator("default") is None
    assert set_variables(environment) == {"PYTORCH_ALLOC_CONF": ALLOCATORS["split128"]}


def test_after_cuda_has_started_it_is_too_late(environment, monkeypatch):
    start_cuda(monkeypatch)
    with pytest.raises(DeviceError, match="before this program first uses CUDA"):
        use_allocator("expandable")
    with pytest.raises(DeviceError, match="before this program first uses it"):
        wait_for_launches()
    assert set_variables(environment) == {}
    assert "CUDA_LAUNCH_BLOCKING" not in environment


def test_an_unknown_allocator_is_one_sentence():
    with pytest.raises(DeviceError, match="no allocator 'fast'; use default, expandable, split128"):
        use_allocator("fast")


def test_launches_are_waited_for(environment, monkeypatch):
    wait_for_launches()
    assert environment["CUDA_LAUNCH_BLOCKING"] == "1"
    start_cuda(monkeypatch)
    wait_for_launches()
    assert settings.cuda_has_started()
