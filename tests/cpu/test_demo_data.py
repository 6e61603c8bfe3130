"""The demo's data: a seed always makes the same sample, samples are well formed, nothing held out is trained on."""

import json
from collections import Counter

import numpy as np
import pytest

from memphi.demo import score, sound, tasks
from memphi.demo.bank import read, write
from memphi.demo.fonts import tells_letters_apart
from memphi.demo.vocabulary import (
    CHAT_REPLIES,
    COLOURS,
    JSON_SYSTEMS,
    QUESTIONS,
    SHAPES,
    SPOKEN_WORDS,
)
from tests.demo_bank import sine_voice, tiny_bank, tone

SPLITS = ("train", "held-out")


@pytest.fixture(scope="module")
def bank():
    return tiny_bank()


def samples(bank, task, split="train", count=12):
    return [tasks.make(task, seed, bank, split) for seed in range(count)]


def same(first, second):
    arrays = zip(first.images + first.clips, second.images + second.clips, strict=True)
    texts = [(sample.task, sample.system, sample.question, sample.answer) for sample in (first, second)]
    return texts[0] == texts[1] and all(np.array_equal(one, other) for one, other in arrays)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_same_seed_makes_the_same_sample(bank, task):
    assert all(same(one, other) for one, other in zip(samples(bank, task), samples(bank, task), strict=True))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_another_seed_makes_another_sample(bank, task):
    first, *others = samples(bank, task)
    assert not all(same(first, other) for other in others)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_sample_is_well_formed(bank, task, split):
    for sample in samples(bank, task, split):
        assert sample.task == task
        assert sample.answer == sample.answer.strip() != ""
        assert (sample.question + sample.answer + (sample.system or "")).isascii()
        assert sample.question or (task == "spoken-question" and sample.clips)
        for image in sample.images:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert 90 <= min(image.shape[:2]) <= max(image.shape[:2]) <= 560
            assert image.std() > 0
        for clip in sample.clips:
            assert clip.dtype == np.int16
            assert clip.ndim == 1
            assert sound.RATE <= len(clip) <= 60 * sound.RATE


def test_numbers_of_images_and_clips_fit_the_task(bank):
    for task in ("read-number", "read-word", "colour", "shape", "colour-shape", "count"):
        assert all((len(sample.images), len(sample.clips)) == (1, 0) for sample in samples(bank, task))
    for task in ("compare-images", "add-images", "which-image"):
        assert all(2 <= len(sample.images) <= 4 and not sample.clips for sample in samples(bank, task))
    assert all((len(sample.images), len(sample.clips)) == (0, 1) for sample in samples(bank, "transcribe"))
    assert all((len(sample.images), len(sample.clips)) == (1, 1) for sample in samples(bank, "spoken-question"))


def test_answers_belong_to_their_questions(bank):
    for sample in samples(bank, "colour-shape", count=40):
        colour, shape = sample.answer.split()
        assert colour in COLOURS
        assert shape in SHAPES
    for sample in samples(bank, "compare-images", count=40) + samples(bank, "which-image", count=40):
        assert 1 <= int(sample.answer) <= len(sample.images)
    for sample in samples(bank, "count", count=40):
        assert 1 <= int(sample.answer) <= 9
    for sample in samples(bank, "transcribe", count=20):
        assert set(sample.answer.split()) <= set(SPOKEN_WORDS)
    for sample in samples(bank, "chat"):
        assert CHAT_REPLIES[sample.question] == sample.answer
    for sample in samples(bank, "reverse-word"):
        assert sample.answer[::-1] in sample.question


def test_sums_are_right(bank):
    signs = {" + ": "+", " plus ": "+", " - ": "-", " minus ": "-", " * ": "*", " times ": "*"}
    checked = 0
    for sample in samples(bank, "arithmetic", count=200):
        numbers = [int(word) for word in sample.question.strip(".?= ").replace(".", "").split() if word.isdigit()]
        sign = next((signs[text] for text in signs if text in sample.question), None)
        if sign and len(numbers) == 2:
            expected = {"+": numbers[0] + numbers[1], "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[sign]
            assert int(sample.answer) == expected
            checked += 1
    assert checked > 100


def test_a_json_prompt_makes_a_json_answer(bank):
    made = samples(bank, "json", count=40)
    assert all(list(json.loads(sample.answer)) == ["answer"] for sample in made)
    assert all(sample.system in JSON_SYSTEMS for sample in made)
    assert any(sample.images for sample in made)
    assert any(sample.clips for sample in made)


def test_held_out_words_and_numbers_are_never_trained_on(bank):
    for task, reading in (("read-word", str.lower), ("reverse-word", lambda answer: answer[::-1])):
        seen = {split: {reading(sample.answer) for sample in samples(bank, task, split, 40)} for split in SPLITS}
        assert seen["train"] <= set(bank.words["train"])
        assert seen["held-out"] <= set(bank.words["held-out"])
    numbers = {split: {sample.answer for sample in samples(bank, "read-number", split, 300)} for split in SPLITS}
    assert not {number for number in numbers["train"] & numbers["held-out"] if len(number) >= 3}


def test_held_out_sums_are_never_trained_on(bank):
    asked = {split: samples(bank, "arithmetic", split, 600) for split in SPLITS}
    sums = {
        split: {tuple(sorted(sample.question.split()[:3:2])) for sample in made if " + " in sample.question[:6]}
        for split, made in asked.items()
    }
    assert min(map(len, sums.values())) > 20
    assert not sums["train"] & sums["held-out"]


def test_every_kind_of_wording_is_used(bank):
    assert {sample.question for sample in samples(bank, "read-number", count=150)} == set(QUESTIONS["read-number"])


def test_a_voice_outside_the_split_is_heard_only_when_asked_for(bank):
    silent = sine_voice("voice 7", "human", "tried", 7)
    heard = bank.hearing([silent])
    assert heard.voices["held-out"] == (silent,)
    assert heard.voices["train"] == bank.voices["train"]


def test_the_mixture_is_seeded_and_has_every_task():
    drawn = [tasks.mixture(5, index) for index in range(3_000)]
    assert drawn == [tasks.mixture(5, index) for index in range(3_000)]
    assert drawn != [tasks.mixture(6, index) for index in range(3_000)]
    shares = Counter(drawn)
    assert set(shares) == set(tasks.TASKS) == set(tasks.WEIGHTS)
    assert shares["read-word"] > shares["chat"]


def test_a_bank_survives_being_written(bank, tmp_path):
    write(bank, tmp_path / "bank")
    again = read(tmp_path / "bank")
    assert again.faces == bank.faces
    assert again.words == bank.words
    assert [voice.name for voice in again.voices["train"]] == [voice.name for voice in bank.voices["train"]]
    said, before = again.voices["held-out"][0].words["seven"], bank.voices["held-out"][0].words["seven"]
    assert len(said) == len(before)
    assert np.abs(said.astype(int) - before).mean() < 0.05 * np.abs(before.astype(int)).mean()


def test_a_bank_without_the_tried_voices_can_be_read(bank, tmp_path):
    write(bank, tmp_path)
    (tmp_path / "voices-tried.npz").unlink()
    assert read(tmp_path).voices["tried"] == ()


def test_a_bank_replaces_only_a_bank(bank, tmp_path):
    write(bank, tmp_path)
    write(bank, tmp_path)
    other = tmp_path / "fonts"
    with pytest.raises(FileExistsError):
        write(bank, other)
    assert any(other.iterdir())


def test_silence_is_trimmed():
    speech = tone(3, 0.5)
    padded = np.concatenate((np.zeros(8_000, np.int16), speech, np.zeros(16_000, np.int16)))
    assert abs(len(sound.trimmed(padded)) - len(speech)) < 0.06 * sound.RATE


def test_a_readable_typeface_tells_case(bank):
    assert tells_letters_apart(bank.faces["train"][0].data)


def test_word_error_rate_counts_words():
    assert score.word_error_rate([("one two three", "one two three")]) == 0
    assert score.word_error_rate([("one too", "one two three four")]) == 3 / 4
    assert score.word_error_rate([("one one two", "one two")]) == 1 / 2
    assert score.word_error_rate([("", "one")]) == 1


def test_exactly_right_ignores_only_the_space_around():
    assert score.exactly_right([(" 12\n", "12"), ("Cat", "cat")]) == 0.5


def test_scores_pass_and_fail():
    right = {task: [("yes", "yes")] * 100 for task in tasks.TASKS}
    assert all(line.passed for line in score.scores(right))
    wrong = {task: [("yes", "yes")] * 80 + [("no", "yes")] * 20 for task in tasks.TASKS}
    assert not any(line.passed for line in score.scores(wrong))
    assert not any(line.passed for line in score.scores({}))
    assert set(tasks.TASKS) == {task for demand in score.DEMANDS for task in demand.tasks}


def test_the_table_names_what_was_missed():
    lines = score.scores({"read-number": [("1", "2")], "read-word": [("cat", "cat")]})
    rows = score.table(lines).splitlines()
    assert rows[1].startswith("numbers")
    assert rows[1].endswith("missed")
    assert rows[2].endswith("ok")
