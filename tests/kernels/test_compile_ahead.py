"""Kernels compiled side by side for a card that is not here: none runs before it is launched, and then none waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.runtime import driver

from memphi.model.kernels import gate, launch, norm
from memphi.model.kernels.launch import Tile, compile_ahead, constexpr, jit, launch_options, tl
from tests.kernels.ahead import AbsentCard

CPU = torch.device("cpu")


class RecordingCard(AbsentCard):
    """Takes kernels, and notes those that are launched."""

    def __init__(self):
        super().__init__((9, 0))
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 * 2**10},
        )

    def launcher_cls(self, source, metadata):
        return lambda *_: self.launched.append(source.fn.__name__)


@pytest.fixture
def card(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "is_available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernels = norm._add_norm, gate._gate, _broken
    functions = launch.capability, launch.launch_options
    for forget in [*(each.device_caches.clear for each in kernels), *(each.cache_clear for each in functions)]:
        forget()
    card = RecordingCard()
    driver.set_active(card)
    yield card
    driver._active = None
    for forget in [*(each.device_caches.clear for each in kernels), *(each.cache_clear for each in functions)]:
        forget()


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that were compiled, in the order of their ends."""
    names = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **known: names.append(known["fn"].name))
    return names


@jit
def _broken(x: Tile, dependent: constexpr) -> None:
    tl.store(x, tl.no_such_thing(x))


def a_layer():
    """Launch two kernels, one of them twice."""
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    for _ in range(2):
        norm.add_norm(x, x, x[0], 1e-5, x)
    gate.gate(torch.empty(4, 128, dtype=torch.bfloat16), x)


def test_all_are_compiled_and_none_is_launched(card, compiled):
    compile_ahead(a_layer, CPU)
    assert sorted(compiled) == ["_add_norm", "_gate"]
    assert not card.launched
    a_layer()
    assert card.launched == ["_add_norm", "_add_norm", "_gate"]
    assert len(compiled) == 2
    compile_ahead(a_layer, CPU)
    assert len(card.launched) == 3
    assert len(compiled) == 2


def test_who_cannot_be_compiled_is_left_to_its_launch(card, compiled):
    def launch_both():
        _broken[(1,)](torch.empty(4), **launch_options(CPU))
        a_layer()

    compile_ahead(launch_both, CPU)
    assert sorted(compiled) == ["_add_norm", "_gate"]
    with pytest.raises(Exception, match="no_such_thing"):
        launch_both()
    a_layer()
    assert len(card.launched) == 3


def test_what_else_fails_is_told_and_kernels_are_launched_again(card, compiled):
    def fail():
        a_layer()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(fail, CPU)
    assert not card.launched
    a_layer()
    assert len(card.launched) == 3


def test_without_kernels_nothing_is_run():
    compile_ahead(lambda: pytest.fail("this was run"), CPU)
