"""Where weights lie: the plan moves them as little as leaves useful room, and the map adds up to what is priced."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.config import ADAPTERS, ROOMS, TOWERS, EngineConfig
from memphi.demo.shape import demo_config
from memphi.errors import DoesNotFitError, RequestError
from memphi.memory import costs
from memphi.memory.choices import USEFUL_TOKENS
from memphi.memory.costs import GIB
from memphi.memory.devices import DeviceFacts
from memphi.memory.planner import make_plan

OFFICIAL, DEMO = read_config(official.folder()), demo_config()
PLACEMENTS = pytest.mark.parametrize("placement", list(ROOMS))


def planned(gib, config=OFFICIAL, kind="cuda", **settings):
    device = DeviceFacts(kind, "NVIDIA H100", 80 * GIB, 80 * GIB)
    return make_plan(config, device, EngineConfig(memory_bytes=int(gib * GIB), **settings))


def least_gib(**settings):
    """The smallest dial that works, in tenths."""
    for tenths in range(10, 200):
        try:
            planned(tenths / 10, **settings)
        except DoesNotFitError:
            continue
        return tenths / 10
    raise AssertionError("nothing works")


@PLACEMENTS
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4"])
def test_the_map_is_what_is_priced(placement, scheme):
    plan = planned(20, scheme=scheme, placement=placement)
    by_name = {group.name: group for group in plan.groups}
    on_host = {name for room in ROOMS[placement] for name in room}
    streamed = {"language"} if placement == "streamed" else set()
    assert {name for name, group in by_name.items() if group.where == "host"} == on_host | streamed
    assert all(group.reason for group in plan.groups)
    rooms = [max(by_name[name].bytes for name in room) for room in ROOMS[placement]]
    resident = sum(group.bytes for name, group in by_name.items() if name not in on_host | streamed)
    if streamed:
        rooms += [2 * by_name["language"].bytes // OFFICIAL.language.layers]
    taken = sum(cost.bytes for cost in plan.costs if cost.name.startswith("weights: "))
    rounding = next(cost.bytes for cost in plan.costs if cost.name == "weights: allocator")
    assert resident + sum(rooms) <= taken - rounding <= resident + sum(1.001 * size for size in rooms)
    assert taken == plan.weights_bytes


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4"])
def test_each_placement_takes_less_than_the_one_before(scheme):
    least = [least_gib(scheme=scheme, placement=placement) for placement in ROOMS]
    assert least == sorted(set(least), reverse=True)


@pytest.mark.parametrize(
    ("gib", "scheme", "placement"),
    [
        (24, "bf16", "resident"),
        (13, "bf16", "resident"),
        (12, "bf16", "towers"),
        (8, "int8", "resident"),
        (7, "int8", "towers"),
        (6.5, "int8", "adapters"),
        (6, "int4", "resident"),
        (5.5, "int4", "towers"),
        (5.25, "int4", "adapters"),
        (5, "int4", "shared"),
        (4, "int4", "shared"),
        (3.7, "int4", "streamed"),
        (3, "int4", "streamed"),
    ],
)
def test_weights_move_before_they_are_made_smaller(gib, scheme, placement):
    plan = planned(gib)
    assert (plan.scheme, plan.placement) == (scheme, placement)
    if gib > 4:
        assert plan.context_tokens >= USEFUL_TOKENS
        assert f"leaves room for {USEFUL_TOKENS} tokens" in plan.reasons["placement"]
    if placement != "resident":
        assert plan.reasons["placement"].startswith("everything on the device ")


@given(st.floats(3, 40))
def test_what_was_chosen_may_be_asked_for(gib):
    chosen = planned(gib)
    asked = planned(gib, scheme=chosen.scheme, placement=chosen.placement)
    assert replace(asked, reasons={}) == replace(chosen, reasons={})


@given(st.floats(4.5, 40), st.floats(4.5, 40))
def test_a_larger_dial_keeps_useful_room(one, other):
    smaller, larger = sorted((one, other))
    useful = planned(smaller).context_tokens >= USEFUL_TOKENS
    assert not useful or planned(larger).context_tokens >= USEFUL_TOKENS


def test_the_dial_that_a_refusal_names_works():
    with pytest.raises(DoesNotFitError) as error:
        planned(2)
    named = float(str(error.value).partition("--memory ")[2].partition("GiB")[0])
    assert planned(named).placement == "streamed"
    with pytest.raises(DoesNotFitError):
        planned(named - 0.11)


def test_streaming_tells_its_speed_beforehand():
    """1.6 GiB of layers over 12 GB/s."""
    language = next(group for group in planned(3).groups if group.name == "language")
    assert language.where == "host"
    assert "1.6 GiB: 0.14 s a step at least, so 7.0 tokens a second at most for each row (an est" in language.reason


def test_adapters_that_come_and_go_are_plain_and_in_16_bits_they_stay():
    assert planned(5).adapters == "plain"
    assert planned(13).adapters == planned(24).adapters == "packed"
    for tenths in range(int(10 * least_gib(scheme="bf16")), 140):
        assert planned(tenths / 10, scheme="bf16").placement in ("resident", "towers")


def test_on_a_cpu_nothing_moves_unless_asked_to():
    assert planned(20, kind="cpu").placement == "resident"
    assert planned(20, kind="cpu", placement="shared").placement == "shared"
    assert planned(20, kind="cpu", placement="shared").weights_bytes < planned(20, kind="cpu").weights_bytes


def test_a_merged_adapter_stays():
    plan = planned(10.5, merge="vision", scheme="bf16")
    assert (plan.placement, plan.adapters) == ("towers", "merged")
    assert {group.name for group in plan.groups if group.where == "host"} == set(TOWERS)
    with pytest.raises(RequestError, match="with the vision adapter merged there are no adapters to be kept on the"):
        EngineConfig(merge="vision", placement="adapters")


def test_a_placement_that_there_is_not_is_refused():
    with pytest.raises(RequestError, match="placement is 'disk'; it must be one of auto, resident, towers, adapters"):
        EngineConfig(placement="disk")


def test_a_room_is_as_large_as_the_largest_of_its_groups():
    alone = [costs.room(OFFICIAL, 2, "plain", (name,)).bytes for name in (*TOWERS, *ADAPTERS)]
    assert costs.room(OFFICIAL, 2, "plain", (*TOWERS, *ADAPTERS)).bytes == max(alone)
