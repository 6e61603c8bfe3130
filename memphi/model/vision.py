"""The vision tower: crops and their patch masks in, patch features out (spec 4.1)."""

from collections.abc import Iterable
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


class VisionAttention(nn.Module):
    """Bidirectional attention within one crop; masked patches are not seen and see nothing.

    x [crops, patches, hidden]; valid [padded crops, patches] is the mask of the last of them. The others have no
    padding, and no mask: kernels without one are faster.
    """

    def __init__(self, config: VisionConfig, attention: Attention) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.heads = config.heads
        self.attention = attention

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        mixed = torch.empty_like(x)
        self._mix(x, valid, mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return cast(Tensor, self.out(mixed))

    def _mix(self, x: Tensor, valid: Tensor | None, mixed: Tensor) -> None:
        """Put into mixed, [crops, heads, patches, head_dim], what patches see of one another."""
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        whole = len(x) if valid is None else len(x) - len(valid)
        if whole:
            mixed[:whole] = self.attention.full(query[:whole], key[:whole], value[:whole], None)
        if valid is not None:
            mixed[whole:] = self.attention.full(query[whole:], key[whole:], value[whole:], valid[:, None, None, :])
            # The reference's flash path leaves zeros here, and odd masks let them into the pooling (spec 4.1).
            mixed[whole:].mul_(valid[:, None, :, None])


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

    def attend(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return cast(Tensor, self.attention(self.attention_norm(x), valid))

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
        [crops, patches ** 2, hidden].
        """
        mask = patch_mask.numpy(force=True)
        whole = mask.all(axis=(1, 2))
        order = None if whole.all() else np.argsort(~whole, kind="stable")
        x, valid = self._embed(crops, mask), None
        if order is not None:
            x = x[upload(order, x.device)]
            valid = upload(mask[order[whole.sum() :]].reshape(-1, mask[0].size), x.device)
        for layer in cast(Iterable[VisionLayer], self.layers):
            x = x + layer.attend(x, valid)
            x = x + layer.transform(x)
        return x if order is None else x[upload(np.argsort(order), x.device)]

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


def _bucket_table(side: int) -> NDArray[np.int64]:
    """`position_buckets` of every count of valid rows or columns: [side + 1, side]."""
    table = np.zeros((side + 1, side), np.int64)
    for count in range(1, side + 1):
        table[count, :count] = position_buckets(count, side)
    return table
