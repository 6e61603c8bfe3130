"""The demo model's exercises: a seed becomes a question, its pictures and sounds, and the one right answer.

Knows how each task is composed from the bank, the pictures and the speech; knows no tokens, tensors or training.
Training and evaluation call `mixture` and `make`; the same arguments always give the same sample.

Held-out samples use only what training never sees: font families, words, voices, one in ten numbers of three or more
digits, and one in ten sums and differences. Products of single digits, shapes, colours and chat are few enough to be
learnt whole, so both splits share them.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from memphi.demo.bank import Bank, Split, Voice
from memphi.demo.pictures import Chance, Drawn, Picture, shapes_picture, text_picture
from memphi.demo.sound import Sound
from memphi.demo.speech import spoken_list, spoken_sentence
from memphi.demo.vocabulary import CHAT_REPLIES, COLOURS, JSON_SYSTEMS, PLURALS, QUESTIONS, SHAPES, SPOKEN_QUESTIONS

T = TypeVar("T")
_SINGULARS = {plural: singular for singular, plural in PLURALS.items()}


@dataclass(frozen=True)
class Sample:
    """A question, its pictures (height, width, 3) uint8 and clips int16 at 16 kHz, and the right answer."""

    task: str
    system: str | None
    question: str
    images: tuple[Picture, ...]
    clips: tuple[Sound, ...]
    answer: str
    earlier: tuple[tuple[str, str], ...] = ()
    """Questions and answers of the turns before this one."""


@dataclass(frozen=True)
class _Stock:
    """What one sample draws from: the bank, the split it may use, and its own chance."""

    bank: Bank
    split: Split
    chance: Chance

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.chance.integers(len(choices)))]

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return int(self.chance.integers(low, high + 1))

    def wording(self, key: str, **filled: object) -> str:
        """Return the canonical wording in three cases of ten, any of them else."""
        wordings = QUESTIONS[key]
        chosen = wordings[0] if self.chance.random() < 0.3 else self.pick(wordings)
        return chosen.format(**filled)


def make(task: str, seed: int, bank: Bank, split: Split) -> Sample:
    """Return the sample that belongs to these arguments; `task` is a key of TASKS."""
    name = zlib.crc32(f"{split} {task}".encode())
    return TASKS[task](_Stock(bank, split, np.random.default_rng((name, seed))))


def after_talk(sample: Sample, seed: int, bank: Bank, split: Split) -> Sample:
    """Return the sample as a later turn of a conversation that began with text alone."""
    chance = np.random.default_rng((2, seed))
    tasks = chance.choice(("chat", "arithmetic", "reverse-word"), size=int(chance.integers(1, 3)))
    turns = [make(str(task), seed * 2 + place, bank, split) for place, task in enumerate(tasks)]
    return replace(sample, earlier=tuple((turn.question, turn.answer) for turn in turns))


def mixture(seed: int, index: int) -> str:
    """Return the name of the task to train on at this place of the stream that the seed begins."""
    names = list(WEIGHTS)
    shares = np.cumsum(list(WEIGHTS.values()))
    place = np.random.default_rng((seed, index)).random() * shares[-1]
    return names[int(np.searchsorted(shares, place, side="right"))]


def _sample(
    task: str, question: str, answer: str, images: Sequence[Picture] = (), clips: Sequence[Sound] = ()
) -> Sample:
    return Sample(task, None, question, tuple(images), tuple(clips), answer)


def _read_number(stock: _Stock) -> Sample:
    number = _unpadded_number(stock)
    return _sample("read-number", stock.wording("read-number"), number, [_text(stock, number, _size(stock, number))])


def _read_word(stock: _Stock) -> Sample:
    word = _cased_word(stock)
    return _sample("read-word", stock.wording("read-word"), word, [_text(stock, word, _size(stock, word))])


def _colour(stock: _Stock) -> Sample:
    colour = stock.pick(COLOURS)
    picture = _one_shape(stock, colour, stock.pick(SHAPES))
    return _sample("colour", stock.wording("colour"), colour, [picture])


def _shape(stock: _Stock) -> Sample:
    shape = stock.pick(SHAPES)
    picture = _one_shape(stock, stock.pick(COLOURS), shape)
    return _sample("shape", stock.wording("shape"), shape, [picture])


def _colour_shape(stock: _Stock) -> Sample:
    colour, shape = stock.pick(COLOURS), stock.pick(SHAPES)
    picture = _one_shape(stock, colour, shape)
    return _sample("colour-shape", stock.wording("colour-shape"), f"{colour} {shape}", [picture])


def _count(stock: _Stock) -> Sample:
    return _count_of(stock, stock.pick(SHAPES))


def _count_of(stock: _Stock, shape: str) -> Sample:
    number = stock.whole(1, 9)
    question = stock.wording("count", plural=PLURALS[shape])
    return _sample("count", question, str(number), [_many_shapes(stock, shape, number)])


def _compare_images(stock: _Stock) -> Sample:
    highest = stock.pick((9, 99, 99))
    numbers = stock.chance.permutation(highest + 1)[: _image_count(stock)].tolist()
    larger = stock.chance.random() < 0.7
    place = numbers.index(max(numbers) if larger else min(numbers))
    question = stock.wording("compare-larger" if larger else "compare-smaller")
    return _sample("compare-images", question, str(place + 1), [_small_number(stock, number) for number in numbers])


def _add_images(stock: _Stock) -> Sample:
    count = _image_count(stock)
    highest = {2: 99, 3: 30, 4: 20}[count]
    numbers = [stock.whole(0, highest) for _ in range(count)]
    pictures = [_small_number(stock, number) for number in numbers]
    return _sample("add-images", stock.wording("add-images"), str(sum(numbers)), pictures)


def _which_image(stock: _Stock) -> Sample:
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    shown = [kinds[place] for place in stock.chance.permutation(len(kinds))[: _image_count(stock)]]
    if stock.chance.random() < 0.5:
        shown = [(shown[0][0], shape) for shape in stock.chance.permutation(SHAPES)[: len(shown)].tolist()]
    place = stock.whole(0, len(shown) - 1)
    colour, shape = shown[place]
    target = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    pictures = [_one_shape(stock, colour, shape) for colour, shape in shown]
    return _sample("which-image", stock.wording("which-image", target=target), str(place + 1), pictures)


def _transcribe(stock: _Stock) -> Sample:
    longest = stock.pick((2, 4, 8, 8, 8, 8, 15, 15, 15, 60) if stock.chance.random() < 0.5 else (5, 10, 15))
    seconds = float(stock.chance.uniform(max(0.6, longest / 4), longest))
    return _spoken_words(stock, seconds)


def _spoken_words(stock: _Stock, seconds: float) -> Sample:
    clip, words = spoken_list(_voice(stock), seconds, stock.chance)
    return _sample("transcribe", stock.wording("transcribe"), " ".join(words), clips=[clip])


def _spoken_question(stock: _Stock) -> Sample:
    voice = _voice(stock)
    asked = stock.pick([task for task, said in SPOKEN_QUESTIONS.items() if voice.questions.keys() & set(said)])
    text = stock.pick([text for text in SPOKEN_QUESTIONS[asked] if text in voice.questions])
    sample = TASKS[asked](stock) if asked != "count" else _count_of(stock, _SINGULARS[text.split()[2]])
    clip = spoken_sentence(voice.questions[text], stock.chance)
    return replace(sample, task="spoken-question", question="", clips=(clip,))


def _arithmetic(stock: _Stock) -> Sample:
    kind = stock.pick(("add", "add", "subtract", "subtract", "multiply"))
    if kind == "multiply":
        first, second = stock.whole(0, 9), stock.whole(0, 9)
        return _sample("arithmetic", stock.wording(kind, a=first, b=second), str(first * second))
    highest = stock.pick((20, 99, 99))
    while True:
        first, second = stock.whole(0, highest), stock.whole(0, highest)
        high, low = max(first, second), min(first, second)
        if _is_held_out(f"{kind} {high} {low}") == (stock.split == "held-out"):
            break
    if kind == "subtract":
        return _sample("arithmetic", stock.wording(kind, a=high, b=low), str(high - low))
    return _sample("arithmetic", stock.wording(kind, a=first, b=second), str(first + second))


def _reverse_word(stock: _Stock) -> Sample:
    words = stock.bank.words[stock.split]
    word = stock.pick(words)
    while not 3 <= len(word) <= 7:
        word = stock.pick(words)
    return _sample("reverse-word", stock.wording("reverse-word", word=word), word[::-1])


def _json(stock: _Stock) -> Sample:
    asked = stock.pick(("arithmetic", "arithmetic", "reverse-word", "read-number", "colour", "count", "transcribe"))
    sample = _spoken_words(stock, 3.0) if asked == "transcribe" else TASKS[asked](stock)
    system = JSON_SYSTEMS[0] if stock.chance.random() < 0.4 else stock.pick(JSON_SYSTEMS)
    return replace(sample, task="json", system=system, answer=json.dumps({"answer": sample.answer}))


def _chat(stock: _Stock) -> Sample:
    said = stock.pick(tuple(CHAT_REPLIES))
    return _sample("chat", said, CHAT_REPLIES[said])


TASKS: dict[str, Callable[[_Stock], Sample]] = {
    "read-number": _read_number,
    "read-word": _read_word,
    "colour": _colour,
    "shape": _shape,
    "colour-shape": _colour_shape,
    "count": _count,
    "compare-images": _compare_images,
    "add-images": _add_images,
    "which-image": _which_image,
    "transcribe": _transcribe,
    "spoken-question": _spoken_question,
    "arithmetic": _arithmetic,
    "reverse-word": _reverse_word,
    "json": _json,
    "chat": _chat,
}

# How often each task is trained on, relative to the others.
WEIGHTS: dict[str, float] = {
    "read-number": 12,
    "read-word": 16,
    "colour": 2,
    "shape": 3,
    "colour-shape": 4,
    "count": 7,
    "compare-images": 7,
    "add-images": 9,
    "which-image": 4,
    "transcribe": 16,
    "spoken-question": 8,
    "arithmetic": 5,
    "reverse-word": 4,
    "json": 4,
    "chat": 1,
}


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 10 == 0


def _unpadded_number(stock: _Stock) -> str:
    """Return one to six digits; those of three or more belong to one split only."""
    while True:
        digits = stock.whole(1, 6)
        number = str(stock.whole(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))
        if digits < 3 or _is_held_out(number) == (stock.split == "held-out"):
            return number


def _cased_word(stock: _Stock) -> str:
    word = stock.pick(stock.bank.words[stock.split])
    return stock.pick((word, word.capitalize(), word.upper()))


def _voice(stock: _Stock) -> Voice:
    """Return a voice of the split; makers of few voices come up more often than their number alone would have it."""
    voices = stock.bank.voices[stock.split]
    makes = sorted({voice.make for voice in voices})
    shares = np.sqrt([sum(voice.make == make for voice in voices) for make in makes])
    make = str(stock.chance.choice(makes, p=shares / shares.sum()))
    return stock.pick([voice for voice in voices if voice.make == make])


def _image_count(stock: _Stock) -> int:
    return stock.pick((2, 2, 2, 3, 3, 4))


def _size(stock: _Stock, text: str) -> tuple[int, int]:
    """Return a picture's width and height: one or a few crops of 112 px, now and then clearly wide or tall."""
    least = max(112, 16 * len(text))
    kind = stock.chance.random()
    if kind < 0.35:
        return least, 112
    if kind < 0.8:
        return stock.whole(least, 224), stock.whole(112, 224)
    if kind < 0.9:
        return stock.whole(280, 560), stock.whole(96, 112)
    return max(least, stock.whole(96, 112)), stock.whole(280, 448)


def _small_size(stock: _Stock) -> tuple[int, int]:
    """Return a size of one crop, or now and then a little more."""
    return (112, 112) if stock.chance.random() < 0.7 else (stock.whole(96, 224), stock.whole(96, 160))


def _text(stock: _Stock, text: str, size: tuple[int, int]) -> Picture:
    return text_picture(text, stock.pick(stock.bank.faces[stock.split]).data, size, stock.chance)


def _small_number(stock: _Stock, number: int) -> Picture:
    return _text(stock, str(number), _small_size(stock))


def _one_shape(stock: _Stock, colour: str, shape: str) -> Picture:
    width, height = _small_size(stock)
    radius = min(width, height) * float(stock.chance.uniform(0.18, 0.46))
    centre = (float(stock.chance.uniform(radius, width - radius)), float(stock.chance.uniform(radius, height - radius)))
    return shapes_picture([Drawn(shape, colour, centre, radius, _turn(stock))], (width, height), stock.chance)


def _many_shapes(stock: _Stock, shape: str, number: int) -> Picture:
    """Draw so many of the shape, and in half of the pictures a few other shapes, one to a cell of a loose grid."""
    others = stock.whole(1, min(4, 12 - number)) if stock.chance.random() < 0.5 else 0
    cell = stock.whole(37, 52)
    grids = ((3, 3), (4, 3), (3, 4), (4, 4))
    columns, rows = stock.pick([(across, down) for across, down in grids if across * down >= number + others])
    cells = stock.chance.permutation(columns * rows)[: number + others].tolist()
    kinds = [shape] * number + [stock.pick([other for other in SHAPES if other != shape]) for _ in range(others)]
    palette = [stock.pick(COLOURS)] if stock.chance.random() < 0.4 else [stock.pick(COLOURS) for _ in range(3)]
    drawn = []
    for place, kind in zip(cells, kinds, strict=True):
        radius = cell * float(stock.chance.uniform(0.3, 0.44))
        shift = [float(stock.chance.uniform(radius, cell - radius)) for _ in range(2)]
        centre = (place % columns * cell + shift[0], place // columns * cell + shift[1])
        drawn.append(Drawn(kind, stock.pick(palette), centre, radius, _turn(stock)))
    return shapes_picture(drawn, (columns * cell, rows * cell), stock.chance)


def _turn(stock: _Stock) -> float:
    return float(stock.chance.uniform(-0.25, 0.25))
