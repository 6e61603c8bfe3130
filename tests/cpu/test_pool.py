"""What is written at a place of a page is read there and nowhere else; memory comes and goes with the pages."""

import gc
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memphi.cache import pool as pool_module
from memphi.cache import pool as pools
from memphi.cache.pool import (
    HOST_GRANULE_BYTES,
    CudaMemory,
    HostMemory,
    WholeMemory,
    make_pool,
    page_bytes,
)
from tests.checkpoints import tiny_config

CPU = torch.device("cpu")
CONFIG = tiny_config(layers=3).language
LARGE = tiny_config(hidden_size=768, heads=6, kv_heads=2, layers=3).language
"""Pages of 3 * 16 KiB in bf16, which share granules of 64 KiB."""

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives memory back")


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_place_is_a_place_of_its_own(dtype):
    pool = make_pool(CONFIG, 5, dtype, CPU)
    pool.ensure(range(5))
    parts = [part for i in range(CONFIG.layers) for part in pool.layer(i)]
    written = [torch.randn(5, 16, CONFIG.kv_heads, CONFIG.head_dim).to(dtype) for _ in parts]
    for part, values in zip(parts, written, strict=True):
        part.copy_(values)
    for part, values in zip(parts, written, strict=True):
        assert torch.equal(part, values)


def test_tokens_are_written_by_page_and_offset():
    pool = make_pool(CONFIG, 4, torch.float32, CPU)
    pool.ensure([1, 3])
    pages, offsets = torch.tensor([3, 3, 1]), torch.tensor([14, 15, 0])
    values = torch.randn(3, CONFIG.kv_heads, CONFIG.head_dim)
    keys, others = pool.layer(1)
    keys[pages, offsets] = values
    assert torch.equal(torch.stack([keys[3, 14], keys[3, 15], keys[1, 0]]), values)
    assert keys.count_nonzero() == values.numel()
    assert not others.any()
    assert not pool.layer(0)[0].any()
    assert pool.layer(1)[0].data_ptr() == keys.data_ptr()


def test_a_page_is_one_block_of_memory():
    pool = make_pool(CONFIG, 3, torch.bfloat16, CPU)
    assert pool.page_bytes == page_bytes(CONFIG, torch.bfloat16) == 16 * 3 * 2 * 2 * 8 * 2
    first, last = pool.layer(0)[0], pool.layer(2)[1]
    assert first[1].data_ptr() - first[0].data_ptr() == pool.page_bytes
    end = last[0].data_ptr() + last[0].numel() * 2
    assert end == first[1].data_ptr()


def test_other_page_sizes_are_possible():
    pool = make_pool(CONFIG, 3, torch.bfloat16, CPU, page_tokens=4)
    assert (pool.page_tokens, pool.layer(0)[0].shape) == (4, (3, 4, CONFIG.kv_heads, CONFIG.head_dim))


def test_there_is_no_page_beyond_the_last():
    pool = make_pool(CONFIG, 3, torch.bfloat16, CPU)
    for page in (-1, 3):
        with pytest.raises(IndexError):
            pool.ensure([page])


@linux
def test_mapped_bytes_follow_the_pages():
    pool = make_pool(LARGE, 40, torch.bfloat16, CPU)
    granule = HOST_GRANULE_BYTES
    assert (pool.page_bytes, pool.mapped_bytes) == (3 * granule // 4, granule)
    pool.ensure([4, 5])  # Bytes 3.0 to 4.5 of a granule.
    assert pool.mapped_bytes == 3 * granule
    pool.ensure([4, 0])
    assert pool.mapped_bytes == 3 * granule
    assert pool.trim({4}) == granule
    assert pool.mapped_bytes == 2 * granule
    assert pool.trim({4}) == 0
    assert pool.trim(()) == granule
    assert pool.mapped_bytes == granule


@linux
@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_trim_keeps_what_it_is_told_and_what_comes_back_is_zero(ensured, kept):
    pool = make_pool(LARGE, 20, torch.bfloat16, CPU)
    pool.ensure(ensured | kept)
    keys, values = pool.layer(2)
    for page in ensured | kept:
        keys[page] = values[page] = page + 1
    pool.trim(kept)
    for page in kept:
        assert torch.all(keys[page] == page + 1)
        assert torch.all(values[page] == page + 1)
    touched = {page for granule in pool._mapped for page in pool._pages_of(granule)}
    pool.ensure(range(20))
    for page in set(range(20)) - touched:
        assert not keys[page].any()


@linux
def test_memory_goes_back_to_the_system_and_the_addresses_stay():
    pool = make_pool(LARGE, 2000, torch.bfloat16, CPU)  # 94 MiB
    untouched = resident_bytes()
    keys = pool.layer(0)[0]
    pool.ensure(range(2000))
    for i in range(LARGE.layers):
        for part in pool.layer(i):
            part.fill_(1)
    assert resident_bytes() - untouched > 80 * 2**20
    pool.trim({7})
    assert resident_bytes() - untouched < 10 * 2**20
    assert torch.all(keys[7] == 1)
    pool.ensure([1000])
    assert not keys[1000].any()


@linux
def test_a_range_that_the_system_refuses_is_out_of_memory():
    with pytest.raises(MemoryError, match="memory for pages"):
        HostMemory(2**60)


def test_closing_gives_all_back():
    pool = make_pool(LARGE, 40, torch.bfloat16, CPU)
    pool.ensure(range(40))
    pool.close()
    assert pool.mapped_bytes == 0


def test_an_ordinary_tensor_is_held_as_a_whole():
    pool = pool_module.PagePool(CONFIG, 1, torch.bfloat16, 1, WholeMemory(page_bytes(CONFIG, torch.bfloat16, 1), CPU))
    assert not pool.layer(0)[0].any()
    pool.ensure([0])
    assert pool.trim(()) == 0
    assert pool.mapped_bytes == pool.page_bytes


def test_make_pool_takes_what_the_device_can(caplog):
    pool = make_pool(CONFIG, 3, torch.bfloat16, CPU)
    assert not pool.is_mapped
    assert (pool.capacity_pages, pool.page_tokens) == (3, 16)
    assert not caplog.records


def test_without_the_driver_a_gpu_has_an_ordinary_pool_and_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setattr(pool_module, "WholeMemory", lambda n_bytes, device: WholeMemory(n_bytes, CPU))
    assert not make_pool(CONFIG, 3, torch.bfloat16, torch.device("cuda")).is_mapped
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cuda-bindings" in caplog.text


class Driver:
    """CUDA's driver as far as CudaMemory calls it, which counts memory and refuses what the real one would."""

    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAccessDesc = SimpleNamespace

    def __init__(self, free):
        self.free = free
        self.contexts, self.handles, self.retained = [], 0, 0
        self.mapped, self.readable, self.cleared, self.reserved, self.sizes = set(), set(), [], {}, {}
        self.failing = None

    def CUmemAllocationProp(self):  # noqa: N802
        return SimpleNamespace(location=SimpleNamespace())

    def result(self, call, *values):
        name = "CUDA_ERROR_UNKNOWN" if self.failing == call else "CUDA_SUCCESS"
        return SimpleNamespace(name=name), *values

    def cuDevicePrimaryCtxRetain(self, index):  # noqa: N802
        self.retained += 1
        return self.result("retain", "context")

    def cuDevicePrimaryCtxRelease(self, index):  # noqa: N802
        self.retained -= 1
        return self.result("release")

    def cuCtxPushCurrent(self, context):  # noqa: N802
        self.contexts.append(context)
        return self.result("push")

    def cuCtxPopCurrent(self):  # noqa: N802
        return self.result("pop", self.contexts.pop())

    def cuMemGetAllocationGranularity(self, properties, option):  # noqa: N802
        return self.result("granularity", 100)

    def cuMemAddressReserve(self, n_bytes, alignment, address, flags):  # noqa: N802
        self.reserved[5000] = n_bytes
        return self.result("reserve", 5000)

    def cuMemAddressFree(self, address, n_bytes):  # noqa: N802
        assert not self.mapped
        assert self.reserved.pop(address) == n_bytes
        return self.result("free")

    def cuMemCreate(self, n_bytes, properties, flags):  # noqa: N802
        assert self.contexts == ["context"]
        if self.free == 0:
            return SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"), None
        self.free -= 1
        self.handles += 1
        return self.result("create", 1)

    def cuMemRelease(self, handle):  # noqa: N802
        self.handles -= 1
        return self.result("drop")

    def cuMemMap(self, address, n_bytes, offset, handle, flags):  # noqa: N802
        assert address not in self.mapped
        assert 5000 <= address <= 5000 + self.reserved[5000] - n_bytes
        self.mapped.add(address)
        self.sizes[address] = n_bytes
        return self.result("map")

    def cuMemUnmap(self, address, n_bytes):  # noqa: N802
        self.mapped.remove(address)
        assert self.sizes.pop(address) == n_bytes
        self.readable.discard(address)
        self.free += 1
        return self.result("unmap")

    def cuMemSetAccess(self, address, n_bytes, access, count):  # noqa: N802
        assert access[0].location.id == 0
        self.readable |= set(range(address, address + n_bytes, 100))
        return self.result("access")

    def cuMemsetD8Async(self, address, value, n_bytes, stream):  # noqa: N802
        behind = {place for start, size in self.sizes.items() for place in range(start, start + size, 100)}
        assert set(range(address, address + n_bytes, 100)) <= behind & self.readable
        self.cleared.append((address, n_bytes))
        return self.result("clear")


@pytest.fixture
def driver(monkeypatch):
    driver = Driver(free=8)
    monkeypatch.setattr(importlib, "import_module", {"cuda.bindings.driver": driver}.__getitem__)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return driver


def test_mapping_asks_the_driver_in_order(driver):
    memory = CudaMemory(1010, torch.device("cuda"))
    assert (memory.granule_bytes, driver.reserved) == (100, {5000: 1100})
    memory.map([0, 1, 2, 5, 10])
    assert driver.mapped == driver.readable == {5000, 5100, 5200, 5500, 6000}
    assert driver.cleared == [(5000, 300), (5500, 100), (6000, 100)]
    memory.unmap([1, 10])
    assert (driver.mapped, driver.free, driver.handles) == ({5000, 5200, 5500}, 5, 0)
    assert not driver.contexts
    memory.close()
    memory.close()
    assert (driver.free, driver.reserved, driver.retained, driver.handles) == (8, {}, 0, 0)


def test_memory_goes_with_its_last_user(driver):
    memory = CudaMemory(1000, torch.device("cuda", 0))
    memory.map([0, 3])
    del memory
    gc.collect()
    assert (driver.free, driver.reserved, driver.retained) == (8, {}, 0)


def test_a_mapping_that_runs_out_of_memory_changes_nothing(driver):
    memory = CudaMemory(2000, torch.device("cuda"))
    memory.map([0, 1])
    with pytest.raises(torch.OutOfMemoryError, match="none left to map for pages"):
        memory.map(list(range(2, 12)))
    assert (driver.mapped, driver.free, driver.handles, driver.contexts) == ({5000, 5100}, 6, 0, [])
    memory.map(list(range(2, 8)))
    assert driver.free == 0


def test_a_large_pool_is_mapped_in_larger_pieces(driver, monkeypatch):
    monkeypatch.setattr(pools, "FEWEST_GRANULES", 4)
    memory = CudaMemory(1050, torch.device("cuda"))
    assert (memory.granule_bytes, driver.reserved) == (200, {5000: 1100})
    memory.map([0, 4, 5])
    assert (driver.mapped, driver.free) == ({5000, 5800, 6000}, 5)
    assert driver.sizes == {5000: 200, 5800: 200, 6000: 100}
    assert driver.cleared == [(5000, 200), (5800, 300)]
    memory.unmap([5])
    assert driver.sizes == {5000: 200, 5800: 200}


@pytest.mark.parametrize("call", ["access", "clear"])
def test_a_mapping_that_the_driver_breaks_off_changes_nothing(driver, call):
    memory = CudaMemory(2000, torch.device("cuda"))
    driver.failing = call
    with pytest.raises(RuntimeError, match="CUDA_ERROR_UNKNOWN"):
        memory.map([0, 1, 4])
    assert (driver.mapped, driver.free, driver.handles, driver.contexts) == (set(), 8, 0, [])
