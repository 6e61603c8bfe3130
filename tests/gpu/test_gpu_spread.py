"""On two cards: an engine on each answers as one alone, and none of them takes anything of the other's card."""

import os
import signal
import time

import pytest
import torch

import memphi
from memphi.config import EngineConfig
from memphi.demo.attachments import EXAMPLES, FOLDER
from memphi.engine import process
from memphi.inputs.media import open_media
from memphi.request import Request, SamplingParams

BRIEF = SamplingParams(max_tokens=24)
CONFIG = EngineConfig(memory_bytes=4 * 2**30, rows=1)
"""One row at a time, so that no sum's order depends on the company."""
NOISE_BYTES = 64 * 2**20
PATIENCE_SECONDS = 120

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def requests():
    return [
        Request.ask(example.question, [open_media(FOLDER / name) for name in example.files], example.system, BRIEF)
        for example in EXAMPLES
    ]


def free_bytes(index):
    return torch.cuda.mem_get_info(index)[0]


def wait_until(holds):
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def expected():
    """Every answer of an engine that is alone, on the first card."""
    engine = process.start("demo", "cuda:0", "fp32", config=CONFIG)
    answers = [engine.generate(request).ids for request in requests()]
    engine.close()
    return answers


def test_answers_are_those_of_one_and_both_have_worked(expected):
    pair = memphi.load("demo", device=["cuda:0", "cuda:1"], dtype="fp32", config=CONFIG)
    assert [result.ids for result in pair.generate(requests())] == expected
    wait_until(lambda: sum(each.stats.ended.total() for each in pair.engines) == len(expected))
    assert min(each.stats.ended.total() for each in pair.engines) >= len(expected) // 4
    pair.close()


def test_an_engine_on_the_second_card_takes_nothing_of_the_first(expected):
    before = [free_bytes(index) for index in (0, 1)]  # This process has its contexts from here on.
    engine = process.start("demo", "cuda:1", "fp32", config=CONFIG)
    assert [engine.generate(request).ids for request in requests()] == expected
    after = [free_bytes(index) for index in (0, 1)]
    engine.close()
    assert before[0] - after[0] < NOISE_BYTES
    assert NOISE_BYTES < before[1] - after[1] <= CONFIG.memory_bytes


def test_in_this_process_the_second_card_is_as_good(expected):
    engine = memphi.load("demo", "cuda:1", "fp32", config=CONFIG)
    assert [engine.generate(request).ids for request in requests()] == expected
    engine.close()


def test_one_that_is_killed_is_started_again_and_the_other_goes_on(expected):
    pair = memphi.load("demo", device=["cuda:0", "cuda:1"], dtype="fp32", config=CONFIG)
    first, second = pair.engines
    pid = first.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: first.pid not in (pid, None))
    assert [result.ids for result in pair.generate(requests())] == expected
    wait_until(lambda: [each.state for each in pair.engines] == ["ready", "ready"])
    assert second.stats.ended.total() > 0
    assert [result.ids for result in pair.generate(requests())] == expected
    assert first.stats.ended.total() > 0
    pair.close()
