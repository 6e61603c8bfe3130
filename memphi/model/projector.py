"""From tower features to rows of the decoder's embedding: separators, order, projection (spec 4.2, 5.2)."""

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.request import ImageFootprint


class Projector(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, out_features)
        self.down = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(x))))


class ImageProjector(Projector):
    """Arranges one image's crops as rows with learned separators, then projects."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.view_separator = nn.Parameter(torch.empty(1, 1, in_features))
        self.row_separator = nn.Parameter(torch.empty(1, 1, 1, in_features))

    def arrange(self, features: Tensor, patch_mask: Tensor, footprint: ImageFootprint) -> Tensor:
        """Pool 2 x 2 and lay out: the grid of crops cut to its valid part, one separator, the global view.

        features [crops, patches ** 2, in]; patch_mask [crops, patches, patches]. Returns [tokens, in].
        """
        side = patch_mask.shape[-1]
        grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(grid, 2).permute(0, 2, 3, 1)  # [crops, side / 2, side / 2, in]
        layout = (footprint.crop_rows, footprint.crop_columns)
        crops = _tile(pooled[1:], layout)
        valid = _tile(patch_mask[1:, ::2, ::2, None], layout)[..., 0]
        crops = crops[: int(valid[:, 0].sum()), : int(valid[0].sum())]
        return torch.cat((self._with_separators(crops), self.view_separator[0], self._with_separators(pooled[0])))

    def _with_separators(self, grid: Tensor) -> Tensor:
        """End every row of [rows, columns, in] with the row separator and flatten."""
        ends = self.row_separator[0].expand(grid.shape[0], 1, -1)
        return torch.cat((grid, ends), dim=1).flatten(0, 1)


def _tile(crops: Tensor, layout: tuple[int, int]) -> Tensor:
    """Put crops [rows * columns, side, side, c] side by side: [rows * side, columns * side, c]."""
    return crops.reshape(*layout, *crops.shape[1:]).transpose(1, 2).flatten(2, 3).flatten(0, 1)
