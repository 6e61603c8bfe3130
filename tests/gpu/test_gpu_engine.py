"""On CUDA the engine answers as it should, and takes and gives back the card's memory as it says."""

import asyncio
import gc
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import memphi
from memphi.config import EngineConfig
from memphi.engine.device import cap_allocator
from memphi.engine.engine import Engine
from memphi.engine.sequence import State
from memphi.memory.sizing import reserve_bytes
from memphi.request import FinishReason, Request
from tests.checkpoints import tiny_config
from tests.scenes import GREEDY, Stage, conversation, lively_model, mixed_requests, tiny_tokenizer

DEVICE = torch.device("cuda")
MIB = 2**20
DIAL_BYTES = 2048 * MIB
LONG = replace(GREEDY, max_tokens=40)
LONG_TEXT_TOKENS = 3500
LEFT_BYTES = 1024 * MIB
"""What the other process leaves free."""
NEIGHBOUR = f"""
import sys, torch
for line in sys.stdin:
    if line == "take\\n":
        held = torch.empty(torch.cuda.mem_get_info()[0] - {LEFT_BYTES}, dtype=torch.uint8, device="cuda")
    else:
        del held
        torch.cuda.empty_cache()
    print("done", flush=True)
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def neighbour():
    """Another process that takes all but a little of the card, and gives it back; torch is imported early."""
    process = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def tell(word):
        process.stdin.write(word + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    yield tell
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def model(neighbour):
    """Heads of the official size, which the fast kernels take, and pages of 128 KiB."""
    config = tiny_config(1024, 4, 8, 2, 2048, short_tokens=4096, max_tokens=8192)
    return lively_model(config).to(DEVICE)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def stage(model, tokenizer):
    def make(pages=None, memory_bytes=DIAL_BYTES, **settings):
        return Stage(model, tokenizer, pages, memory_bytes=memory_bytes, kernels="plain", **settings)

    return make


@pytest.fixture(scope="module")
def expected(stage):
    """Each request's answer alone."""
    return [stage().ids([request])[0] for request in mixed_requests(LONG)]


@pytest.fixture(scope="module")
def long_request(model, tokenizer):
    """A text that takes 28 MiB of keys and values, and much more to be computed at once."""
    words = tokenizer.encode_text("word " * 100)
    text = "word " * (LONG_TEXT_TOKENS * 100 // len(words))
    return Request.ask(text, sampling=replace(GREEDY, max_tokens=4))


def test_a_mixed_batch_equals_each_alone(stage, expected):
    together = stage()
    assert together.pool.is_mapped
    assert together.ids(mixed_requests(LONG)) == expected
    assert len(set(expected)) == len(expected)
    assert all(len(set(ids)) > 4 for ids in expected)
    together.check_empty()


def test_a_prefix_that_is_found_changes_no_answer(stage):
    alone = [stage().ids([conversation(turns)])[0] for turns in (1, 2, 3)]
    shared = stage()
    assert [shared.ids([conversation(turns)])[0] for turns in (1, 2, 3)] == alone
    assert shared.loop.stats.shared_tokens >= 32
    shared.check_empty()


def test_one_that_is_paused_and_resumed_gives_the_same_answer(stage, expected, monkeypatch):
    monkeypatch.setattr("memphi.engine.admission.FIRST_ANSWER_TOKENS", 16)
    whole = stage()
    longest = max(whole.loop.scheduler.reservations.pages_for(tokens) for tokens in _tokens(whole))
    tight = stage(pages=longest + 2)
    assert tight.ids(mixed_requests(LONG)) == expected
    assert tight.loop.stats.pauses > 0
    tight.check_empty()


def _tokens(staged):
    """How long the sequences of all requests become."""
    numbers = [staged.submit(request) for request in mixed_requests(LONG)]
    staged.run()
    return [staged.result(number).footprint.prompt_tokens + LONG.max_tokens for number in numbers]


def test_a_real_cap_is_recovered_from(stage, expected, long_request):
    whole = stage().ids([long_request])
    gc.collect()
    torch.cuda.empty_cache()
    struck = stage()
    cap_bytes = torch.cuda.memory_reserved() + 64 * MIB  # The whole text at once takes more than twice that.
    struck.loop.runner.gauge.cap = lambda: cap_allocator(DEVICE, cap_bytes)
    struck.loop.runner.gauge.cap()
    assert struck.ids([long_request]) == whole
    assert struck.loop.stats.rungs["halve the prefill chunk"] > 0
    assert struck.ids(mixed_requests(LONG)) == expected
    assert torch.cuda.memory_reserved() <= cap_bytes
    struck.check_empty()


def test_a_closed_engine_leaves_the_card_to_others():
    held = memphi.load("demo", "cuda", config=EngineConfig(memory_bytes=DIAL_BYTES))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(DIAL_BYTES, dtype=torch.uint8, device=DEVICE)
    held.close()
    assert torch.empty(DIAL_BYTES, dtype=torch.uint8, device=DEVICE).is_cuda


def test_an_idle_engine_gives_its_memory_back(stage, long_request):
    idle = stage(idle_seconds=0.05)
    idle.ids([long_request])
    assert idle.loop.scheduler.reservations.pages.idle_pages
    mapped_bytes, free_bytes = idle.pool.mapped_bytes, torch.cuda.mem_get_info()[0]
    assert mapped_bytes >= 24 * MIB
    time.sleep(0.06)
    idle.step()
    assert idle.pool.mapped_bytes == 2 * MIB
    assert torch.cuda.mem_get_info()[0] - free_bytes >= mapped_bytes - 4 * MIB
    assert len(idle.ids([long_request])[0]) == 4


def test_the_pool_makes_way_for_another_process(stage, expected, neighbour, monkeypatch):
    monkeypatch.setattr("memphi.engine.elastic.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("memphi.cache.pool.MAPPED_AT_ONCE", 1)  # These pages are small.
    shared = stage(memory_bytes=None)
    numbers = [shared.submit(request) for request in mixed_requests(LONG)]
    while any(sequence.state is not State.RUNNING for sequence in shared.scheduler.sequences):
        shared.step()
    pages = shared.scheduler.reservations.pages
    most, mapped_bytes = pages.capacity, shared.pool.mapped_bytes
    neighbour("take")
    for _ in range(4):
        shared.step()
        shared.scheduler.check()
    assert torch.cuda.mem_get_info()[0] < reserve_bytes(torch.cuda.mem_get_info()[1]) // 2
    assert pages.capacity < most
    assert shared.pool.mapped_bytes < mapped_bytes
    assert any(sequence.state is State.WAITING for sequence in shared.scheduler.sequences)
    neighbour("give back")
    shared.step()
    assert pages.capacity == most
    shared.run()
    assert [shared.result(number).ids for number in numbers] == expected
    shared.check_empty()


def test_the_dial_is_kept_at_every_step(stage, expected, long_request):
    dialled = stage()
    allowed_bytes = dialled.plan.budget_bytes - dialled.plan.context_bytes
    for request in [*mixed_requests(LONG), long_request]:
        dialled.submit(request)
    held, most = [], []
    while dialled.loop.has_work:
        dialled.step()
        held.append(torch.cuda.memory_reserved() + dialled.pool.mapped_bytes)
        most.append(torch.cuda.max_memory_reserved() + dialled.pool.mapped_bytes)
    assert max(held) <= max(most) <= allowed_bytes <= DIAL_BYTES
    assert dialled.loop.runner.gauge.peak_bytes() <= allowed_bytes
    assert [dialled.result(number).ids for number in range(len(expected))] == expected


def test_the_monitor_hears_of_every_kind_of_step(stage):
    watched = stage()
    watched.ids(mixed_requests(LONG))
    records = watched.loop.runner.gauge.monitor.records()
    # Whether an answer begins while prompts are still computed, the speed of this machine tells.
    assert set(records) - {"mixed step"} == {"vision pass", "audio pass", "prefill chunk", "decode step"}
    assert all(record.steps > 0 and record.highest_ratio > 0 for record in records.values())
    assert sum(record.steps for record in records.values()) >= watched.loop.stats.steps


def test_streams_and_asyncio_get_the_same_answers(model, tokenizer, expected):
    engine = Engine(model, tokenizer, EngineConfig(memory_bytes=DIAL_BYTES))
    requests = mixed_requests(LONG)
    results = engine.generate(requests)
    assert [result.ids for result in results] == expected
    pieces = list(engine.stream(requests[1]))
    assert "".join(piece.text for piece in pieces) == results[1].text
    assert pieces[-1].finish_reason is FinishReason.LENGTH

    async def text(request):
        return "".join([piece.text async for piece in engine.submit(request)])

    async def texts():
        return await asyncio.gather(*map(text, requests))

    assert asyncio.run(texts()) == [result.text for result in results]
    assert 0 < results[0].peak_memory_bytes <= engine.plan.budget_bytes - engine.plan.context_bytes
    engine.close()
