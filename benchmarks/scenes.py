"""Rows over a pool of pages, for benchmarks of what reads them: attention, and what stands around it in a layer."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.launches import Launch, Sizes, copies_of
from memphi.config import LanguageConfig
from memphi.model.kernels import division, paged
from memphi.model.kernels.division import Division, Tiling

PAGE_TOKENS = 16


@dataclass(frozen=True)
class Scene:
    """Rows over a pool, each layer of which is a copy."""

    lengths: tuple[int, ...]
    new_tokens: int
    pool: Tensor
    table: Tensor  # [rows, most pages] int32
    qkv: Tensor
    rotary: tuple[Tensor, Tensor]
    out: Tensor
    n_bytes: int

    def divide(self, sizes: Sizes, tiling: Tiling) -> Division:
        device = self.pool.device
        made = division.make_division(sizes.config, len(self.lengths), self.new_tokens, tiling, device)
        made.lengths.copy_(torch.tensor(self.lengths))
        division.divide(made)
        return made

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        return [layer_of(self.pool, i) for i in range(self.pool.shape[1])]

    def launches(self, made: Division) -> list[Launch]:
        """`attend_new` over each layer."""
        run = partial(paged.attend_new, self.qkv, *self.rotary)
        return [partial(run, *layer, self.table, made, self.out) for layer in self.layers]


def make_scene(lengths: tuple[int, ...], new_tokens: int, sizes: Sizes, device: torch.device) -> Scene:
    config = sizes.config
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    n_bytes = sum(lengths) * 2 * config.kv_heads * config.head_dim * sizes.dtype.itemsize
    numbers = torch.randperm(sum(counts), dtype=torch.int32).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(numbers), batch_first=True).to(device)
    tokens = len(lengths) * new_tokens
    qkv = torch.randn(tokens, qkv_width(config), device=device, dtype=sizes.dtype)
    out = torch.randn(tokens, config.heads, config.head_dim, device=device, dtype=sizes.dtype)
    pool = make_pool(sum(counts), len(copies_of(n_bytes, sizes)), sizes, device)
    return Scene(lengths, new_tokens, pool, table, qkv, table_of(tokens, sizes, device), out, n_bytes)


def choose(scene: Scene, sizes: Sizes, *, fresh: bool, in_codes: bool = False) -> Tiling:
    rows, device = len(scene.lengths), scene.pool.device
    return division.choose_tiling(rows, scene.new_tokens, sizes.dtype, device, fresh=fresh, in_codes=in_codes)


def table_of(rows: int, sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.rand(rows, 1, sizes.config.rotary_dim, device=device, dtype=sizes.dtype) for _ in range(2))
    return cos, sin


def qkv_width(config: LanguageConfig) -> int:
    return (config.heads + 2 * config.kv_heads) * config.head_dim


def make_pool(pages: int, layers: int, sizes: Sizes, device: torch.device) -> Tensor:
    shape = (pages, layers, 2, PAGE_TOKENS, sizes.config.kv_heads, sizes.config.head_dim)
    return torch.empty(shape, device=device, dtype=sizes.dtype).normal_()


def layer_of(pool: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    return pool[:, layer, 0], pool[:, layer, 1]
