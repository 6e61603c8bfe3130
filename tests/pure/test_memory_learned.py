"""What was learned of a device, and what becomes of it in the next plan."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi.config import EngineConfig
from memphi.demo.shape import demo_config
from memphi.memory.costs import GIB, MIB
from memphi.memory.devices import DeviceFacts
from memphi.memory.learned import MOST_EXCESS_BYTES, Excess, Learned, keep, recall
from memphi.memory.planner import make_plan

VISION = {"vision pass": Excess(25, 0.5)}


def test_a_formula_that_was_below_the_truth_is_corrected_from_then_on():
    learned = Learned("card").seen("decode step", 1000, 1100)
    assert learned.price("decode step", 5000) == 5100
    assert learned.price("vision pass", 1000) == 1000


def test_one_bad_step_makes_no_others_dear():
    """Neither smaller ones by its bytes, nor larger ones by its share."""
    learned = Learned("card").seen("audio pass", 1000, 1100).seen("audio pass", 10, 30)
    assert learned.price("audio pass", 10) == 30
    assert learned.price("audio pass", 20) == 60
    assert learned.price("audio pass", 1000) == 1100
    assert learned.price("audio pass", 5000) == 5100
    small = Learned("card").seen("vision pass", 1000, 2000)
    assert small.price("vision pass", 10) == 20


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1))
def test_every_step_that_was_seen_would_be_priced_high_enough(steps):
    learned = Learned("card")
    for predicted_bytes, observed_bytes in steps:
        learned = learned.seen("decode step", predicted_bytes, observed_bytes)
    assert all(learned.price("decode step", predicted) >= observed for predicted, observed in steps if predicted)


def test_only_a_larger_excess_changes_what_is_known():
    learned = Learned("card").seen("decode step", 1000, 1100)
    assert learned.seen("decode step", 1000, 1050) is learned
    assert learned.seen("decode step", 1000, 900) is learned
    assert learned.seen("decode step", 1000, 1200).price("decode step", 1000) == 1200


def test_no_correction_goes_beyond_all_measure():
    assert Learned("card").seen("logits", 0, 1 << 40).excess["logits"].bytes == MOST_EXCESS_BYTES


def test_it_is_kept_for_each_device(tmp_path):
    path = tmp_path / "deep" / "devices.json"
    first, second = Learned("a", VISION), Learned("b", {"decode step": Excess(5, 2)})
    keep(first, path)
    keep(second, path)
    assert recall("a", path) == first
    assert recall("b", path) == second
    assert recall("c", path) == Learned("c")
    assert [entry.name for entry in path.parent.iterdir()] == ["devices.json"]


def test_engines_on_cards_of_one_name_learn_from_each_other(tmp_path):
    path = tmp_path / "devices.json"
    keep(Learned("a", VISION), path)
    keep(Learned("a", {"audio pass": Excess(5, 2)}), path)
    keep(Learned("a", {"vision pass": Excess(40, 0.25)}), path)
    assert recall("a", path).excess == {"audio pass": Excess(5, 2), "vision pass": Excess(40, 0.5)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"a": 3}',
        '{"a": {"vision pass": "much", "decode step": -5, "logits": 1e9, "audio pass": 400}}',
        '{"a": {"vision pass": {"bytes": 5}, "logits": {"bytes": -5, "share": 1}, "audio pass": {"share": "1"}}}',
        '{"a": {"vision pass": {"bytes": 5, "share": NaN}, "decode step": {"bytes": 5.5, "share": 1}}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_teaches_nothing(tmp_path, text):
    path = tmp_path / "devices.json"
    path.write_bytes(text.encode("latin-1"))
    assert recall("a", path).excess == {}


def test_where_nothing_can_be_written_nothing_fails(tmp_path):
    (tmp_path / "file").write_text("")
    keep(Learned("a", VISION), tmp_path / "file" / "devices.json")
    assert not (tmp_path / "file").read_text()


def test_the_file_reads_for_people(tmp_path):
    path = tmp_path / "devices.json"
    keep(Learned("H100, PyTorch 2.11", VISION), path)
    assert json.loads(path.read_text()) == {"H100, PyTorch 2.11": {"vision pass": {"bytes": 25, "share": 0.5}}}


@pytest.mark.parametrize(
    ("seen", "changed"),
    [
        ("vision pass", {"vision pass", "cropping"}),
        ("audio pass", {"audio pass"}),
        ("mixed step", {"prefill chunk", "decode step", "kernel step", "logits"}),
    ],
)
def test_a_plan_leaves_room_for_what_was_learned(seen, changed):
    device = DeviceFacts("cuda", "a device", 4 * GIB, 4 * GIB)
    wiser = replace(device, learned=Learned("a device", {seen: Excess(50 * MIB, 1e6)}))
    engine = EngineConfig(rows=4, step_tokens=512, crops_per_pass=2, windows_per_pass=1)
    before, after = (make_plan(demo_config(), facts, engine) for facts in (device, wiser))
    grown = {a.name: a.bytes - b.bytes for a, b in zip(after.costs, before.costs, strict=True) if a != b}
    assert {grown.pop(kind) for kind in changed} == {50 * MIB}
    assert set(grown) <= {"largest step", "allocator"}
    assert all("on this device" in cost.formula for cost in after.costs if cost.name in changed)
