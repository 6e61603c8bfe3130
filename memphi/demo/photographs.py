"""Real photographs that the demo model is tried on, never trained: cut-out fruit, flowers, animals and balls.

Knows which files of a Debian package show what, and how to fetch them; asks no model. Evaluation calls `parts`, and
tells their scores beside the others.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from memphi.demo import debian
from memphi.demo.exam import Part
from memphi.demo.pictures import Picture
from memphi.demo.score import Demand
from memphi.demo.tasks import Sample

PACKAGE = "tuxpaint-stamps-default"
"""160 MB; its pictures are under the GPL-2 and stay outside memphi."""
COLOURS = {
    "red": (
        "food/fruit/apple_red",
        "food/fruit/strawberry",
        "food/fruit/Cherry_Stella",
        "food/vegetables/chilepepper",
        "food/vegetables/tomato",
        "plants/flowers/rose",
        "plants/flowers/anemone_red",
        "sports/cricketball",
    ),
    "green": (
        "food/fruit/apple_green",
        "food/vegetables/broccoli",
        "food/vegetables/lettuce",
        "food/vegetables/pepper",
    ),
    "yellow": ("food/fruit/lemon", "food/vegetables/yellowpepper", "household/rubberduck"),
    "orange": ("food/fruit/orange", "food/fruit/mandarine", "food/vegetables/pumpkin_small", "sports/basketball"),
    "purple": ("plants/flowers/iris",),
    "blue": ("animals/fish/bluegroper",),
    "black": ("animals/birds/crow", "animals/birds/blackbird", "animals/mammals/apes/gorilla"),
}
CIRCLES = ("food/fruit/mandarine", "sports/basketball", "sports/cricketball", "sports/soccer", "sports/tennis_ball")
QUESTIONS = {"colour": "What colour is this?", "shape": "What shape is this?"}


def parts() -> list[Part]:
    """Fetch the photographs and ask for their colours, and for the shape of the round ones."""
    with tempfile.TemporaryDirectory() as scratch:
        debian.unpack([PACKAGE], Path(scratch))
        folder = Path(scratch, "usr/share/tuxpaint/stamps")
        coloured = [(name, colour) for colour, names in COLOURS.items() for name in names]
        round_ones = [(name, "circle") for name in CIRCLES]
        return [_part(folder, "colour", coloured), _part(folder, "shape", round_ones)]


def _part(folder: Path, task: str, named: Sequence[tuple[str, str]]) -> Part:
    samples = [
        Sample(task, None, QUESTIONS[task], (_read(folder / f"{name}.png"),), (), answer) for name, answer in named
    ]
    return Part("tried", Demand(f"{task} in photographs", (task,), None), tuple(samples))


def _read(path: Path) -> Picture:
    """The picture on white, as memphi shows transparent pictures to a model."""
    with Image.open(path) as file:
        picture = file.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
