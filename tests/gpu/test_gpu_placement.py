"""Weights on the host of a GPU: pinned, brought behind what still reads their room, and at the same addresses again."""

import pytest
import torch

from memphi import load, official
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.random import random_model
from memphi.config import ADAPTERS, ROOMS, TOWERS, EngineConfig
from memphi.memory import costs
from memphi.model.rooms import groups_of, slots
from tests.checkpoints import tiny_config
from tests.scenes import Stage, alone, lively_model, mixed_requests, tiny_tokenizer

DEVICE = torch.device("cuda")
MOVED = [placement for placement in ROOMS if placement != "resident"]
PLACEMENTS = pytest.mark.parametrize("placement", MOVED)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@PLACEMENTS
def test_answers_are_those_of_resident_weights(placement):
    tokenizer = tiny_tokenizer()
    expected = [result.ids for result in alone(lively_model().to(DEVICE), tokenizer, mixed_requests())]
    model = lively_model().to(DEVICE)
    model.place(placement)
    stage = Stage(model, tokenizer, 128, rows=8)
    for _ in range(2):  # Once more, with graphs that were captured before groups went and came.
        assert stage.ids(mixed_requests()) == expected
    stage.check_empty()


def test_graphs_stand_when_a_group_comes_back():
    """Packed adapters stay and are in graphs; the towers come and go beside them."""
    tokenizer = tiny_tokenizer()
    answers = []
    for placement in ("resident", "towers"):
        model = lively_model(tiny_config(short_tokens=4096, max_tokens=8192)).to(DEVICE)
        model.keep_adapters(True, None)
        model.place(placement)
        stage = Stage(model, tokenizer, 128, rows=8)
        answers.append([stage.ids(mixed_requests()) for _ in range(3)])
    assert answers[0] == answers[1]


@torch.inference_mode()
def test_a_copy_waits_for_what_still_reads_the_room():
    """Products with one group are queued, and the next group comes at once: the first still see their own."""
    model = random_model(tiny_config(), DEVICE, torch.float32)
    model.place("adapters")
    room, groups = model.rooms["vision adapter"], groups_of(model)
    room.bring("vision adapter")
    weight = next(tensor for _, name, tensor, _ in slots(groups["vision adapter"]) if name == "b")
    kept = weight.clone()
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    early = weight.clone()
    room.bring("speech adapter")
    room.bring("vision adapter")
    late = weight.clone()
    assert torch.equal(early, kept)
    assert torch.equal(late, kept)


@PLACEMENTS
def test_what_is_on_the_host_is_pinned_and_the_device_holds_what_is_priced(placement):
    """At official sizes; while they are made, too, no group is there whole that is to lie on the host."""
    config = read_config(official.folder())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    model = random_model(config, DEVICE, torch.bfloat16, scheme="int4", placement=placement)
    model.place(placement)
    taken = torch.cuda.memory_allocated(DEVICE) - before
    priced = sum(cost.bytes for cost in costs.placed_weights(model.config, 2, "plain", placement))
    assert priced <= taken <= 1.01 * priced
    rounding = costs.weights_rounding(model.config, 2, "plain", placement).bytes
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) - before <= priced + rounding + 64 * 2**20
    for room in set(model.rooms.values()):
        assert all(chunk.is_pinned() for chunks in room._chunks.values() for chunk in chunks)
    assert model.rooms.keys() == {name for names in ROOMS[placement] for name in names} <= {*TOWERS, *ADAPTERS}


@PLACEMENTS
def test_an_engine_is_loaded_so(placement):
    engine = load("demo", device="cuda", config=EngineConfig(scheme="int8", placement=placement))
    resident = load("demo", device="cuda", config=EngineConfig(scheme="int8", placement="resident", kernels="plain"))
    assert engine.model.placement == placement
    texts = [[answer.text for answer in each.generate(mixed_requests())] for each in (engine, resident)]
    engine.close()
    resident.close()
    assert len(texts[0]) == len(texts[1]) == len(mixed_requests())
