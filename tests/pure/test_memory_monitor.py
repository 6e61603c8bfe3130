"""Predicted against observed: which steps are worth a word."""

from memphi.memory.costs import MIB
from memphi.memory.monitor import Monitor, Record


def test_a_good_prediction_is_counted_and_says_nothing():
    monitor = Monitor()
    assert monitor.note("prefill chunk", 1000 * MIB, 1000 * MIB) is None
    assert monitor.note("prefill chunk", 1000 * MIB, 900 * MIB) is None
    assert monitor.records() == {"prefill chunk": Record(2, 0, 0, 1.0)}


def test_a_step_above_its_price_is_told():
    monitor = Monitor()
    assert monitor.note("logits", 100 * MIB, 101 * MIB) == "logits took 101 MiB, more than the 100 MiB predicted"
    assert monitor.records()["logits"].above == 1


def test_a_price_far_above_the_truth_is_told():
    monitor = Monitor()
    sentence = monitor.note("vision pass", 1200 * MIB, 1000 * MIB)
    assert sentence == "vision pass took 1000 MiB, far less than the 1.2 GiB predicted"
    assert monitor.note("vision pass", 40 * MIB, 10 * MIB) is None  # within 32 MiB
    assert monitor.records()["vision pass"] == Record(2, 0, 1, 1000 / 1200)


def test_nothing_predicted_is_no_division_by_zero():
    monitor = Monitor()
    assert monitor.note("decode step", 0, 0) is None
    assert monitor.note("decode step", 0, 5) is not None
