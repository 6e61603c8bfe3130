"""Prices of steps against what their tensors take: the steps of the dials' calibration at any size, computed nowhere.

The real runner, modules and sampling run on PyTorch's meta device as they would on an NVIDIA card, while every storage
is counted as torch's allocator counts it. What kernels allocate by themselves is stated here (`Kernels`), and cuDNN's
work space is not known. Usage: python -m benchmarks.prices [--form packed] [--against dials.json] [--only WORD]
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.dials.calibration import RowCase, SliceCase, Steps, prepare_media
from memphi import official
from memphi.cache.pool import page_bytes
from memphi.checkpoint.layout import read_config
from memphi.config import AdapterForm, CacheFormat, EngineConfig, ModelConfig
from memphi.engine.prices import price_rows, price_slices
from memphi.engine.runner import Runner
from memphi.engine.step import StepPlan
from memphi.memory.costs import GIB, MIB, PAGE_TOKENS
from memphi.memory.devices import DeviceFacts
from memphi.memory.monitor import SLACK_BYTES, SLACK_SHARE
from memphi.memory.plan import MemoryPlan
from memphi.memory.planner import make_plan
from memphi.model.attention.sdpa import SdpaAttention
from memphi.model.phi4mm import Phi4MM

BLOCK_BYTES, SEGMENT_BYTES, LARGE_BYTES = 512, 2 * MIB, 10 * MIB
"""torch's CUDA allocator hands out multiples of the first; from the last on it asks for multiples of the second, and
gives what is left of one along where that is no more than a MiB."""
FORMS: tuple[AdapterForm, ...] = ("plain", "packed", "merged")
CARD = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0))
PROCESSORS = 132
"""Of that card: into how many pieces flash attention cuts the keys of few queries depends on it."""


class Peak(TorchDispatchMode):
    """Bytes of the storages alive at once on the meta device, of those that came into being inside."""

    def __init__(self, known: list[Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._known = {tensor.untyped_storage()._cdata for tensor in known or ()}
        self._alive: dict[int, int] = {}
        self.bytes = 0

    @property
    def alive_bytes(self) -> int:
        return sum(self._alive.values())

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        self._known |= given - self._alive.keys()  # They were there before.
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in self._known and key not in self._alive:
                self._alive[key] = block_bytes(storage.nbytes())
                weakref.finalize(storage, self._alive.pop, key)
        self.bytes = max(self.bytes, self.alive_bytes)
        return result


def _storages(values: object) -> list[torch.UntypedStorage]:
    """Those on the meta device."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "meta"]


def block_bytes(n_bytes: int) -> int:
    """What torch's CUDA allocator counts for a tensor, where nothing that fits better lies unused."""
    rounded = -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES
    segment = -(-n_bytes // SEGMENT_BYTES) * SEGMENT_BYTES
    return segment if n_bytes >= LARGE_BYTES and segment - rounded <= MIB else rounded


class Kernels:
    """Attention's kernels as PyTorch's CUDA ones allocate: their results, and what they need meanwhile."""

    @staticmethod
    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        """query [batch, heads, tokens, head_dim]; a mask of numbers goes to the memory-efficient kernel, else flash."""
        if attn_mask is not None:
            mask = _padded(_numbers(attn_mask, query.dtype))
            out = _result(query)
            del mask
            return out
        batch, heads, tokens, head_dim = query.shape
        _needed = _flash_room(batch, heads, tokens, head_dim, key.shape[2], query.device)
        return _result(query)


def _result(query: Tensor) -> Tensor:
    """Laid out by token, then head, as both kernels do."""
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of flags as numbers to be added."""
    return mask if mask.is_floating_point() else torch.where(mask.logical_not(), float("-inf"), 0.0).to(dtype)


def _padded(mask: Tensor) -> Tensor:
    """A mask whose lines begin at multiples of 16 bytes."""
    missing = -mask.shape[-1] % 16
    return torch.nn.functional.pad(mask, (0, missing)) if missing else mask


def _flash_room(batch: int, heads: int, tokens: int, size: int, keys: int, device: torch.device) -> list[Tensor]:
    """What flash attention sums in: a number of each query and head, and all of it for each piece of the keys."""
    sums = torch.empty(batch * heads * tokens, dtype=torch.float32, device=device)
    pieces = _flash_pieces(batch * heads * -(-tokens // 64), -(-keys // (128 if size > 64 else 256)))
    if pieces == 1:
        return [sums]
    return [sums, torch.empty(pieces * batch * heads * tokens * (size + 1), dtype=torch.float32, device=device)]


def _flash_pieces(programs: int, blocks: int) -> int:
    """Into how many pieces keys of so many blocks are cut: the fewest that keep the card 85 % as busy as it can be."""
    slots = 2 * PROCESSORS
    if programs >= 0.8 * slots:
        return 1
    most = min(128, slots, blocks)
    sensible = [n for n in range(1, most + 1) if n == 1 or -(-blocks // n) != -(-blocks // (n - 1))]
    waves = {n: programs * n / slots for n in sensible}
    busy = {n: share / -(-share // 1) for n, share in waves.items()}
    return next(n for n in sensible if busy[n] >= 0.85 * max(busy.values()))


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Let what runs on the meta device take the ways that it takes on a card; what the host reads of it is zero."""
    with (
        patch("memphi.model.attention.sdpa._has_flash", lambda query: True),
        patch("torch.nn.functional.scaled_dot_product_attention", Kernels.sdpa),
        patch.object(Tensor, "tolist", lambda tensor: np.zeros(tuple(tensor.shape)).tolist()),
    ):
        yield


class MetaPool:
    """A pool of pages without any memory."""

    page_tokens = PAGE_TOKENS
    cache_format: CacheFormat = "plain"
    mapped_bytes = 0

    def __init__(self, config: ModelConfig, pages: int, dtype: torch.dtype = torch.bfloat16) -> None:
        language = config.language
        self.page_bytes = page_bytes(language, dtype, PAGE_TOKENS)
        shape = (pages, language.layers, 2, PAGE_TOKENS, language.kv_heads, language.head_dim)
        self.tensor = torch.empty(shape, dtype=dtype, device="meta")

    def layer(self, index: int, /) -> tuple[Tensor, Tensor]:
        return self.tensor[:, index, 0], self.tensor[:, index, 1]

    def scales(self, index: int, /) -> None:
        """None: keys and values are as they are."""

    def missing_bytes(self, pages: Iterable[int]) -> int:
        """None is ever missing."""
        return 0

    def ensure(self, pages: Iterable[int]) -> None:
        """Nothing to do."""


class _Gauge:
    """Counts instead of measuring, by the gauge's own rule: the peak above what was there before or stays after."""

    def __init__(self, known: list[Tensor]) -> None:
        self._known = known
        self.observed_bytes = 0

    @contextmanager
    def watching(self, kind: str, predicted_bytes: int) -> Iterator[None]:
        with Peak(self._known) as peak:
            yield
        self.observed_bytes = peak.bytes - peak.alive_bytes

    def make_room(self, pages: int) -> None:
        """Nothing to do."""

    def cap(self) -> None:
        """Nothing to do."""


class Simulation:
    """A model of any size on the meta device, and its steps one by one."""

    def __init__(self, config: ModelConfig, form: AdapterForm, model: str = "random") -> None:
        """model is where the tokenizer comes from."""
        with torch.device("meta"):
            network = Phi4MM(config, SdpaAttention()).to(torch.bfloat16)
        network.keep_adapters(form == "packed", "vision" if form == "merged" else None)
        network.eval().requires_grad_(False)
        self.config, self.form = config, form
        plan: MemoryPlan = make_plan(config, CARD, EngineConfig(cache_format="plain"), 2, form)
        pool = MetaPool(config, plan.pages)
        forbidden = torch.empty(config.language.vocab_size, dtype=torch.bool, device="meta")
        self._gauge = _Gauge([*network.state_dict().values(), pool.tensor, forbidden])
        runner = Runner(network, pool, forbidden, self._gauge)  # type: ignore[arg-type]
        engine: Any = SimpleNamespace(model=network, plan=plan, loop=SimpleNamespace(runner=runner))
        notes: Any = None
        self._runner, self._steps = runner, Steps(engine, notes, prepare_media(model))

    def cases(self) -> list[RowCase | SliceCase]:
        return self._steps.cases()

    def weigh(self, case: RowCase | SliceCase) -> tuple[str, int, int]:
        """A step's kind, its price, and what it takes once what stays is there."""
        plan = self._steps.step(case)
        kind, priced_bytes = self._price(plan)
        with as_on_a_card():
            for _ in range(2):
                self._runner.run(plan)
        return kind, priced_bytes, self._gauge.observed_bytes

    def _price(self, plan: StepPlan) -> tuple[str, int]:
        if plan.slices:
            return price_slices(plan.slices, self.config, 2)
        return price_rows(plan, self.config, 2, False, self.form)


def verdict(priced_bytes: int, real_bytes: int) -> str:
    """Whether a price keeps the promise: never below the truth, nor further above than is allowed."""
    if priced_bytes < real_bytes:
        return "below"
    return "far above" if priced_bytes - real_bytes > max(SLACK_SHARE * real_bytes, SLACK_BYTES) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS, default="packed", help="how adapters are kept")
    parser.add_argument("--against", type=Path, help="what `benchmarks.dials --calibrate` measured, to compare with")
    parser.add_argument("--only", default="", metavar="WORD", help="only steps with this in their name")
    options = parser.parse_args()
    measured = _measured(options.against) if options.against else {}
    simulation = Simulation(read_config(official.folder()), options.form)
    print(line("kind", "step", ("priced MiB", "simulated", "ratio"), "verdict", ("measured", "distance")))
    words = []
    for case in simulation.cases():
        if options.only not in case.name:
            continue
        kind, priced, simulated = simulation.weigh(case)
        words.append(verdict(priced, simulated))
        sizes = (f"{priced / MIB:.1f}", f"{simulated / MIB:.1f}", f"{simulated / max(priced, 1):.2f}")
        real = measured.get(case.name)
        beside = (f"{real / MIB:.1f}", f"{simulated / real - 1:+.1%}") if real else ()
        print(line(kind, case.name, sizes, words[-1], beside), flush=True)
    return int(any(words))


def line(kind: str, step: str, sizes: tuple[str, ...], word: str, measured: tuple[str, ...]) -> str:
    """One line of the table."""
    numbers, others = ("".join(f"{text:>11}" for text in texts) for texts in (sizes, measured))
    return f"{kind:14} {step:44}{numbers}  {word:9}{others}".rstrip()


def _measured(path: Path) -> dict[str, int]:
    """The most that each step of a calibration took, by its name."""
    cases = json.loads(path.read_text())["calibration"]["cases"]
    return {
        case["case"]: max(run["observed_bytes"] for run in case["runs"])
        for case in cases
        if all("observed_bytes" in run for run in case.get("runs", [{}]))
    }


if __name__ == "__main__":
    raise SystemExit(main())
