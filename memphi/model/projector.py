"""From tower features to rows of the decoder's embedding: separators, order, projection (spec 4.2, 5.2)."""

import math
from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from memphi.request import DecodedImage, ImageFootprint, ImageInput

T = TypeVar("T", bound=np.generic)


class Projector(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, out_features)
        self.down = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.gelu(self.up(x))))


class ImageProjector(Projector):
    """Arranges images' crops as rows with learned separators, then projects."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.view_separator = nn.Parameter(torch.empty(1, 1, in_features))
        self.row_separator = nn.Parameter(torch.empty(1, 1, 1, in_features))

    def arrange(self, features: Tensor, order: Tensor) -> Tensor:
        """Pool 2 x 2 and lay out images' tokens.

        features [crops, patches ** 2, in]; order [tokens] as `token_order` gives it, for one image or several.
        Returns [tokens, in].
        """
        return torch.cat((self.pool(features).flatten(0, 1), self.separators()))[order]

    def pool(self, features: Tensor) -> Tensor:
        """Average 2 x 2 patches into cells: [crops, patches ** 2, in] to [crops, (patches / 2) ** 2, in]."""
        side = math.isqrt(features.shape[1])
        grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return F.avg_pool2d(grid, 2).permute(0, 2, 3, 1).flatten(1, 2)

    def separators(self) -> Tensor:
        """The row separator and the view separator: [2, in]."""
        return torch.cat((self.row_separator.flatten(0, 2), self.view_separator.flatten(0, 1)))


def token_order(images: Sequence[ImageInput | DecodedImage]) -> NDArray[np.int64]:
    """Where each token of the images comes from, in order (spec 4.2).

    Counts cells of the pooled crops, all images' crops taken as one flat list; the two numbers after the last cell
    are the row separator and the view separator. An image is its grid of crops cut to the valid part, the view
    separator, then the global view; every row of either ends with the row separator. Returns [tokens].
    """
    side = images[0].patch_mask.shape[-1] // 2
    row_end = sum(image.patch_mask.shape[0] for image in images) * side * side
    pieces, first = [], 0
    for image in images:
        pieces.append(_image_order(image, first, row_end))
        first += image.patch_mask.shape[0]
    return np.concatenate(pieces)


def slice_order(
    image: ImageInput | DecodedImage, first: int, crops: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What some of an image's crops, encoded alone, say about its tokens.

    Returns the tokens of the image that they decide, and where each comes from: a cell, counted from the crop `first`,
    or one of the two numbers after the last cell, for the separators as in `token_order`; they go with the first crop.
    """
    order = token_order([image])
    cells, row_end = image.patch_mask[0].size // 4, image.patch_mask.size // 4
    decided = (order >= first * cells) & (order < (first + crops) * cells)
    separates = (order >= row_end) & (first == 0)
    sources = np.where(separates, order - row_end + crops * cells, order - first * cells)
    tokens = (decided | separates).nonzero()[0]
    return tokens, sources[tokens]


def _image_order(image: ImageInput | DecodedImage, first_crop: int, row_end: int) -> NDArray[np.int64]:
    mask = image.patch_mask[:, ::2, ::2]
    cells = np.arange(mask.size).reshape(mask.shape) + first_crop * mask[0].size
    crops = laid_out(cells, mask, image.footprint)
    return np.concatenate((_with_row_ends(crops, row_end), [row_end + 1], _with_row_ends(cells[0], row_end)))


def _with_row_ends(cells: NDArray[np.int64], row_end: int) -> NDArray[np.int64]:
    return np.pad(cells, ((0, 0), (0, 1)), constant_values=row_end).reshape(-1)


def laid_out(cells: NDArray[T], mask: NDArray[np.bool_], footprint: ImageFootprint) -> NDArray[T]:
    """A picture's cells [crops, side, side] where they stand in it, without padding: [rows, columns].

    The first crop is the global view, and not among them.
    """
    layout = (footprint.crop_rows, footprint.crop_columns)
    valid = _tile(mask[1:], layout)
    return _tile(cells[1:], layout)[: valid[:, 0].sum(), : valid[0].sum()]


def _tile(crops: NDArray[T], layout: tuple[int, int]) -> NDArray[T]:
    """Put crops [rows * columns, side, side] side by side: [rows * side, columns * side]."""
    rows, columns = layout
    side = crops.shape[-1]
    return crops.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
