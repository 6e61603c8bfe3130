"""On CUDA the memory for pages really comes and goes, behind addresses that stay."""

import gc
import threading

import pytest
import torch

from memphi import official
from memphi.cache.pool import (
    FEWEST_GRANULES,
    CudaMemory,
    PagePool,
    WholeMemory,
    make_pool,
    page_bytes,
    why_not_mapped,
)
from memphi.config import ModelConfig
from memphi.model.kept import kept_layer
from tests.checkpoints import tiny_config

DEVICE = torch.device("cuda")
MIB = 2**20
SLACK_BYTES = 96 * MIB
"""The driver takes a little for its own tables and for kernels when they are first used."""

TINY = tiny_config(hidden_size=768, heads=6, kv_heads=2, layers=3).language
"""Pages of 48 KiB in bf16, of which 2 MiB hold no whole number."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every test gives back what it took."""
    torch.zeros(1, device=DEVICE)
    before = free_bytes()
    yield
    assert before - free_bytes() < SLACK_BYTES


@pytest.fixture(scope="module")
def full_size():
    """The official sizes: pages of 2 MiB."""
    return ModelConfig.from_folder(official.folder()).language


def free_bytes():
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def make(config, pages, kind=CudaMemory):
    return PagePool(config, pages, torch.bfloat16, 16, kind(pages * page_bytes(config, torch.bfloat16), DEVICE))


def test_a_gpu_has_a_mapped_pool(full_size):
    assert why_not_mapped(DEVICE) is None
    pool = make_pool(full_size, 10, torch.bfloat16, DEVICE)
    assert pool.is_mapped
    assert pool.page_bytes == pool.mapped_bytes == 2 * MIB


@pytest.mark.parametrize("cache_format", ["int8", "fp8"])
def test_pages_in_8_bits_and_their_scales_are_mapped(full_size, cache_format):
    """The codes of 32 tokens are what is mapped at once, and so are the scales of 64 pages."""
    pool = make_pool(full_size, 100, torch.bfloat16, DEVICE, 32, cache_format)
    assert pool.page_bytes == 2 * MIB + 2 * MIB // 64
    assert pool.mapped_bytes == 4 * MIB
    assert pool.missing_bytes(range(64)) == 63 * 2 * MIB
    pool.ensure(range(65))
    assert pool.mapped_bytes == (65 + 2) * 2 * MIB
    page, place = torch.tensor([64, 3], device=DEVICE), torch.tensor([31, 0], device=DEVICE)
    for kept in kept_layer(*pool.layer(31), pool.scales(31)):
        new = torch.randn(2, full_size.kv_heads, full_size.head_dim, device=DEVICE, dtype=torch.bfloat16)
        written = kept.write(page, place, new)
        assert torch.equal(kept.read(page, torch.bfloat16)[[0, 1], place], written)
        assert (written - new).norm() < 0.05 * new.norm()
    assert pool.trim(()) == (64 + 1) * 2 * MIB


@pytest.mark.parametrize("kind", [CudaMemory, WholeMemory])
def test_every_place_is_a_place_of_its_own(kind):
    pool = make(TINY, 100, kind)
    pool.ensure(range(100))
    parts = [part for i in range(TINY.layers) for part in pool.layer(i)]
    written = [torch.randn(part.shape, device=DEVICE, dtype=part.dtype) for part in parts]
    for part, values in zip(parts, written, strict=True):
        assert not part.any()
        part.copy_(values)
    for part, values in zip(parts, written, strict=True):
        assert torch.equal(part, values)
    keys, page, offset = parts[2], torch.tensor([42, 99], device=DEVICE), torch.tensor([3, 15], device=DEVICE)
    keys[page, offset] = 7
    assert (keys == 7).all(-1).all(-1).nonzero().tolist() == [[42, 3], [99, 15]]


def test_an_ordinary_pool_holds_everything():
    pool = make(TINY, 100, WholeMemory)
    pool.trim(())
    assert pool.mapped_bytes == 100 * page_bytes(TINY, torch.bfloat16)


def test_memory_comes_and_goes(full_size):
    before = free_bytes()
    pool = make(full_size, 1024)
    assert before - free_bytes() < SLACK_BYTES
    pool.ensure(range(512))
    assert pool.mapped_bytes == 1024 * MIB
    assert abs(before - free_bytes() - 1024 * MIB) < SLACK_BYTES
    assert pool.trim(range(128)) == 768 * MIB
    assert abs(before - free_bytes() - 256 * MIB) < SLACK_BYTES
    pool.trim(())
    assert pool.mapped_bytes == 1024 * 2 * MIB // FEWEST_GRANULES


def test_more_can_be_reserved_than_the_device_has(full_size):
    pages = 2 * torch.cuda.mem_get_info()[1] // page_bytes(full_size, torch.bfloat16)
    pool = make(full_size, pages)
    pool.ensure([pages - 1])
    pool.layer(31)[1][pages - 1] = 1
    assert pool.layer(31)[1][pages - 1].float().sum().item() == 16 * full_size.kv_heads * full_size.head_dim


def test_addresses_stay_and_memory_that_comes_back_is_usable_and_zero(full_size):
    pool = make(full_size, 64)
    pool.ensure([5, 6])
    keys = pool.layer(3)[0]
    address = keys[5].data_ptr()
    keys[5], keys[6] = 5, 6
    pool.trim({6})
    pool.ensure([5])
    assert keys[5].data_ptr() == pool.layer(3)[0][5].data_ptr() == address
    assert not keys[5].any()
    assert torch.all(keys[6] == 6)
    keys[5] = 7
    assert torch.all(keys[5] == 7)


def test_growing_leaves_what_is_there(full_size):
    pool = make(full_size, 64)
    pool.ensure(range(4))
    keys, values = pool.layer(31)
    keys[:4], values[:4] = 1, 2
    pool.ensure(range(2, 20))
    keys[4:20] = 3
    assert torch.all(keys[:4] == 1)
    assert torch.all(values[:4] == 2)
    assert not values[4:20].any()


def test_small_pages_share_what_is_mapped():
    pool = make(TINY, 200)
    pool.ensure([1, 42, 43])  # Page 42 lies across the border of two mappings.
    assert pool.mapped_bytes == 4 * MIB
    keys = pool.layer(0)[0]
    keys[42] = 1
    assert pool.trim({42}) == 0
    assert torch.all(keys[42] == 1)
    assert pool.trim({41}) == 2 * MIB


def test_a_gather_may_be_padded_with_page_0(full_size):
    pool = make(full_size, 64)
    pool.ensure([9])
    keys = pool.layer(0)[0]
    keys[9] = 1
    pool.trim({9})
    gathered = keys[torch.tensor([[9, 0], [0, 9]], device=DEVICE)]
    assert gathered[:, :, 0, 0, 0].tolist() == [[1, 0], [0, 1]]


def test_what_other_streams_still_do_is_waited_for(full_size):
    pool = make(full_size, 64)
    pool.ensure(range(64))
    numbers = torch.zeros(64 * MIB, device=DEVICE)
    pool.layer(0)[0][1:] = 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(200):
            numbers.sin_()
        pool.layer(0)[0][1:] = 2
    pool.trim(())
    torch.cuda.synchronize()
    assert pool.mapped_bytes == 2 * MIB


def test_a_thread_that_has_not_used_the_device_can_map(full_size):
    pool = make(full_size, 64)
    failures = []

    def work():
        try:
            pool.ensure(range(8))
            pool.layer(0)[0][:8] = 1
            pool.trim({3})
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert torch.all(pool.layer(0)[0][3] == 1)


def test_running_out_of_memory_is_told_and_changes_nothing(full_size):
    pool = make(full_size, 2048)
    pool.ensure(range(8))
    pool.layer(0)[0][:8] = 1
    filler = torch.empty(free_bytes() - 512 * MIB, dtype=torch.uint8, device=DEVICE)
    left = torch.cuda.mem_get_info()[0]
    with pytest.raises(torch.OutOfMemoryError, match="none left to map for pages"):
        pool.ensure(range(1024))
    assert pool.mapped_bytes == 16 * MIB
    assert abs(torch.cuda.mem_get_info()[0] - left) < SLACK_BYTES
    pool.ensure(range(16))
    assert torch.all(pool.layer(0)[0][:8] == 1)
    del filler
    torch.cuda.empty_cache()
    pool.ensure(range(1024))
    pool.layer(31)[1][:1024] = 2
    assert torch.all(pool.layer(31)[1][:1024] == 2)


def test_memory_goes_with_the_last_tensor(full_size):
    before = free_bytes()
    pool = make(full_size, 512)
    pool.ensure(range(256))
    keys = pool.layer(0)[0]
    keys[:256] = 1
    del pool
    assert before - free_bytes() > 500 * MIB
    assert torch.all(keys[:256] == 1)
    del keys
    assert before - free_bytes() < SLACK_BYTES


def test_closing_gives_memory_back_at_once(full_size):
    before = free_bytes()
    pool = make(full_size, 512)
    pool.ensure(range(256))
    pool.close()
    assert (pool.mapped_bytes, before - free_bytes() < SLACK_BYTES) == (0, True)
