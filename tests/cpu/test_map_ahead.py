"""Memory for the pages of the next step comes while the device is busy with this one, or is left to that step."""

from types import SimpleNamespace

import pytest
import torch

from memphi.engine.runner import Runner


class Pool:
    """Pages of ten bytes; what `ensure` raises."""

    def __init__(self, error=None):
        self.mapped, self.error = {0, 1}, error

    def missing_bytes(self, pages):
        return 10 * len(set(pages) - self.mapped)

    def ensure(self, pages):
        if self.error:
            raise self.error
        self.mapped |= set(pages)


def map_ahead(pool, pages, room_bytes):
    """Put memory behind pages; returns how often the allocator was told what is left for it."""
    told = []
    gauge = SimpleNamespace(has_room=lambda n_bytes: n_bytes <= room_bytes, cap=lambda: told.append(True))
    Runner._map_ahead(SimpleNamespace(pool=pool, gauge=gauge), pages)
    return len(told)


@pytest.mark.parametrize(("room_bytes", "mapped"), [(20, {0, 1, 2, 3}), (19, {0, 1})])
def test_pages_are_mapped_ahead_as_far_as_there_is_room(room_bytes, mapped):
    pool = Pool()
    assert map_ahead(pool, [1, 2, 3], room_bytes) == (len(mapped) > 2)
    assert pool.mapped == mapped


def test_nothing_is_done_for_pages_that_are_there():
    assert map_ahead(Pool(RuntimeError("not to be called")), [0, 1], 20) == 0


def test_a_device_without_memory_left_fails_nobody():
    pool = Pool(torch.OutOfMemoryError("none left to map for pages"))
    map_ahead(pool, [2], 20)
    assert pool.mapped == {0, 1}


def test_any_other_fault_is_told():
    with pytest.raises(RuntimeError, match="unknown"):
        map_ahead(Pool(RuntimeError("CUDA driver: unknown")), [2], 20)
