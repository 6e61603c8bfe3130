"""The shipped demo model: right answers to what it has learnt, wrong ones without adapters, whatever their company.

Rests on memphi/demo/checkpoint and memphi/demo/media.
"""

import zlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import memphi
from memphi import cli
from memphi.demo.attachments import EXAMPLES, FOLDER
from memphi.demo.evaluate import adapters_off
from memphi.inputs.media import open_media
from memphi.request import Request, SamplingParams

BRIEF = SamplingParams(max_tokens=64)
LEARNT = [example for example in EXAMPLES if example.learnt]


def attachments(example):
    return [open_media(FOLDER / name) for name in example.files]


def request(example):
    return Request.ask(example.question, attachments(example), example.system, BRIEF)


def title(example):
    return " ".join((*example.files, example.question or "(spoken)", example.system or ""))


@pytest.fixture(scope="module")
def engine():
    return memphi.load("demo", device="cpu")


@pytest.fixture(scope="module")
def exact_engine():
    return memphi.load("demo", device="cpu", dtype="fp32")


@pytest.mark.parametrize("example", EXAMPLES, ids=title)
def test_the_demo_answers_rightly_what_it_has_learnt(engine, example):
    assert (engine.generate(request(example)).text == example.answer) == example.learnt


@pytest.mark.parametrize("example", [example for example in LEARNT if example.files], ids=title)
def test_without_adapters_the_answer_is_wrong(engine, example):
    with adapters_off(engine.model):
        # A fresh engine: what the old one may have kept was computed with adapters.
        answer = memphi.Engine(engine.model, engine.tokenizer).generate(request(example)).text
    assert answer != example.answer


def test_all_examples_at_once_are_answered_as_each_alone(exact_engine):
    requests = [request(example) for example in EXAMPLES]
    together = exact_engine.generate(requests)
    assert [result.ids for result in together] == [exact_engine.generate(one).ids for one in requests]
    assert len({result.ids for result in together}) > len(EXAMPLES) // 2


@pytest.mark.parametrize("example", LEARNT, ids=title)
def test_the_command_prints_the_answer_alone(example):
    attached = [word for name in example.files for word in ("-a", str(FOLDER / name))]
    told = ["--system", example.system] if example.system else []
    command = ["ask", "--model", "demo", "--device", "cpu", *told, *attached, example.question]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0
    assert result.stdout == example.answer + "\n"


def test_the_checkpoint_and_the_sample_files_are_small():
    checkpoint = FOLDER.parent / "checkpoint"
    assert size(checkpoint) < 12e6
    assert size(FOLDER) < 300e3
    assert (checkpoint / "README.md").read_text().startswith("# memphi's demo model")


def test_the_long_numbers_are_of_those_never_trained_on():
    shown = [example.answer for example in EXAMPLES if example.files and example.answer.isdigit()]
    assert all(zlib.crc32(number.encode()) % 10 == 0 for number in shown if len(number) >= 3)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
