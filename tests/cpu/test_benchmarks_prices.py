"""The simulation of steps: it counts as torch's allocator does, and where a card was measured it says the same."""

import pytest
import torch

from benchmarks.prices import MIB, Peak, RowCase, Simulation, _flash_pieces, block_bytes, verdict
from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.request import InputMode

MEASURED = {
    "decode 1 x 1000": 4_228_096,
    "decode 16 x 1000": 67_967_488,
    "decode 64 x 1000": 137_178_624,
}
"""What the gauge saw on an H100 with PyTorch 2.11 at the official size, adapters packed, PyTorch's own kernels."""


@pytest.fixture(scope="module")
def simulation():
    return Simulation(read_config(official.folder()), "packed")


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_card_took_is_what_is_simulated(simulation, name):
    case = next(case for case in simulation.cases() if case.name == name)
    kind, priced_bytes, simulated_bytes = simulation.weigh(case)
    assert name.startswith(kind.split()[0])
    assert simulated_bytes == pytest.approx(MEASURED[name], rel=0.02)
    assert verdict(priced_bytes, simulated_bytes) == ""


@pytest.mark.parametrize("tokens", [400, 1024, 2048])
def test_answers_beside_a_prompt_that_is_longer_than_they_are(simulation, tokens):
    case = RowCase("mixed", ((tokens, 0), *[(1, 500)] * 64), InputMode.TEXT)
    kind, priced_bytes, simulated_bytes = simulation.weigh(case)
    assert kind == "mixed step"
    assert verdict(priced_bytes, simulated_bytes) == ""


def test_a_peak_counts_blocks_that_live_at_once():
    kept = torch.empty(1000, device="meta")
    with Peak() as peak:
        first = kept + 1  # [1000] fp32: 8 blocks
        second = first * 2
        del first
        third = second[:10] * 2
        _host = torch.empty(1 << 20)  # does not count
        kept.add_(1)
    assert peak.bytes == 16 * 512
    assert peak.alive_bytes == 9 * 512
    del second, third
    assert peak.alive_bytes == 0


def test_the_rest_of_a_segment_goes_along_where_it_is_small():
    assert block_bytes(1) == 512
    assert block_bytes(513) == 1024
    assert block_bytes(5 * MIB + 1) == 5 * MIB + 512
    assert block_bytes(31 * MIB) == 32 * MIB
    assert block_bytes(31 * MIB - 512) == 31 * MIB - 512


def test_flash_attention_cuts_the_keys_of_few_queries():
    assert _flash_pieces(24 * 8, 68) == 4
    assert _flash_pieces(24 * 128, 128) == 1


@pytest.mark.parametrize(
    ("priced", "real", "word"),
    [(10, 10, ""), (9, 10, "below"), (42 * MIB, 10 * MIB, ""), (43 * MIB, 10 * MIB, "far above"), (115, 100, "")],
)
def test_a_price_keeps_its_promise_or_not(priced, real, word):
    assert verdict(priced, real) == word
