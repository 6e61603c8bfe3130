"""The memory that pages name: keys and values of every layer, page by page, as one tensor that has all its addresses
from the start and takes and gives back memory as pages come and go.

Knows nothing of who uses which page. Only pages that were `ensure`d since the last `trim` without them may be read or
written, and page 0, so that a gather may be padded with it: on CUDA any other address is a fault. Memory comes filled
with zeros, since what other uses left there may be NaN, and 0 * NaN would carry it through a mask of zeros; what an
earlier user of a page wrote is left as it is.
"""

import errno
import importlib
import logging
import mmap
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from memphi.config import CacheFormat, LanguageConfig
from memphi.memory import costs
from memphi.memory.costs import PAGE_TOKENS

CODE_DTYPES: dict[CacheFormat, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_DTYPE = torch.bfloat16
HOST_GRANULE_BYTES = 2**16
"""In what units the host's memory is given back: a multiple of every usual operating system's page."""
MAPPED_AT_ONCE, FEWEST_GRANULES = 8, 256
"""CUDA maps 2 MiB in about 0.12 ms on an H100, however much is mapped at once: so a pool that is large enough to have
that many granules all the same has larger ones."""


class Memory(Protocol):
    """Addresses of bytes; memory is behind those granules (of `granule_bytes` each) that are mapped."""

    granule_bytes: int

    def tensor(self) -> Tensor:
        """All the addresses as one uint8 tensor; the first granule must be mapped."""
        ...

    def map(self, granules: list[int]) -> None:
        """Put zeros behind these granules, or change nothing and raise an out-of-memory error."""
        ...

    def unmap(self, granules: list[int]) -> None:
        """Give the memory of these granules back, once the device has done all that was asked of it."""
        ...

    def close(self) -> None:
        """Give everything back; no tensor of it may be used any more."""
        ...


class PagePool:
    """Keys and values of `capacity_pages` pages: a tensor [pages, layers, 2, page_tokens, kv_heads, head_dim].

    In 8 bits these are codes, and a second tensor of their scales [pages, layers, page_tokens, kv_heads, 2] lies behind
    all of them, so that a page of codes is still as large as what CUDA maps. Memory comes in granules, of which either
    part of a page may fill a part, one, or several; a granule that pages share stays while one of them is wanted.
    """

    def __init__(
        self,
        config: LanguageConfig,
        pages: int,
        dtype: torch.dtype,
        page_tokens: int,
        memory: Memory,
        cache_format: CacheFormat = "plain",
    ) -> None:
        self.capacity_pages = pages
        self.page_tokens = page_tokens
        self.cache_format = cache_format
        self.page_bytes = page_bytes(config, dtype, page_tokens, cache_format)
        self._scale_bytes = costs.scale_bytes(config, page_tokens, cache_format)
        self._number_bytes = self.page_bytes - self._scale_bytes
        self._memory = memory
        self._mapped: set[int] = set()
        self.ensure([0])  # torch takes only addresses with memory behind them for CUDA's.
        shape = (pages, config.layers, 2, page_tokens, config.kv_heads, config.head_dim)
        parts = memory.tensor()[: pages * self.page_bytes].split(pages * self._number_bytes)
        numbers = parts[0].view(CODE_DTYPES.get(cache_format, dtype)).view(shape)
        self._layers = [(numbers[:, i, 0], numbers[:, i, 1]) for i in range(config.layers)]
        of_scales = (pages, config.layers, page_tokens, config.kv_heads, 2)
        scales = [part.view(SCALE_DTYPE).view(of_scales) for part in parts[1:]]
        self._scales = [part[:, i] for part in scales for i in range(config.layers)]

    @property
    def is_mapped(self) -> bool:
        """Whether its memory comes from CUDA's driver, behind torch's back."""
        return isinstance(self._memory, CudaMemory)

    @property
    def mapped_bytes(self) -> int:
        """Memory that the pool holds now; the last granule, which may be smaller, counts as any."""
        return len(self._mapped) * self._memory.granule_bytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, each a view [pages, page_tokens, kv_heads, head_dim]."""
        return self._layers[index]

    def scales(self, index: int) -> Tensor | None:
        """The scales of a layer's codes, a view [pages, page_tokens, kv_heads, 2]; None where there are no codes."""
        return self._scales[index] if self._scales else None

    def missing_bytes(self, pages: Iterable[int]) -> int:
        """How much memory `ensure` would take for these pages."""
        return len(self._missing(pages)) * self._memory.granule_bytes

    def ensure(self, pages: Iterable[int]) -> None:
        """Put memory behind these pages where there is none; or change nothing and raise an out-of-memory error.

        New memory is cleared on the current stream, so what uses it has to come after on that stream.
        """
        missing = self._missing(pages)
        if missing:
            self._memory.map(missing)
            self._mapped.update(missing)

    def trim(self, keep: Container[int]) -> int:
        """Give back the memory of all pages but these and page 0; returns how many bytes that was."""
        unwanted = [
            granule
            for granule in sorted(self._mapped)
            if not any(page == 0 or page in keep for page in self._pages_of(granule))
        ]
        if unwanted:
            self._memory.unmap(unwanted)
            self._mapped.difference_update(unwanted)
        return len(unwanted) * self._memory.granule_bytes

    def close(self) -> None:
        """Give all memory back; nothing of the pool may be used any more. Happens by itself with its last tensor."""
        self._layers, self._scales = [], []
        self._mapped.clear()
        self._memory.close()

    def _missing(self, pages: Iterable[int]) -> list[int]:
        """The granules of these pages without memory behind them."""
        return sorted(set(chain.from_iterable(self._granules_of(page) for page in pages)) - self._mapped)

    def _granules_of(self, page: int) -> Iterator[int]:
        if not 0 <= page < self.capacity_pages:
            raise IndexError(f"there is no page {page} in a pool of {self.capacity_pages}")
        granule_bytes = self._memory.granule_bytes
        for start, size in self._parts:
            first = start + page * size
            yield from range(first // granule_bytes, -(-(first + size) // granule_bytes))

    def _pages_of(self, granule: int) -> Iterator[int]:
        begin, end = granule * self._memory.granule_bytes, (granule + 1) * self._memory.granule_bytes
        for start, size in self._parts:
            yield from range(max((begin - start) // size, 0), min(-(-(end - start) // size), self.capacity_pages))

    @cached_property
    def _parts(self) -> tuple[tuple[int, int], ...]:
        """Where the first page's numbers begin, and its scales, if any; and how many bytes a page has of them."""
        numbers, scales = (0, self._number_bytes), (self.capacity_pages * self._number_bytes, self._scale_bytes)
        return (numbers, scales) if self._scale_bytes else (numbers,)


def make_pool(
    config: LanguageConfig,
    pages: int,
    dtype: torch.dtype,
    device: torch.device,
    page_tokens: int = PAGE_TOKENS,
    cache_format: CacheFormat = "plain",
) -> PagePool:
    """The pool for a device; raises an out-of-memory error."""
    memory = _make_memory(pages * page_bytes(config, dtype, page_tokens, cache_format), device)
    return PagePool(config, pages, dtype, page_tokens, memory, cache_format)


def _make_memory(n_bytes: int, device: torch.device) -> Memory:
    """On CUDA mapped where the driver can do that, else all at once, and a warning; of others only Linux' is lazy."""
    obstacle = why_not_mapped(device)
    if obstacle is None:
        return CudaMemory(n_bytes, device)
    if device.type == "cpu" and sys.platform == "linux":
        return HostMemory(n_bytes)
    if device.type == "cuda":
        log = logging.getLogger(__name__)
        log.warning("memory for pages is taken all at once and never given back: %s", obstacle)
    return WholeMemory(n_bytes, device)


def page_bytes(
    config: LanguageConfig, dtype: torch.dtype, page_tokens: int = PAGE_TOKENS, cache_format: CacheFormat = "plain"
) -> int:
    """Memory of one page: keys and values of its tokens in all layers."""
    return costs.kept_bytes(config, page_tokens, dtype.itemsize, cache_format)


def why_not_mapped(device: torch.device) -> str | None:
    """What keeps a device's memory from being mapped page by page, in words; None: nothing does."""
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    try:
        driver: Any = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return "the package cuda-bindings is not installed"
    torch.cuda.init()
    able = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    if not _checked(driver.cuDeviceGetAttribute(able, _index(device))):
        return f"{device} has no virtual memory management"
    return None


class WholeMemory:
    """One ordinary tensor of zeros, taken at once and kept: a single granule."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self.granule_bytes = n_bytes
        self._tensor = torch.zeros(n_bytes, dtype=torch.uint8, device=device)

    def tensor(self) -> Tensor:
        return self._tensor

    def map(self, granules: list[int]) -> None:
        """Nothing to do: it is all there."""

    def unmap(self, granules: list[int]) -> None:
        """Nothing to do: the pool keeps page 0, and so the only granule."""

    def close(self) -> None:
        self._tensor = self._tensor.new_empty(0)


class HostMemory:
    """Anonymous memory on Linux, which the system fills with zeros when it is first touched."""

    granule_bytes = HOST_GRANULE_BYTES

    def __init__(self, n_bytes: int) -> None:
        try:
            self._range = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise MemoryError(f"the system has no {n_bytes} bytes of memory for pages") from None

    def tensor(self) -> Tensor:
        return torch.frombuffer(self._range, dtype=torch.uint8)  # Keeps the range alive.

    def map(self, granules: list[int]) -> None:
        """Nothing to do: touching is enough."""

    def unmap(self, granules: list[int]) -> None:
        for first, end in _runs(granules):
            start = first * self.granule_bytes
            n_bytes = min(end * self.granule_bytes, len(self._range)) - start
            self._range.madvise(mmap.MADV_DONTNEED, start, n_bytes)

    def close(self) -> None:
        self._range.madvise(mmap.MADV_DONTNEED)


class CudaMemory:
    """Reserved addresses on a CUDA device, and memory mapped there granule by granule by the driver.

    Its tensors keep it alive, and it goes with the last of them.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._mapped: set[int] = set()
        self._address = 0
        self._device = torch.device("cuda", _index(device))
        torch.cuda.init()
        self._context = _checked(self._driver.cuDevicePrimaryCtxRetain(self._device.index))
        self._properties = self._allocation_properties()
        minimum = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        with self._current_context():
            least_bytes = int(_checked(self._driver.cuMemGetAllocationGranularity(self._properties, minimum)))
            count = -(-n_bytes // least_bytes)
            self._n_bytes = count * least_bytes
            self.granule_bytes = least_bytes * max(min(MAPPED_AT_ONCE, count // FEWEST_GRANULES), 1)
            self._address = int(_checked(self._driver.cuMemAddressReserve(self._n_bytes, 0, 0, 0)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What torch.as_tensor reads: bytes, since the interface has no name for bfloat16."""
        return {"shape": (self._n_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 2}

    def tensor(self) -> Tensor:
        return torch.as_tensor(self, device=self._device)

    def map(self, granules: list[int]) -> None:
        with self._current_context(), ExitStack() as undo:
            for granule in granules:
                self._map_one(granule)
                undo.callback(self._unmap_one, granule)
            for first, end in _runs(granules):
                self._open_and_clear(first, end)
            undo.pop_all()

    def unmap(self, granules: list[int]) -> None:
        torch.cuda.synchronize(self._device)  # No stream may still use what goes.
        with self._current_context():
            for granule in granules:
                self._unmap_one(granule)

    def close(self) -> None:
        if self._address:
            self.unmap(sorted(self._mapped))
            _checked(self._driver.cuMemAddressFree(self._address, self._n_bytes))
            self._address = 0
            _checked(self._driver.cuDevicePrimaryCtxRelease(self._device.index))

    def __del__(self) -> None:
        with suppress(Exception):  # At the program's end the driver may be gone, and all memory with it.
            self.close()

    def _map_one(self, granule: int) -> None:
        n_bytes = self._end_of(granule) - self._at(granule)
        handle = _checked(self._driver.cuMemCreate(n_bytes, self._properties, 0))
        try:
            _checked(self._driver.cuMemMap(self._at(granule), n_bytes, 0, handle, 0))
        finally:
            _checked(self._driver.cuMemRelease(handle))  # The mapping alone holds the memory from here on.
        self._mapped.add(granule)

    def _unmap_one(self, granule: int) -> None:
        _checked(self._driver.cuMemUnmap(self._at(granule), self._end_of(granule) - self._at(granule)))
        self._mapped.discard(granule)

    def _open_and_clear(self, first: int, end: int) -> None:
        """Let the device use a run of granules, and fill it with zeros: the driver does not promise any."""
        start, n_bytes = self._at(first), self._end_of(end - 1) - self._at(first)
        access = self._driver.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        _checked(self._driver.cuMemSetAccess(start, n_bytes, [access], 1))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        _checked(self._driver.cuMemsetD8Async(start, 0, n_bytes, stream))

    def _at(self, granule: int) -> int:
        return self._address + granule * self.granule_bytes

    def _end_of(self, granule: int) -> int:
        """The last one ends with the memory."""
        return min(self._at(granule + 1), self._address + self._n_bytes)

    def _allocation_properties(self) -> Any:  # noqa: ANN401
        properties = self._driver.CUmemAllocationProp()
        properties.type = self._driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self._driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self._device.index
        return properties

    @contextmanager
    def _current_context(self) -> Iterator[None]:
        """Make torch's context this thread's: torch does so only once the thread has used the device."""
        _checked(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            _checked(self._driver.cuCtxPopCurrent())


def _checked(result: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """The value of a driver call, if it has one; raises torch.OutOfMemoryError, or RuntimeError naming the error."""
    error, *values = result
    if error.name == "CUDA_ERROR_OUT_OF_MEMORY":
        raise torch.OutOfMemoryError("CUDA error: out of memory: the driver has none left to map for pages")
    if error.name != "CUDA_SUCCESS":
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _runs(granules: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring numbers of a rising list as (first, end)."""
    first = 0
    for i in range(1, len(granules) + 1):
        if i == len(granules) or granules[i] != granules[i - 1] + 1:
            yield granules[first], granules[i - 1] + 1
            first = i
