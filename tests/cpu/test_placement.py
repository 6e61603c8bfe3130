"""Weights on the host until they are needed: no answer changes, and the map stays true whatever goes wrong."""

import copy
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memphi import load, official
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.random import random_model
from memphi.config import ADAPTERS, ROOMS, TOWERS, EngineConfig
from memphi.demo.shape import demo_config
from memphi.engine.engine import Engine
from memphi.memory import costs
from memphi.model import rooms
from memphi.model.phi4mm import Phi4MM
from memphi.model.rooms import Room, groups_of, lay_out, layers_of, room_bytes, slots
from memphi.model.rows import Row
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.faults import KINDS, Faults
from tests.scenes import Stage, mixed_requests

CPU = torch.device("cpu")
MOVED = [placement for placement in ROOMS if placement != "resident"]
PLACEMENTS = pytest.mark.parametrize("placement", MOVED)


class Copies(TorchDispatchMode):
    """Counts copies into rooms, and lets those at the numbers given fail."""

    def __init__(self, at=()):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[0].dtype is torch.uint8:
            self.count += 1
            if self.count - 1 in self.at:
                raise KINDS["runtime"]()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def placed(model, tokenizer):
    """Make a loop over a copy of the model whose weights lie as given."""

    def make(placement, pages=128, rows=8, **settings):
        moved = copy.deepcopy(model)
        moved.place(placement)
        return Stage(moved, tokenizer, pages, rows=rows, **settings)

    return make


def check_map(stage):
    """What a room says it holds is what is in it: the weights that the group had at first."""
    for room in set(stage.model.rooms.values()):
        if room.holds is not None:
            held = torch.cat(room._chunks[room.holds])
            assert torch.equal(room._memory[: len(held)], held)


# --- rooms ---------------------------------------------------------------------------------------------------------


def test_a_group_that_comes_back_is_the_same_at_the_same_addresses(monkeypatch, model):
    monkeypatch.setattr(rooms, "CHUNK_BYTES", 1000)  # Tensors go across the borders of chunks.
    moved = copy.deepcopy(model)
    groups = {name: groups_of(moved)[name] for name in (*TOWERS, *ADAPTERS)}
    expected = {name: [tensor.clone() for _, _, tensor, _ in slots(modules)] for name, modules in groups.items()}
    room = Room(groups, CPU)
    addresses = {name: [t.data_ptr() for _, _, t, _ in slots(modules)] for name, modules in groups.items()}
    for name in (*groups, *groups, "vision tower"):
        with Copies(set()) as copies:
            room.bring(name)
            assert room.holds == name
            made = copies.count
            room.bring(name)
        assert made == copies.count > 0
        tensors = [tensor for _, _, tensor, _ in slots(groups[name])]
        assert all(map(torch.equal, tensors, expected[name]))
        assert [tensor.data_ptr() for tensor in tensors] == addresses[name]
        assert all(pointer % 64 == tensors[0].data_ptr() % 64 for pointer in addresses[name])


def test_a_copy_that_fails_leaves_the_room_empty(model):
    moved = copy.deepcopy(model)
    moved.place("towers")
    room = moved.rooms["vision tower"]
    assert room is moved.rooms["audio encoder"]
    room.bring("vision tower")
    with Copies({0}), pytest.raises(RuntimeError, match="out of memory"):
        room.bring("audio encoder")
    assert room.holds is None
    room.bring("vision tower")
    assert room.holds == "vision tower"


@pytest.mark.parametrize("config", [read_config(official.folder()), demo_config()], ids=["official", "demo"])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "fp8"])
def test_rooms_take_what_they_are_priced_at(config, scheme):
    with torch.device("meta"):
        model = Phi4MM(config).to(torch.bfloat16)
        model.quantise(scheme)
    groups = groups_of(model)
    assert groups.keys() == {*TOWERS, *ADAPTERS}
    for name, modules in groups.items():
        assert room_bytes(modules) == costs.room(model.config, 2, "plain", (name,)).bytes, name
    layers = {room_bytes(modules) for modules in layers_of(model)}
    assert layers == {costs.layer_room_bytes(model.config, 2)}


@PLACEMENTS
def test_the_device_holds_what_the_plan_says(placement):
    """All that the model's tensors lie in, rooms once."""
    model = random_model(tiny_config(), CPU, torch.bfloat16, placement=placement)
    model.place(placement)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    priced = sum(cost.bytes for cost in costs.placed_weights(model.config, 2, "plain", placement))
    assert sum(storages.values()) == priced


@pytest.mark.parametrize("placement", ROOMS)
@pytest.mark.parametrize(("scheme", "packed"), [("bf16", True), ("int4", True), ("int4", False)])
def test_what_stays_lies_in_one_piece_as_priced(placement, scheme, packed):
    """At official sizes; that piece and the rooms are what the allocator is asked for, in whole segments."""
    if packed and placement not in ("resident", "towers"):
        pytest.skip("packed adapters come together")
    form = "packed" if packed else "plain"
    with torch.device("meta"):
        model = Phi4MM(read_config(official.folder())).to(torch.bfloat16)
        model.quantise(scheme)
    model.keep_adapters(packed, None)
    groups = groups_of(model)
    layers = layers_of(model) if placement == "streamed" else []
    sizes = [max(room_bytes(groups[name]) for name in room) for room in ROOMS[placement]]
    sizes += [room_bytes(modules) for modules in layers[:2]]
    moved = [groups[name] for room in ROOMS[placement] for name in room] + layers
    for module in (module for modules in moved for module in modules):
        module._parameters = dict.fromkeys(module._parameters)
        module._buffers = dict.fromkeys(module._buffers)
    lay_out(model, "meta")
    (piece,) = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in model.state_dict().values()
    }.values()
    asked = sum(-(-size // (2 * costs.MIB)) * 2 * costs.MIB for size in (piece.nbytes(), *sizes))
    priced = costs.placed_weights(model.config, 2, form, placement)
    rounding = costs.weights_rounding(model.config, 2, form, placement)
    assert sum(cost.bytes for cost in (*priced, rounding)) == asked


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_a_model_in_one_piece_is_filled_like_any_other(tmp_path, monkeypatch, scheme, packed):
    folder = tiny_checkpoint(tmp_path / "model")
    expected = load_model(folder, CPU, torch.bfloat16, packed=packed, scheme=scheme).state_dict()
    monkeypatch.setattr(Phi4MM, "take_memory", lambda model, device, _: lay_out(model, device))
    state = load_model(folder, CPU, torch.bfloat16, packed=packed, scheme=scheme).state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 1
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_layers_are_computed_as_each_is_there(model):
    """Two rooms, and each layer's own numbers in its room when its turn comes."""
    moved = copy.deepcopy(model)
    expected = [[t.clone() for _, _, t, _ in slots(modules)] for modules in layers_of(moved)]
    moved.place("streamed")
    assert [len(modules) > 4 for modules in layers_of(moved)] == [True] * len(expected)
    for _ in range(2):
        for wanted, modules, _ in zip(
            expected, layers_of(moved), moved.language.bring(moved.language.layers), strict=True
        ):
            assert all(map(torch.equal, [tensor for _, _, tensor, _ in slots(modules)], wanted))


# --- loading -------------------------------------------------------------------------------------------------------


@PLACEMENTS
@pytest.mark.parametrize("scheme", ["bf16", "int4"])
@torch.inference_mode()
def test_loaded_to_the_host_is_what_is_loaded_otherwise(tmp_path, placement, scheme):
    folder = tiny_checkpoint(tmp_path / "model", dtype=torch.float32)
    resident = load_model(folder, CPU, torch.float32, scheme=scheme)
    drawn = random_model(tiny_config(), CPU, torch.float32, scheme=scheme, placement=placement)
    for moved in (load_model(folder, CPU, torch.float32, scheme=scheme, placement=placement), drawn):
        moved.place(placement)
        expected, groups = groups_of(resident), groups_of(moved)
        for name in moved.rooms:
            moved.rooms[name].bring(name)
            pairs = zip(slots(groups[name]), slots(expected[name]), strict=True)
            assert all(torch.equal(ours.float(), theirs.float()) for (_, _, ours, _), (_, _, theirs, _) in pairs), name


@PLACEMENTS
def test_the_engine_does_as_it_is_told(placement):
    settings = EngineConfig(scheme="int8", placement=placement)
    with closing(load("demo", device="cpu", dtype="bf16", config=settings)) as engine:
        assert engine.plan.placement == engine.model.placement == placement
        assert engine.model.rooms.keys() == {name for room in ROOMS[placement] for name in room}
        answers = engine.generate(mixed_requests())
        again = Engine(engine.model, engine.loop._tokenizer)
        assert again.plan.placement == placement
        again.close()
    with closing(load("demo", device="cpu", dtype="bf16", config=replace(settings, placement="resident"))) as engine:
        assert [answer.ids for answer in engine.generate(mixed_requests())] == [answer.ids for answer in answers]


# --- answers -------------------------------------------------------------------------------------------------------


@PLACEMENTS
@pytest.mark.parametrize(
    "settings", [{}, {"step_tokens": 50, "crops_per_pass": 2}, {"rows": 1}, {"speculation": False}]
)
def test_answers_are_those_of_resident_weights(placed, expected, placement, settings):
    """All modes at once, in the same steps."""
    stage = placed(placement, **settings)
    with Copies() as copies:
        assert stage.ids(mixed_requests()) == expected
    assert copies.count >= len(stage.model.rooms)
    check_map(stage)
    stage.check_empty()


def test_without_a_cache_too(placed, expected):
    assert placed("shared", None, kv_cache=False).ids(mixed_requests()) == expected


@PLACEMENTS
def test_what_nobody_asks_for_never_comes(placed, placement):
    stage = placed(placement)
    with Copies() as copies:
        stage.answer([mixed_requests()[0]])
    assert copies.count == 0 or placement == "streamed"
    assert all(room.holds is None for room in stage.model.rooms.values())


def test_requests_of_one_mode_bring_what_they_need_once(placed):
    stage = placed("adapters")
    with Copies() as copies:
        for _ in range(3):
            stage.answer([mixed_requests()[1]])
    assert copies.count == 2
    assert {room.holds for room in stage.model.rooms.values()} == {"vision tower", "vision adapter"}


def test_a_step_with_both_adapters_is_computed_in_two_passes(placed, monkeypatch):
    stage = placed("adapters")
    seen = []
    forward = Phi4MM.forward

    def watch(self, ids, rows, *arguments):
        seen.append({row.adapter for row in rows if row.adapter})
        return forward(self, ids, rows, *arguments)

    monkeypatch.setattr(Phi4MM, "forward", watch)
    stage.answer(mixed_requests())
    assert {"vision"} in seen
    assert {"speech"} in seen
    assert all(len(adapters) <= 1 for adapters in seen)


def test_two_adapters_in_one_pass_are_refused(model):
    moved = copy.deepcopy(model)
    moved.place("adapters")
    with pytest.raises(AssertionError, match="their room is for one adapter"):
        moved(torch.arange(2), [Row(1, adapter="vision"), Row(1, adapter="speech")])


# --- what goes wrong -----------------------------------------------------------------------------------------------


@PLACEMENTS
def test_a_copy_that_fails_is_made_again(placed, expected, placement):
    counted = placed(placement)
    with Copies() as copies:
        counted.answer(mixed_requests())
    for at in range(0, copies.count, max(copies.count // 5, 1)):
        stage = placed(placement)
        with Copies({at}):
            assert stage.ids(mixed_requests()) == expected
        assert sum(stage.loop.stats.rungs.values()) == 1
        check_map(stage)
        stage.check_empty()


@PLACEMENTS
def test_a_fault_anywhere_changes_no_answer(placed, expected, placement):
    counted = placed(placement, step_tokens=100)
    with Faults() as faults:
        counted.answer(mixed_requests())
    for at in range(0, faults.allocations, faults.allocations // 6):
        stage = placed(placement, step_tokens=100)
        with Faults({at}, pool=stage.pool):
            assert stage.ids(mixed_requests()) == expected
        check_map(stage)
        stage.check_empty()


@PLACEMENTS
def test_a_cancelled_request_leaves_the_others_alone(placed, expected, placement):
    for steps in range(1, 12, 3):
        for number in (1, 2, 4):
            stage = placed(placement)
            for request in mixed_requests():
                stage.submit(request)
            for _ in range(steps):
                stage.step()
            stage.cancel(number)
            stage.run()
            others = [i for i in range(5) if i != number]
            assert [stage.result(i).ids for i in others] == [expected[i] for i in others]
            check_map(stage)
            stage.check_empty()
