"""What the demo model is measured on: parts, each some held-out samples that are scored together.

Knows which samples make a part and what is asked of it; asks no model. Evaluation calls `parts`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Literal

import numpy as np
from PIL import Image

from memphi.demo.bank import Bank
from memphi.demo.pictures import Picture
from memphi.demo.score import DEMANDS, Demand
from memphi.demo.sound import RATE
from memphi.demo.tasks import Sample, after_talk, make

Group = Literal["asked", "closer", "voices", "tried"]

FIRST_SEED = 100_000
"""Seeds below this are watched during training, and the best run was chosen by them."""
LONG_SIDE = 280
"""A picture with a side of so many pixels is read from its crops: in the global view its text is squeezed to a blur."""
LONG_SECONDS = 15
_CROP = 112


@dataclass(frozen=True)
class Part:
    """Samples scored together, under the demand that they belong to; `group` says why they are asked."""

    group: Group
    demand: Demand
    samples: tuple[Sample, ...]


def parts(bank: Bank, samples: int, first_seed: int = FIRST_SEED) -> list[Part]:
    """Every part made from the bank; `samples` for each task, fewer for the closer looks."""
    made = _Draw(bank, first_seed)
    return [*_tasks(made, samples), *_closer(made, samples), *_voices(bank, first_seed, max(1, samples // 10))]


@dataclass(frozen=True)
class _Draw:
    """Draws held-out samples by consecutive seeds."""

    bank: Bank
    first_seed: int

    def some(self, task: str, number: int, wanted: Callable[[Sample], bool] = lambda _: True) -> tuple[Sample, ...]:
        """The first samples of the task that are wanted."""
        drawn = (make(task, seed, self.bank, "held-out") for seed in count(self.first_seed))
        return tuple(islice(filter(wanted, drawn), number))


def _tasks(draw: _Draw, samples: int) -> Iterator[Part]:
    for demand in DEMANDS:
        for task in demand.tasks:
            yield Part("asked", replace(demand, name=task, tasks=(task,)), draw.some(task, samples))


def _closer(draw: _Draw, samples: int) -> Iterator[Part]:
    """Pictures that only their crops can tell, the same squeezed to one crop, and long recordings."""
    for demand in DEMANDS[:2]:
        long = draw.some(demand.tasks[0], max(1, samples // 2), _is_long_picture)
        yield Part("closer", replace(demand, name=f"{demand.name} in wide and tall pictures"), long)
        squeezed = tuple(replace(sample, images=(_squeezed(sample),)) for sample in long)
        yield Part("closer", replace(demand, name=f"{demand.name} in these without crops", threshold=None), squeezed)
    speech = next(demand for demand in DEMANDS if demand.measures_word_errors)
    long = draw.some("transcribe", max(1, samples // 8), _is_long_recording)
    yield Part("closer", replace(speech, name="recordings of 15 to 60 s"), long)
    colours = draw.some("colour", max(1, samples // 2))
    later = tuple(after_talk(sample, seed, draw.bank, "held-out") for seed, sample in enumerate(colours))
    yield Part("closer", _told("colours after some turns of talk", "colour"), later)


def _voices(bank: Bank, first_seed: int, samples: int) -> Iterator[Part]:
    """Each held-out voice alone, then the voices that are only tried, which ask where they have questions recorded."""
    for voice in bank.voices["held-out"]:
        alone = _Draw(bank.hearing([voice]), first_seed)
        yield Part("voices", _told(f"voice {voice.name}", "transcribe"), alone.some("transcribe", samples))
    for voice in bank.voices["tried"]:
        alone = _Draw(bank.hearing([voice]), first_seed)
        yield Part("tried", _told(f"words of {voice.name}", "transcribe"), alone.some("transcribe", 2 * samples))
        if voice.questions:
            asked = alone.some("spoken-question", 2 * samples)
            yield Part("tried", _told(f"questions of {voice.name}", "spoken-question"), asked)


def _told(name: str, task: str) -> Demand:
    """A line of which nothing is asked."""
    return Demand(name, (task,), None, measures_word_errors=task == "transcribe")


def _is_long_picture(sample: Sample) -> bool:
    height, width = sample.images[0].shape[:2]
    return bool(max(height, width) >= LONG_SIDE)


def _is_long_recording(sample: Sample) -> bool:
    return len(sample.clips[0]) > LONG_SECONDS * RATE


def _squeezed(sample: Sample) -> Picture:
    """What the global view alone shows of the sample's picture."""
    return np.asarray(Image.fromarray(sample.images[0]).resize((_CROP, _CROP), Image.Resampling.BICUBIC))
