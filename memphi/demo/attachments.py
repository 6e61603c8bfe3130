"""The sample files beside the demo model: `python -m memphi.demo.attachments --bank .bank` draws and speaks them again.

Knows what each file of `memphi/demo/media` shows or says, and which questions about them have one right answer; the
README, the tests and people trying memphi use those. All is held out: typefaces, words, numbers and the voice, whose
makers all let it be used freely.
"""

import argparse
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memphi.demo import bank
from memphi.demo.bank import Bank, Voice
from memphi.demo.pictures import Drawn, Picture, shapes_picture, text_picture
from memphi.demo.sound import RATE, Sound
from memphi.demo.speech import spoken_list, spoken_sentence

VOICE = "flite slt"
WORDS_SEED = 1
FOLDER = Path(__file__).parent / "media"


@dataclass(frozen=True)
class Example:
    """Files of the media folder, in the order in which they are attached, a question, and the one right answer.

    `learnt` says whether the shipped model gives it; a test holds that this is so.
    """

    files: tuple[str, ...]
    question: str
    answer: str
    system: str | None = None
    learnt: bool = True


@dataclass(frozen=True)
class _Writing:
    """Text to draw; `seed` was chosen for a pleasant ground."""

    text: str
    family: str
    style: str
    size: tuple[int, int]
    seed: int


_WRITINGS = {
    "number.png": _Writing("7583", "Gentium Basic", "Bold", (160, 112), 5),
    "word.png": _Writing("breeze", "Comic Neue", "Bold", (224, 112), 15),
    "wide.png": _Writing("telephone", "Open Sans", "Bold", (560, 112), 13),
    "tall.png": _Writing("lion", "Gentium Basic", "Bold", (112, 448), 20),
    "first.png": _Writing("23", "Courier Prime", "Light", (112, 112), 12),
    "second.png": _Writing("54", "Comfortaa", "Bold", (112, 112), 3),
}

_SHAPES = {
    "red-circle.png": ((112, 112), [Drawn("circle", "red", (60, 54), 36, 0.0)]),
    "green-triangle.png": ((112, 112), [Drawn("triangle", "green", (54, 62), 40, 0.1)]),
    "shapes.png": (
        (200, 150),
        [
            Drawn("star", "yellow", (28, 26), 19, 0.1),
            Drawn("star", "purple", (124, 24), 20, -0.2),
            Drawn("star", "yellow", (78, 74), 18, 0.0),
            Drawn("star", "purple", (172, 78), 20, 0.2),
            Drawn("star", "yellow", (126, 122), 19, -0.1),
            Drawn("heart", "red", (28, 122), 19, 0.1),
            Drawn("heart", "red", (176, 24), 17, -0.1),
            Drawn("circle", "blue", (74, 122), 17, 0.0),
        ],
    ),
}

EXAMPLES = (
    Example(("number.png",), "What number is shown?", "7583"),
    Example(("word.png",), "What word is shown?", "breeze"),
    Example(("wide.png",), "What word is shown?", "telephone", learnt=False),
    Example(("tall.png",), "What word is shown?", "lion", learnt=False),
    Example(("red-circle.png",), "What is in the picture?", "red circle"),
    Example(("green-triangle.png",), "What colour is the shape?", "green"),
    Example(("shapes.png",), "How many stars are there?", "5"),
    Example(("shapes.png",), "How many hearts are there?", "2", learnt=False),
    Example(("first.png", "second.png"), "Add the numbers.", "77"),
    Example(("first.png", "second.png"), "Which image shows the larger number?", "2"),
    Example(("red-circle.png", "green-triangle.png"), "Which image shows a green triangle?", "2"),
    Example(("words.wav",), "Transcribe the audio.", "nine yellow circle go"),
    Example(("number.png", "question.wav"), "", "7583"),
    Example((), "What is 17 plus 25?", "42"),
    Example((), "Reverse the word: lion", "noil"),
    Example((), "What is 17 plus 25?", '{"answer": "42"}', system="Answer in JSON."),
)


def write(stock: Bank, folder: Path) -> None:
    """Draw and speak every file into the folder; the same bank always gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, writing in _WRITINGS.items():
        _save_picture(_written(stock, writing), folder / name)
    for name, (size, drawn) in _SHAPES.items():
        _save_picture(shapes_picture(drawn, size, np.random.default_rng(2)), folder / name)
    voice = next(voice for voice in stock.voices["held-out"] if voice.name == VOICE)
    _save_sound(_words(voice), folder / "words.wav")
    _save_sound(_question(voice), folder / "question.wav")


def _written(stock: Bank, writing: _Writing) -> Picture:
    style = (writing.family, writing.style)
    face = next(face for face in stock.faces["held-out"] if (face.family, face.style) == style)
    return text_picture(writing.text, face.data, writing.size, np.random.default_rng(writing.seed))


def _words(voice: Voice) -> Sound:
    return spoken_list(voice, 3.0, np.random.default_rng(WORDS_SEED))[0]


def _question(voice: Voice) -> Sound:
    return spoken_sentence(voice.questions["what number is this"], np.random.default_rng(0))


def _save_picture(picture: Picture, path: Path) -> None:
    Image.fromarray(picture).save(path, optimize=True)


def _save_sound(sound: Sound, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound.tobytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the demo's sample pictures and recordings."""
    parser = argparse.ArgumentParser(prog="python -m memphi.demo.attachments", description=main.__doc__)
    parser.add_argument("--bank", type=Path, required=True, help="the folder that memphi.demo.bank made")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    chosen = parser.parse_args(arguments)
    write(bank.read(chosen.bank), chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
