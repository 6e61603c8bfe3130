"""The neighbour of the dials' benchmark takes a real card, and gives it back."""

import pytest
import torch

from benchmarks.dials.neighbour import TorchCard, take
from memphi.memory.sizing import reserve_bytes

MIB = 2**20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_neighbour_takes_so_much_that_an_engine_makes_way_and_gives_it_back():
    card = TorchCard("cuda")
    before_bytes, total_bytes = card.memory()
    held = take(card)
    assert len(held) >= 32
    assert card.memory()[0] < reserve_bytes(total_bytes) // 2
    held.clear()
    card.tidy()
    assert card.memory()[0] >= before_bytes - 64 * MIB
