"""Training the demo on the CPU: a lesson is its samples, the loss falls, and what was trained can be gone on from."""

import dataclasses
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import memphi
from memphi.demo import train
from memphi.demo.bank import write
from memphi.demo.lesson import NO_PATCH, WITHOUT_ADAPTER, Lesson, conversation, join, lengthened, make_lesson
from memphi.demo.shape import demo_config, tokenizer_document
from memphi.demo.supply import Source, Supply
from memphi.demo.tasks import after_talk, make
from memphi.demo.vocabulary import READ_LETTERS
from memphi.inputs.image import lay_out
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.rows import Row
from memphi.request import InputMode
from tests.demo_bank import tiny_bank

MIXED = ("read-word", "transcribe", "arithmetic", "spoken-question", "compare-images", "json", "transcribe", "count")
OFF = (False, False, False, False, False, False, True, True)


@pytest.fixture(scope="module")
def source():
    return Source(tiny_bank(), demo_config(), Tokenizer(tokenizer_document()))


@pytest.fixture(scope="module")
def samples(source):
    made = [make(task, seed, source.bank, "train") for seed, task in enumerate(MIXED)]
    return [after_talk(made[0], 0, source.bank, "train"), *made[1:]]


@pytest.fixture(scope="module")
def joined(source, samples):
    """Two lessons as one, the second with adapters off at its end."""
    halves = [(samples[:4], OFF[:4]), (samples[4:], OFF[4:])]
    return join([make_lesson(some, source.config, source.tokenizer, off) for some, off in halves])


def new_student(source):
    torch.manual_seed(0)
    student = train.Student(source.config)
    train.initialise(student, source.task_lesson("transcribe", "train", 4).features.float())
    for name, weight in student.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(weight, std=0.1)  # so that an adapter makes a difference
    return student


def alone(student, source, sample, off):
    """The logits of one sample's answer, through the model's own prepare and forward."""
    prompt = prepare(conversation(lengthened(sample)), source.config, source.tokenizer)
    images = [replace(image, crops=as_bytes(image.crops) / np.float32(127.5) - 1) for image in prompt.images]
    clips = [replace(clip, features=clip.features.astype(np.float16).astype(np.float32)) for clip in prompt.clips]
    model, mode = student.model, prompt.mode
    rows = {"image": model.encode_images(images), "audio": model.encode_clips(clips, mode.audio_head)}
    media = [(span.start, rows[span.kind][span.index]) for span in prompt.spans]
    answer = source.tokenizer.encode_text(WITHOUT_ADAPTER[mode] if off else sample.answer)
    ids = torch.tensor([*prompt.ids, *answer])
    places = range(len(prompt.ids) - 1, len(ids))
    return model(ids, [Row(len(ids), adapter=None if off else mode.adapter)], media, logits_at=places)


def as_bytes(crops):
    return np.clip(np.rint((crops + 1) * 127.5), 0, 255).astype(np.uint8)


@torch.no_grad()
def test_a_joined_lesson_gives_the_logits_of_its_samples_alone(source, samples, joined):
    student = new_student(source)
    together, *_ = student(joined, augment=False)
    for row, (sample, off) in enumerate(zip(samples, OFF, strict=True)):
        expected = alone(student, source, sample, off)
        torch.testing.assert_close(together[joined.answer_rows == row], expected, atol=1e-4, rtol=1e-4)


def test_a_lesson_asks_for_the_answer_and_the_end(source, samples, joined):
    modes = {"transcribe": InputMode.SPEECH, "count": InputMode.VISION}
    for row, (sample, off) in enumerate(zip(samples, OFF, strict=True)):
        text = WITHOUT_ADAPTER[modes[sample.task]] if off else sample.answer
        expected = [*source.tokenizer.encode_text(text), source.tokenizer.end_id]
        assert joined.answers[joined.answer_rows == row].tolist() == expected
    assert joined.ids[joined.answer_places + 1].tolist() == joined.answers.tolist()


def test_a_clip_tells_its_words_only_where_the_answer_is_what_it_says(joined):
    told = [bool(words) for words in joined.words]
    assert sum(told) == MIXED.count("transcribe")


READ = ("read-number", "read-word", "count", "read-word", "read-number", "arithmetic", "read-number", "json")


@pytest.fixture(scope="module")
def read(source):
    """Samples that are read and others among them, in pictures of one crop and of several."""
    return [make(task, seed, source.bank, "train") for seed, task in enumerate(READ)]


def in_parts(source, samples, *ends):
    """Lessons of the samples, cut at these places."""
    cuts = [0, *ends, len(samples)]
    parts = [samples[a:b] for a, b in itertools.pairwise(cuts)]
    return [make_lesson(part, source.config, source.tokenizer, [False] * len(part)) for part in parts]


def same(one, other):
    """Whether two values of a lesson are equal."""
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_letters_are_told_only_of_pictures_that_are_read(source, read):
    [lesson] = in_parts(source, read)
    told = [sample.answer for sample in read if sample.task in ("read-number", "read-word")]
    assert ["".join(READ_LETTERS[letter - 1] for letter in letters) for letters in lesson.letters] == told


def test_the_letters_columns_show_the_picture_from_left_to_right(source, read):
    [lesson] = in_parts(source, read)
    told = [sample.images[0] for sample in read if sample.task in ("read-number", "read-word")]
    layouts = [lay_out(picture.shape[1], picture.shape[0], source.config.vision) for picture in told]
    assert max(layout.crop_columns for layout in layouts) > 1
    assert max(layout.crop_rows for layout in layouts) > 1
    assert lesson.letter_columns == [layout.valid_columns for layout in layouts]
    side = source.config.vision.patch_size
    patches = lesson.crops.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(0, 2)
    places = lesson.letter_places.split(lesson.letter_columns)
    for picture, layout, columns in zip(told, layouts, places, strict=True):
        assert (columns[:, layout.valid_rows :] == NO_PATCH).all()
        shown = patches[columns[:, : layout.valid_rows]].permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
        assert torch.equal(shown, torch.from_numpy(stretched(picture, layout, side)))


def stretched(picture, layout, side):
    """The picture as its crops show it, to the end of the last patches that hold some of it."""
    padded = np.full((layout.valid_rows * side, layout.valid_columns * side, 3), 255, np.uint8)
    size = (layout.width, layout.height)
    padded[: layout.height, : layout.width] = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    return padded


@pytest.mark.parametrize("ends", [(4,), (1, 2, 3, 6)])
def test_joined_lessons_are_the_lesson_of_all_their_samples(source, read, ends):
    [whole] = in_parts(source, read)
    joined = join(in_parts(source, read, *ends))
    assert all(same(getattr(joined, f.name), getattr(whole, f.name)) for f in dataclasses.fields(Lesson))


def test_a_joined_lesson_reads_the_patches_that_its_lessons_read(source, read):
    parts = in_parts(source, read, 2, 5)
    joined = join(parts)
    features = torch.arange(joined.patch_mask.numel(), dtype=torch.float32)[:, None]
    counts = [part.patch_mask.numel() for part in parts]
    together = iter(train._rows_at(features, joined.letter_places).split(joined.letter_columns))
    for part, own in zip(parts, features.split(counts), strict=True):
        for picture in train._rows_at(own, part.letter_places).split(part.letter_columns):
            rows = picture.shape[1]
            both = next(together)
            assert torch.equal(both[:, :rows], picture)
            assert not both[:, rows:].any()


def test_a_lesson_comes_back_from_its_file(source, read, tmp_path):
    for place, lesson in enumerate(in_parts(source, read, 2, 3)):  # the second has nothing to read
        lesson.save(tmp_path / f"{place}.safetensors")
        loaded = Lesson.load(tmp_path / f"{place}.safetensors", torch.device("cpu"))
        assert all(same(getattr(loaded, f.name), getattr(lesson, f.name)) for f in dataclasses.fields(Lesson))


def test_the_letter_loss_teaches_the_vision_tower_and_nothing_behind_it(source, read):
    student = new_student(source)
    _, _, loss = student(join(in_parts(source, read, 4)), augment=False)
    loss.backward()
    assert 0 < loss.item() < math.inf
    taught = {name for name, weight in student.named_parameters() if weight.grad is not None and weight.grad.any()}
    towers = {".".join(name.split(".")[:2]) for name in taught}
    assert {name for name in towers if not name.startswith("letter_head.")} == {"model.vision"}
    assert all(name in taught for name, _ in student.letter_head.named_parameters("letter_head"))
    assert "model.vision.patch_embedding.weight" in taught


@torch.no_grad()
def test_a_picture_is_read_alike_in_any_company(source, read):
    student = new_student(source)
    parts = in_parts(source, [sample for sample in read if sample.task in ("read-number", "read-word")], 1, 3)
    together = student(join(parts), augment=False)[2]
    apart = [student(part, augment=False)[2] for part in parts]
    # Each loss is the mean over its pictures.
    expected = sum(loss * len(part.letters) for loss, part in zip(apart, parts, strict=True))
    torch.testing.assert_close(together * sum(len(part.letters) for part in parts), expected, atol=1e-4, rtol=1e-5)


def test_a_lesson_with_nothing_to_read_has_no_letter_loss(source, samples):
    lesson = make_lesson(samples[1:4], source.config, source.tokenizer, OFF[1:4])
    assert train._losses(new_student(source), lesson).letters.item() == 0


def test_crops_lose_nothing_but_the_interpolation_of_the_global_view(source, samples, joined):
    prompts = [prepare(conversation(lengthened(sample)), source.config, source.tokenizer) for sample in samples]
    images = [image for prompt in prompts for image in prompt.images]
    kept = joined.crops.float() / 127.5 - 1
    for image, crops in zip(images, kept.split([len(image.crops) for image in images]), strict=True):
        exact = torch.from_numpy(image.crops)
        torch.testing.assert_close(crops[1:], exact[1:], atol=1e-6, rtol=0)
        torch.testing.assert_close(crops[0], exact[0].clamp(-1, 1), atol=0.5 / 127.5 + 1e-6, rtol=0)


class FewLessons:
    """A supply that always gives the same lesson, and never makes another."""

    made = 3

    def __init__(self, lesson):
        self.lesson = lesson

    def draw(self, _lessons, _chance):
        return self.lesson

    def wait_for(self, _lessons):
        pass

    def close(self):
        pass


def let_steps_pass(monkeypatch, warmup):
    """Let each look at the clock take a second, so that a training's minutes count its steps."""
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(train, "WARMUP_STEPS", warmup)


def test_the_loss_falls(source, samples, monkeypatch):
    let_steps_pass(monkeypatch, warmup=3)
    student = new_student(source)
    lesson = make_lesson(samples[:3], source.config, source.tokenizer, OFF[:3])
    before = train._losses(student, lesson).total().item()
    progress = {"steps": 0, "lessons": 5}
    settings = train.Settings(minutes=10.5 / 60, finish=True, learning_rate=1e-3)
    weights = train.Weights(student, torch.float32)
    train.train(student, weights, FewLessons(lesson), settings, progress, train.Log(student, {}))
    after = train._losses(student, lesson).total().item()
    assert progress == {"steps": 10, "lessons": 8}
    assert after < 0.7 * before


def test_a_student_computes_in_bf16_while_its_weights_move_in_fp32(source, samples):
    student = new_student(source)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    weights = train.Weights(student, torch.bfloat16)
    optimiser = train._optimiser(weights, train.Settings(1, finish=False, learning_rate=1e-6))
    lesson = make_lesson(samples[:6], source.config, source.tokenizer, OFF[:6])
    losses = train._losses(student, lesson)
    losses.total().backward()
    by_weight = {name: weight.grad for name, weight in student.named_parameters()}
    assert all(gradient is None or gradient.isfinite().all() for gradient in by_weight.values())
    weights.take_gradients()
    optimiser.step()
    weights.round()
    rounded = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    with weights.unrounded():
        moved = {name: weight.detach().clone() for name, weight in student.named_parameters()}
        assert student.model.audio.mean.dtype is torch.float32
    for name, weight in before.items():
        assert moved[name].dtype is torch.float32
        assert moved[name].shape == weight.shape
        assert torch.equal(rounded[name], moved[name].bfloat16())
        gradient = torch.zeros_like(weight) if by_weight[name] is None else by_weight[name]
        steep = gradient.abs() > 1e-6  # There a first step of Adam goes the rate's length; decay is small beside it.
        torch.testing.assert_close(
            (moved[name] - weight)[steep], -1e-6 * gradient[steep].sign().float(), atol=4e-7, rtol=0
        )


def test_clips_that_are_encoded_together_are_all_there_and_fill_a_shape():
    frames = [1500, 384, 128, 2560, 384, 900, 4352, 128, 128]
    classes = [list(places) for places in train._classes(frames)]
    assert [sorted(set(places)) for places in classes] == [[1, 2, 4, 5, 7, 8], [0, 3, 6]]
    counts = [[places.count(place) for place in sorted(set(places))] for places in classes]
    assert counts == [[9, 30, 1, 4, 1, 1], [2, 1, 1]]
    assert all([frames[place] for place in places] == sorted(frames[place] for place in places) for places in classes)


def test_a_disturbed_clip_has_its_formants_elsewhere_and_everywhere_alike():
    torch.manual_seed(1)
    features = torch.full((60, 80), 2.0)
    features[:, 40] = 20.0
    disturbed = train._disturbed(features, [10] * 6).split(10)
    peaks = [clip.argmax(1).unique().tolist() for clip in disturbed]
    assert all(len(of_clip) == 1 for of_clip in peaks)
    assert len({of_clip[0] for of_clip in peaks}) > 2
    assert all(40 / 1.12 - 1 <= of_clip[0] <= 40 / 0.88 + 1 for of_clip in peaks)


def test_a_state_comes_back_as_it_was(source, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STATE_PART_BYTES", 4_000_000)
    student, other = new_student(source), train.Student(source.config)
    train.save_state(student, {"steps": 7, "lessons": 9}, tmp_path)
    train.load_state(other, tmp_path)
    assert len(list(tmp_path.glob("state-*.safetensors"))) > 3
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_a_state_from_before_the_letter_head_is_gone_on_from(source, tmp_path, capsys):
    student, other = new_student(source), train.Student(source.config)
    fresh = {name: tensor.clone() for name, tensor in other.letter_head.state_dict().items()}
    weights = {name: weight for name, weight in student.state_dict().items() if not name.startswith("letter_head.")}
    save_file(weights, tmp_path / "state-0.safetensors")
    train.load_state(other, tmp_path)
    assert "no letter head" in capsys.readouterr().out
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in weights.items())
    assert all(torch.equal(weight, other.letter_head.state_dict()[name]) for name, weight in fresh.items())
    train.save_state(other, {}, tmp_path)
    train.load_state(student, tmp_path)
    assert not capsys.readouterr().out
    (tmp_path / "state-0.safetensors").unlink()
    with pytest.raises(RuntimeError):
        train.load_state(other, tmp_path)


def test_the_written_demo_is_the_trained_model(source, tmp_path):
    student = new_student(source)
    train.write_demo(student, tmp_path)
    engine = memphi.load(str(tmp_path), device="cpu", dtype="bf16")
    trained = student.model.state_dict()
    assert trained.keys() == engine.model.state_dict().keys()
    for name, tensor in engine.model.state_dict().items():
        torch.testing.assert_close(tensor.float(), trained[name].bfloat16().float(), atol=0, rtol=0)
    assert engine.generate(memphi.Request.ask("Hi", sampling=memphi.SamplingParams(max_tokens=3))).ids


def test_a_second_run_goes_on_from_the_first(source, joined, tmp_path, monkeypatch):
    let_steps_pass(monkeypatch, warmup=3)
    write(source.bank, tmp_path / "bank")
    watched = source.task_lesson("arithmetic", "held-out", 4)
    monkeypatch.setattr(train, "Supply", lambda *_: FewLessons(joined))
    monkeypatch.setattr(train, "held_out_lessons", lambda *_: [("arithmetic", watched)])
    settings = train.Settings(minutes=2.5 / 60, finish=False)
    for steps in (2, 4):
        train.run(tmp_path / "bank", tmp_path / "out", settings, torch.device("cpu"))
        assert json.loads((tmp_path / "out" / "progress.json").read_text())["steps"] == steps
    assert (tmp_path / "out" / "checkpoint" / "tokenizer.json").exists()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert all(math.isfinite(score) for score in scores.values())


def test_workers_make_the_lessons_that_their_numbers_say(source, tmp_path):
    write(source.bank, tmp_path)
    supply = Supply(tmp_path, workers=1, first=4, capacity=2, device=torch.device("cpu"))
    try:
        supply.wait_for(1)
        drawn = supply.draw(1, np.random.default_rng(0))
    finally:
        supply.close()
    # A written bank's recordings are coded, so only what was asked is the same to the bit.
    assert drawn.ids.tolist() in [source.training_lesson(number).ids.tolist() for number in (4, 5)]


def test_training_can_begin_from_a_checkpoint(tmp_path):
    shipped = Path("memphi/demo/checkpoint")
    student = train.Student(demo_config())
    train.load_start(student, shipped)
    train.write_demo(student, tmp_path / "again")
    again = memphi.load(str(tmp_path / "again"), "cpu").model.state_dict()
    for name, tensor in memphi.load("demo", "cpu").model.state_dict().items():
        assert torch.equal(tensor, again[name]), name


def test_from_a_checkpoint_lessons_are_others(source):
    begun, random = train.beginning(Path("memphi/demo/checkpoint")), train.beginning(None)
    assert random == {"steps": 0, "lessons": 0, "first": 0}
    assert begun == {"steps": 0, "lessons": 0, "first": begun["first"]}
    assert 10**5 < begun["first"] < 10**9
    assert len(source.training_lesson(begun["first"]).lengths) == 64
