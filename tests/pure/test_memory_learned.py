"""What was learned of a device, and what becomes of it in the next plan."""

import json
from dataclasses import replace

import pytest

from memphi.config import EngineConfig
from memphi.demo.shape import demo_config
from memphi.memory.costs import GIB, MIB
from memphi.memory.devices import DeviceFacts
from memphi.memory.learned import MOST_EXCESS_BYTES, Learned, keep, recall
from memphi.memory.planner import make_plan


def test_a_formula_that_was_below_the_truth_is_corrected_from_then_on():
    learned = Learned("card").seen("decode step", 1000, 1100)
    assert learned.price("decode step", 5000) == 5100
    assert learned.price("vision pass", 1000) == 1000


def test_only_a_larger_excess_changes_what_is_known():
    learned = Learned("card").seen("decode step", 1000, 1100)
    assert learned.seen("decode step", 1000, 1050) is learned
    assert learned.seen("decode step", 1000, 900) is learned
    assert learned.seen("decode step", 1000, 1200).price("decode step", 1000) == 1200


def test_no_correction_goes_beyond_all_measure():
    assert Learned("card").seen("logits", 0, 1 << 40).excess_bytes == {"logits": MOST_EXCESS_BYTES}


def test_it_is_kept_for_each_device(tmp_path):
    path = tmp_path / "deep" / "devices.json"
    first, second = Learned("a", {"vision pass": 25}), Learned("b", {"decode step": 5})
    keep(first, path)
    keep(second, path)
    assert recall("a", path) == first
    assert recall("b", path) == second
    assert recall("c", path) == Learned("c")
    assert [entry.name for entry in path.parent.iterdir()] == ["devices.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", '{"a": 3}', '{"a": {"vision pass": "much", "decode step": -5, "logits": 1e9}}', "\x00\xff"],
)
def test_a_damaged_file_teaches_nothing(tmp_path, text):
    path = tmp_path / "devices.json"
    path.write_bytes(text.encode("latin-1"))
    assert recall("a", path).excess_bytes == {}


def test_where_nothing_can_be_written_nothing_fails(tmp_path):
    (tmp_path / "file").write_text("")
    keep(Learned("a", {"vision pass": 25}), tmp_path / "file" / "devices.json")
    assert not (tmp_path / "file").read_text()


def test_the_file_reads_for_people(tmp_path):
    path = tmp_path / "devices.json"
    keep(Learned("H100, PyTorch 2.11", {"vision pass": 25}), path)
    assert json.loads(path.read_text()) == {"H100, PyTorch 2.11": {"vision pass": 25}}


@pytest.mark.parametrize(
    ("seen", "changed"),
    [
        ("vision pass", {"vision pass"}),
        ("audio pass", {"audio pass"}),
        ("mixed step", {"prefill chunk", "decode step", "logits"}),
    ],
)
def test_a_plan_leaves_room_for_what_was_learned(seen, changed):
    device = DeviceFacts("cuda", "a device", 4 * GIB, 4 * GIB)
    wiser = replace(device, learned=Learned("a device", {seen: 50 * MIB}))
    engine = EngineConfig(rows=4, step_tokens=512, crops_per_pass=2, windows_per_pass=1)
    before, after = (make_plan(demo_config(), facts, engine) for facts in (device, wiser))
    grown = {a.name: a.bytes - b.bytes for a, b in zip(after.costs, before.costs, strict=True) if a != b}
    assert {grown.pop(kind) for kind in changed} == {50 * MIB}
    assert set(grown) <= {"largest step", "allocator"}
    assert all("on this device" in cost.formula for cost in after.costs if cost.name in changed)
