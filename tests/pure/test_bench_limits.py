"""The limits of the official sizes are those that were worked out by hand, and grow as the arithmetic does."""

from dataclasses import replace

import pytest

from memphi import official
from memphi.bench.limits import Card, Phase, Task, clip_operations, crop_operations, least, phases
from memphi.bench.workloads import WORKLOADS
from memphi.config import ModelConfig
from memphi.inputs.audio import clip_footprint
from memphi.inputs.image import footprint as image_footprint
from memphi.request import Footprint, InputMode

H100 = Card("H100", 3.1e12, 794e12)


@pytest.fixture(scope="module")
def config():
    return ModelConfig.from_folder(official.folder())


def tasks_of(workload, config):
    """The sizes of a workload's requests, without making them."""
    height, width = workload.size
    images = (image_footprint(width, height, config.vision),) * workload.images
    clips = (clip_footprint(round(100 * workload.seconds) - 2, config.audio),) if workload.seconds else ()
    tasks = []
    for number in range(workload.requests):
        mode = workload.adapters[number % len(workload.adapters)]
        if workload.attaches:
            mode = InputMode.of(images=bool(images), audio=bool(clips))
        footprint = Footprint(mode, workload.prompt_tokens, images, clips)
        tasks.append(Task(footprint, workload.answer_tokens, mode.adapter))
    return tasks


@pytest.mark.parametrize(
    ("name", "limit", "tolerance"),
    [
        # One row by hand reads no keys and values; with them it is one part in a hundred less.
        ("decode-1", 404, 0.02),
        ("decode-1-vision", 368, 0.02),
        ("decode-64", 10_400, 0.01),
        ("mixed", 9_400, 0.01),
        ("decode-256", 14_900, 0.01),
        ("mixed-256", 13_900, 0.01),
        ("prefill", 0.13, 0.02),
        ("describe-8", 0.23, 0.02),
        ("describe-1", 0.72, 0.01),
        ("describe-64", 18.4, 0.01),
        ("transcribe", 0.10, 0.08),
    ],
)
def test_the_limits_are_those_worked_out_by_hand(config, name, limit, tolerance):
    workload = WORKLOADS[name]
    figure = workload.figure(least(phases(config, tasks_of(workload, config), 2), H100))
    assert figure == pytest.approx(limit, rel=tolerance)


def test_a_phase_takes_the_longer_of_reading_and_computing():
    card = Card("a card", 10, 100)
    assert Phase("reads", 50, 100).seconds(card) == 5
    assert Phase("computes", 10, 500).seconds(card) == 5


def test_only_adapters_in_use_are_read_and_computed(config):
    plain, vision, both = (tasks_of(WORKLOADS[name], config) for name in ("decode-64", "decode-64", "mixed"))
    vision = [replace(task, adapter="vision") for task in vision]
    decoding = [phases(config, tasks, 2)[2] for tasks in (plain, vision, both)]
    adapter_bytes = 45056 * 256 * 32 * 2
    assert decoding[1].bytes - decoding[0].bytes == 127 * adapter_bytes
    assert decoding[2].bytes - decoding[0].bytes == 127 * (adapter_bytes + adapter_bytes * 320 // 256)
    assert decoding[1].operations - decoding[0].operations == 127 * 64 * adapter_bytes


def test_every_step_reads_the_keys_and_values_so_far(config):
    one = Task(Footprint(InputMode.TEXT, 100, (), ()), 2, None)
    two = replace(one, answer_tokens=3)
    token_bytes = 32 * 2 * 1024 * 2
    first, second = (phases(config, [task], 2)[2].bytes for task in (one, two))
    assert second - first == first + token_bytes
    assert phases(config, [replace(one, answer_tokens=1)], 2)[2] == Phase("decode", 0, 0)


def test_towers_are_read_where_something_is_encoded(config):
    text, picture, sound = (tasks_of(WORKLOADS[name], config) for name in ("decode-1", "describe-1", "transcribe"))
    encoding = [phases(config, tasks, 2)[0] for tasks in (text, picture, sound)]
    assert encoding[0] == Phase("encode", 0, 0)
    assert encoding[1].operations > 7 * crop_operations(config.vision)
    assert encoding[2].operations > clip_operations(config.audio, 7500)
    assert 0 < encoding[1].bytes < encoding[2].bytes


def test_sound_costs_by_the_window_and_pictures_by_the_crop(config):
    tokens = config.audio.window_tokens
    assert clip_operations(config.audio, 4 * tokens) == 4 * clip_operations(config.audio, tokens)
    assert clip_operations(config.audio, tokens) > 2 * clip_operations(config.audio, tokens // 2)
    assert crop_operations(config.vision) == pytest.approx(0.936e12, rel=0.01)
