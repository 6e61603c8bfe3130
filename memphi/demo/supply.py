"""An endless supply of lessons, made by worker processes while the device trains.

Knows processes and queues; `lesson` knows what a lesson is. Training calls it.
"""

import multiprocessing
import queue
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memphi.config import ModelConfig
from memphi.demo.bank import Bank, Split, read
from memphi.demo.lesson import Lesson, join, make_lesson
from memphi.demo.shape import demo_config, tokenizer_document
from memphi.demo.tasks import TASKS, Sample, after_talk, make, mixture
from memphi.inputs.tokenizer import Tokenizer

LESSON_SAMPLES = 64
LATER_TURN_SHARE = 0.15
"""The share of samples that are asked after some turns of text."""
OFF_SHARE = 0.03
"""The share of samples that are asked with the adapter off."""


@dataclass(frozen=True)
class Source:
    """All that lessons are made from."""

    bank: Bank
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, bank: Path) -> "Source":
        """Read a bank for the demo model."""
        return cls(read(bank), demo_config(), Tokenizer(tokenizer_document()))

    def training_lesson(self, number: int) -> Lesson:
        """The lesson of this number: always the same, from the train split."""
        off = np.random.default_rng((1, number)).random(LESSON_SAMPLES) < OFF_SHARE
        numbers = range(number * LESSON_SAMPLES, (number + 1) * LESSON_SAMPLES)
        samples = [self._sample(n) for n in numbers]
        return make_lesson(samples, self.config, self.tokenizer, off.tolist())

    def _sample(self, number: int) -> Sample:
        sample = make(mixture(0, number), number, self.bank, "train")
        is_later_turn = np.random.default_rng((3, number)).random() < LATER_TURN_SHARE
        return after_talk(sample, number, self.bank, "train") if is_later_turn else sample

    def task_lesson(self, task: str, split: Split, count: int) -> Lesson:
        """The first `count` samples of one task, adapters on."""
        samples = [make(task, seed, self.bank, split) for seed in range(count)]
        return make_lesson(samples, self.config, self.tokenizer, [False] * count)


class Supply:
    """A store of lessons on the device, kept fresh: each step joins some of them at random.

    Lessons are made more slowly than they are used, so each serves several times, always in other company.
    """

    def __init__(self, bank: Path, workers: int, first: int, capacity: int, device: torch.device) -> None:
        """`first` is the number of the first lesson to make; capacity counts lessons kept on the device."""
        context = multiprocessing.get_context("spawn")
        # A lesson travels as a file: the name alone goes through the queue, and the bytes need no Python to move.
        self._folder = tempfile.TemporaryDirectory(dir=_memory_folder())
        self._queue: multiprocessing.Queue[Path] = context.Queue(maxsize=2 * workers)
        self._processes = [
            context.Process(
                target=_work, args=(bank, Path(self._folder.name), self._queue, first + i, workers), daemon=True
            )
            for i in range(workers)
        ]
        for process in self._processes:
            process.start()
        self._device = device
        self._lessons: list[Lesson] = []
        self._capacity = capacity
        self.made = 0
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def wait_for(self, lessons: int) -> None:
        """Wait until the store holds that many."""
        while len(self._lessons) < lessons:
            self._thread.join(timeout=0.1)
            if not self._thread.is_alive():
                raise RuntimeError("a worker that makes lessons has died")

    def draw(self, lessons: int, chance: np.random.Generator) -> Lesson:
        """Some lessons of the store as one."""
        held = list(self._lessons)
        return join([held[i] for i in chance.choice(len(held), lessons, replace=False)])

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._thread.join()
        self._folder.cleanup()

    def _receive(self) -> None:
        """Move what the workers finish to the device, for as long as they live; the oldest lessons make room."""
        while all(process.is_alive() for process in self._processes):
            try:
                path = self._queue.get(timeout=1)
            except queue.Empty:
                continue
            lesson = Lesson.load(path, self._device)
            path.unlink()
            if len(self._lessons) < self._capacity:
                self._lessons.append(lesson)
            else:
                self._lessons[self.made % self._capacity] = lesson
            self.made += 1


def held_out_lessons(source: Source, count: int) -> Iterator[tuple[str, Lesson]]:
    """Every task's held-out samples, to watch training with."""
    for task in TASKS:
        yield task, source.task_lesson(task, "held-out", count)


def _work(bank: Path, folder: Path, lessons: "multiprocessing.Queue[Path]", first: int, step: int) -> None:
    torch.set_num_threads(1)
    source, number = Source.open(bank), first
    while True:
        path = folder / f"{number}.safetensors"
        source.training_lesson(number).save(path)
        lessons.put(path)
        number += step


def _memory_folder() -> Path | None:
    """Where Linux keeps files in memory; None elsewhere: the usual place for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else None
