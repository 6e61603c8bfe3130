"""What `memphi.inputs` computes in numpy equals what PyTorch computes."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from memphi.inputs.image import bicubic, position_buckets


@pytest.mark.parametrize("shape", [(56, 56), (112, 56), (448, 1344), (100, 37), (20, 30), (1, 1)])
@pytest.mark.parametrize("size", [56, 44])
def test_bicubic_is_that_of_pytorch(shape, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    table = np.linspace(-1, 1, 256, dtype=np.float32)
    image = torch.from_numpy(table[pixels]).permute(2, 0, 1)[None]
    expected = functional.interpolate(image, (size, size), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(bicubic(pixels, table, size), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("patches", [2, 4, 8, 10, 16, 24, 27, 32, 64])
def test_position_buckets_are_those_of_pytorch(patches):
    boundaries = torch.arange(1 / patches, 1.0, 1 / patches)
    for count in range(1, patches + 1):
        expected = torch.bucketize(torch.linspace(0, 1 - 1 / count, count), boundaries, right=True)
        assert position_buckets(count, patches).tolist() == expected.tolist()
