"""Evaluation of the demo: what is asked is held out and well divided, adapters come back, and the card tells it all."""

import json
from dataclasses import dataclass

import pytest
import torch

import memphi
from memphi.config import EngineConfig
from memphi.demo import card, evaluate, exam, train
from memphi.demo.bank import write
from memphi.demo.score import DEMANDS
from memphi.demo.shape import demo_config
from memphi.demo.sound import RATE
from memphi.demo.tasks import TASKS, make
from memphi.errors import CheckpointError
from memphi.model.adapters import Adapter
from tests.demo_bank import tiny_bank

SAMPLES = 4


@pytest.fixture(scope="module")
def bank():
    return tiny_bank()


@pytest.fixture(scope="module")
def parts(bank):
    return exam.parts(bank, SAMPLES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, bank):
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    torch.manual_seed(0)
    student = train.Student(demo_config())
    for name, weight in student.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if name.endswith(".b") else 0.05)
    train.write_demo(student, folder)
    return folder


def named(parts, name):
    return next(part for part in parts if part.demand.name == name)


def test_every_task_is_asked_with_samples_that_training_never_watches(bank, parts):
    asked = {part.demand.name: part for part in parts if part.group == "asked"}
    assert set(asked) == set(TASKS)
    assert all(len(part.samples) == SAMPLES for part in asked.values())
    first = make("arithmetic", exam.FIRST_SEED, bank, "held-out")
    assert asked["arithmetic"].samples[0].question == first.question


def test_an_exam_is_the_same_every_time(bank, parts):
    again = exam.parts(bank, SAMPLES)
    assert [part.demand for part in again] == [part.demand for part in parts]
    for one, other in zip(parts, again, strict=True):
        assert [(s.question, s.answer) for s in one.samples] == [(s.question, s.answer) for s in other.samples]


def test_a_closer_look_is_at_long_pictures_and_recordings(parts):
    long = named(parts, "words in wide and tall pictures").samples
    assert all(max(sample.images[0].shape[:2]) >= exam.LONG_SIDE for sample in long)
    squeezed = named(parts, "words in these without crops").samples
    assert [sample.answer for sample in squeezed] == [sample.answer for sample in long]
    assert all(sample.images[0].shape == (112, 112, 3) for sample in squeezed)
    recordings = named(parts, "recordings of 15 to 60 s").samples
    assert all(15 * RATE < len(sample.clips[0]) <= 60 * RATE for sample in recordings)


def test_every_voice_is_heard_alone_and_nothing_is_asked_of_it(parts):
    heard = {part.demand.name: part for part in parts if part.group in ("voices", "tried")}
    assert list(heard) == ["voice voice 9", "words of a person"]
    assert all(part.demand.threshold is None for part in heard.values())
    assert {sample.answer for sample in heard["words of a person"].samples} <= {
        "seven " * n + "seven" for n in range(99)
    }


@dataclass(frozen=True)
class KnowsAll:
    """Stands in for an engine: knows the right answer to each request, unless its adapters are off."""

    model: torch.nn.Module
    answers: dict
    tokenizer = None
    config = None

    def generate(self, requests):
        off = not any(module.b.any() for module in self.model.modules() if isinstance(module, Adapter))
        return [Said(self.answers[_key(request)] if not (off and request.media) else "nothing") for request in requests]

    def close(self):
        pass


@dataclass(frozen=True)
class Said:
    text: str


def _key(request):
    return repr(request.messages)  # tells the digest of every attachment


@pytest.fixture
def knows_all(parts, checkpoint, monkeypatch):
    requests = [(evaluate.request(sample), sample.answer) for part in parts for sample in part.samples]
    answers = {_key(request): answer for request, answer in requests}
    monkeypatch.setattr(evaluate, "Engine", lambda model, *_: KnowsAll(model, answers))
    return KnowsAll(memphi.load(str(checkpoint), device="cpu").model, answers)


def test_right_answers_pass_and_adapters_switched_off_fail(parts, knows_all):
    asked = 0

    def advance(samples):
        nonlocal asked
        asked += samples

    report = evaluate.evaluate(knows_all, parts, advance)
    assert [line.name for line in report.demands] == [demand.name for demand in DEMANDS]
    assert all(line.passed for line in report.demands)
    assert [line.name for line in report.switched_off] == [demand.name for demand in DEMANDS[:-1]]
    assert all(line.on == 1 and line.off == 0 and line.guards for line in report.switched_off)
    assert asked == sum(len(part.samples) * (1 + evaluate.is_guarded(part)) for part in parts)
    assert "missed" not in report.text()


def test_an_adapter_that_hardly_matters_is_told():
    assert not evaluate.SwitchedOff("numbers", on=0.9, off=0.5).guards
    assert evaluate.SwitchedOff("numbers", on=0.9, off=0.4).guards


def test_answers_come_back_in_the_order_of_the_samples(parts, knows_all):
    samples = named(parts, "chat").samples + named(parts, "transcribe").samples + named(parts, "arithmetic").samples
    assert evaluate.ask(knows_all, samples) == [(sample.answer, sample.answer) for sample in samples]


@pytest.mark.parametrize(("scheme", "end"), [("bf16", ".b"), ("int4", ".b.codes")])
def test_adapters_are_off_inside_and_back_afterwards(checkpoint, scheme, end):
    model = memphi.load(str(checkpoint), device="cpu", config=EngineConfig(scheme=scheme)).model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with evaluate.adapters_off(model):
        off = [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]
    assert off
    assert all(".adapters." in name and name.endswith(end) for name in off)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_adapters_come_back_after_an_error(checkpoint):
    model = memphi.load(str(checkpoint), device="cpu").model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyError), evaluate.adapters_off(model):
        raise KeyError
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_commands_measure_a_model_and_write_its_card(bank, parts, checkpoint, tmp_path, monkeypatch, capsys):
    short = [named(parts, name) for name in ("read-number", "arithmetic", "spoken-question", "words of a person")]
    monkeypatch.setattr(exam, "parts", lambda *_: short)
    write(bank, tmp_path / "bank")
    (tmp_path / "progress.json").write_text(json.dumps({"steps": 1234, "lessons": 56}))
    arguments = ["--bank", str(tmp_path / "bank"), "--model", str(checkpoint), "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "scores.json")]) == 0
    assert "spoken questions" in capsys.readouterr().out
    write_card(tmp_path, checkpoint)
    text = (checkpoint / "README.md").read_text()
    assert "1,234 steps" in text
    assert "none with `--finish`" in text
    assert "toy of 5.1 million" in text
    assert "speech (word error rate)" in text
    assert "{" not in text.replace('{"answer": "42"}', "")
    (checkpoint / "model-extra.safetensors").write_bytes(b"other weights")
    with pytest.raises(CheckpointError, match="other weights"):
        write_card(tmp_path, checkpoint)


def test_the_card_tells_whether_the_learning_rate_fell():
    assert card.training_facts({"steps": 1, "lessons": 2}, 3, "a GPU", finished=True).endswith("fell to zero.")
    assert "none with" in card.training_facts({"steps": 1, "lessons": 2}, None, None, finished=False)


def write_card(folder, checkpoint):
    files = ["--bank", folder / "bank", "--scores", folder / "scores.json", "--progress", folder / "progress.json"]
    assert card.main([str(word) for word in [*files, "--checkpoint", checkpoint]]) == 0
