"""Numbers go to a device without anybody waiting for what it has yet to do."""

import numpy as np
import pytest
import torch

from memphi.model.upload import upload

DEVICE = torch.device("cuda")
BUSY_CYCLES = 2_000_000_000
"""About a second of a GPU's clock."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("numbers", [np.arange(3), np.zeros((0, 4), np.int32), np.random.rand(700_000) > 0.5], ids=len)
def test_numbers_arrive(numbers):
    for given in (numbers, numbers[::-1]):
        sent = upload(given, DEVICE)
        assert sent.device.type == "cuda"
        assert np.array_equal(sent.cpu().numpy(), given)


def test_the_host_goes_on():
    upload(np.zeros(600_000), DEVICE)  # The first one takes memory that is pinned.
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    sent = upload(np.arange(600_000), DEVICE)
    assert not busy.query(), "the copy waited for the device"
    assert sent.sum().item() == 600_000 * 599_999 // 2
