"""The vision tower: crops and their patch masks in, patch features out (spec 4.1)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from memphi.config import VisionConfig
from memphi.inputs.image import position_buckets
from memphi.model.attention import Attention
from memphi.model.upload import upload


@dataclass(frozen=True)
class Patches:
    """Patches of crops end to end: what the tower computes, without what padding alone decides.

    The pictures' own stand crop by crop, and crops of equally many side by side; after them those of padding that are
    pooled with them.
    """

    runs: tuple[tuple[int, int], ...]
    """Crops that follow one another, and how many patches each of them has, padding aside."""
    places: Tensor | None
    """[patches] int64: which of all crops' patches each one is; None: all of them, as they come."""


class VisionAttention(nn.Module):
    """Bidirectional attention within one crop; patches of padding are not seen and see nothing.

    x [patches, hidden] stands as Patches has it, whose runs are given.
    """

    def __init__(self, config: VisionConfig, attention: Attention) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.heads = config.heads
        self.attention = attention

    def forward(self, x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        mixed = torch.empty_like(x)
        self._mix(x, runs, mixed.unflatten(-1, (self.heads, -1)))
        return cast(Tensor, self.out(mixed))

    def _mix(self, x: Tensor, runs: Sequence[tuple[int, int]], mixed: Tensor) -> None:
        """Put into mixed, [patches, heads, head_dim], what patches see of one another."""
        sides = [linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.query, self.key, self.value)]
        first = 0
        for run in runs:
            last = first + math.prod(run)
            query, key, value = (side[first:last].unflatten(0, run).transpose(1, 2) for side in sides)
            seen = self.attention.full(query, key, value, None)  # [crops, heads, patches, head_dim]
            mixed[first:last].unflatten(0, run).copy_(seen.transpose(1, 2))
            first = last
        mixed[first:] = 0  # As the reference's flash path leaves it; odd masks let it into the pooling (spec 4.1).


class VisionMLP(nn.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        # In its own place where no gradient needs what was there.
        y = F.gelu(y, approximate="tanh") if y.requires_grad else torch.ops.aten.gelu_(y, approximate="tanh")
        return cast(Tensor, self.down(y))


class VisionLayer(nn.Module):
    """Pre-norm attention and MLP, each of which the tower adds to what it is given.

    The tower does, so that nobody holds what the layer began with while it computes.
    """

    def __init__(self, config: VisionConfig, attention: Attention) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config, attention)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def attend(self, x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        return cast(Tensor, self.attention(self.attention_norm(x), runs))

    def transform(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.mlp_norm(x)))


class VisionTower(nn.Module):
    """A SigLIP tower whose last stored layer, final norm and head are never computed."""

    def __init__(self, config: VisionConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches**2, config.hidden_size)
        self.layers = nn.ModuleList(VisionLayer(config, attention) for _ in range(config.layers))
        self._buckets = _bucket_table(config.patches)

    def forward(self, crops: Tensor, patch_mask: Tensor) -> Tensor:
        """Encode a flat list of crops.

        crops [crops, 3, crop_size, crop_size]; patch_mask [crops, patches, patches], a rectangle of True at the top
        left. Either may lie on the host; a mask that does makes nobody wait for the device. Returns features
        [crops, patches ** 2, hidden], zeros where only padding is pooled.
        """
        mask = patch_mask.numpy(force=True)
        x = self._embed(crops, mask)
        shape, patches = x.shape, pack_patches(mask, x.device)
        x = x.flatten(0, 1)
        if patches.places is not None:
            x = x[patches.places]
        for layer in cast(Iterable[VisionLayer], self.layers):
            x = x + layer.attend(x, patches.runs)
            x = x + layer.transform(x)
        if patches.places is not None:
            x = x.new_zeros(shape).flatten(0, 1).index_copy_(0, patches.places, x)
        return x.view(shape)

    def _embed(self, crops: Tensor, mask: NDArray[np.bool_]) -> Tensor:
        """Patches and their places: [crops, patches ** 2, hidden]."""
        # Sums keep the order of their first term in memory, and the norms of all layers would copy it.
        x = self.patch_embedding(crops.to(self.patch_embedding.weight)).flatten(2).transpose(1, 2).contiguous()
        return cast(Tensor, x + self.position_embedding(upload(self._positions(mask), x.device)))

    def _positions(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Each valid patch's place in the full table, over which a partial crop is stretched: [crops, patches ** 2]."""
        rows, columns = self._buckets[mask[:, :, 0].sum(1)], self._buckets[mask[:, 0].sum(1)]  # [crops, patches]
        places: NDArray[np.int64] = (rows[:, :, None] * self.config.patches + columns[:, None, :]) * mask
        return places.reshape(len(mask), -1)


def pack_patches(mask: NDArray[np.bool_], device: torch.device) -> Patches:
    """The patches to be computed of crops with such masks [crops, patches, patches]; 2 x 2 of them are pooled."""
    counts = mask.sum(axis=(1, 2))
    if mask.all():
        return Patches(((len(mask), int(counts[0])),), None)
    own = np.arange(mask.size).reshape(mask.shape)
    order = np.argsort(-counts, kind="stable")
    pooled = mask[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    places = [*(own[crop][mask[crop]] for crop in order), own[pooled & ~mask]]
    runs = tuple((len(list(group)), int(count)) for count, group in groupby(counts[order]) if count)
    return Patches(runs, upload(np.concatenate(places), device))


def _bucket_table(side: int) -> NDArray[np.int64]:
    """`position_buckets` of every count of valid rows or columns: [side + 1, side]."""
    table = np.zeros((side + 1, side), np.int64)
    for count in range(1, side + 1):
        table[count, :count] = position_buckets(count, side)
    return table
