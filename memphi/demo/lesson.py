"""Lessons: samples as the arrays that a training step eats, made on the host and joined on the device.

Knows the prompt format (through `memphi.inputs`) and where answers stand; knows no optimiser. Worker processes call
`make_lesson`, training joins several lessons with `join`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from memphi.config import ModelConfig
from memphi.demo.sound import RATE
from memphi.demo.tasks import Sample
from memphi.demo.vocabulary import READ_LETTERS, SPOKEN_WORDS
from memphi.inputs.media import audio_media, image_media
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.projector import laid_out, token_order
from memphi.request import ImageInput, InputMode, MediaSpan, Message, Prompt, Request, SamplingParams

CLIP_STEPS = ((512, 128), (1024, 256), (6000, 512))
"""Up to so many frames, a clip is lengthened to a multiple of the second: of few lengths, each goes as one call."""
WITHOUT_ADAPTER = {
    InputMode.VISION: "I cannot see without my vision adapter.",
    InputMode.SPEECH: "I cannot hear without my speech adapter.",
    InputMode.VISION_SPEECH: "I cannot see without my vision adapter.",
}
ROW_END, VIEW_END = -1, -2
READ_TASKS = ("read-number", "read-word")
"""The tasks whose answer is, letter by letter, what the one picture says."""
NO_PATCH = -1


@dataclass
class Lesson:
    """Some samples, packed; `order` counts cells within the lesson, with two negative numbers for the separators.

    `letter_places` holds the pictures whose text is told, all their columns end to end; it counts the patches of the
    lesson's crops, with NO_PATCH below where a picture ends.
    """

    tasks: list[str]
    lengths: list[int]
    adapters: list[str]  # "" for none
    ids: Tensor  # [tokens]
    answer_places: Tensor  # [answer tokens]: where a token of an answer is to be predicted
    answers: Tensor  # [answer tokens]
    answer_rows: Tensor  # [answer tokens]: whose answer it is
    crops: Tensor  # [crops, 3, crop_size, crop_size] uint8
    patch_mask: Tensor  # [crops, patches, patches], always on the host
    order: Tensor  # [image tokens]
    image_places: Tensor  # [image tokens]
    clip_frames: list[int]
    heads: list[str]
    features: Tensor  # [frames of all clips, mel_bins] fp16
    clip_places: Tensor  # [tokens of all clips]
    words: list[list[int]]  # what each clip says, as places in SPOKEN_WORDS from 1; [] where not told
    letter_places: Tensor  # [columns of all told pictures, rows of the tallest]
    letter_columns: list[int]  # of each told picture
    letters: list[list[int]]  # what each told picture says, as places in READ_LETTERS from 1

    def to(self, device: torch.device) -> "Lesson":
        """The same lesson with its tensors on a device, but for the mask."""
        tensors = self._tensors().items()
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors if name != "patch_mask"}
        return replace(self, **moved)

    def save(self, path: Path) -> None:
        """Write to one safetensors file, what is no tensor as JSON in its metadata."""
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self._tensors()}
        save_file(self._tensors(), path, {"others": json.dumps(others)})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Lesson":
        """Read what save wrote, to a device but for the mask."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tensors, **json.loads(file.metadata()["others"])).to(device)

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def make_lesson(
    samples: Sequence[Sample], config: ModelConfig, tokenizer: Tokenizer, without_adapter: Sequence[bool]
) -> Lesson:
    """Prepare samples as requests are prepared, and append their answers.

    Where without_adapter is True the sample is asked with its adapter off, and the right answer is to say so: the demo
    must not learn to do without its adapters.
    """
    rows = [_Row(sample, config, tokenizer, off) for sample, off in zip(samples, without_adapter, strict=True)]
    starts = np.concatenate(([0], np.cumsum([len(row.ids) for row in rows])))[:-1]
    cells = np.concatenate(([0], np.cumsum([row.cells for row in rows])))[:-1]
    patches_before = np.concatenate(([0], np.cumsum([row.patch_mask.size for row in rows])))[:-1]
    clips = [(row, start, span) for row, start in zip(rows, starts, strict=True) for span in row.spans("audio")]
    features = [row.prompt.framed_clips[span.index].features for row, _, span in clips]
    told = [(row, at) for row, at in zip(rows, patches_before, strict=True) if row.letters]
    size, patches, bins = config.vision.crop_size, config.vision.patches, config.audio.mel_bins
    return Lesson(
        tasks=[sample.task for sample in samples],
        lengths=[len(row.ids) for row in rows],
        adapters=[row.adapter or "" for row in rows],
        ids=torch.from_numpy(np.concatenate([row.ids for row in rows])),
        answer_places=_joined(
            [np.arange(row.asked, len(row.ids)) - 1 + at for row, at in zip(rows, starts, strict=True)]
        ),
        answers=_joined([row.ids[row.asked :] for row in rows]),
        answer_rows=_joined([np.full(len(row.ids) - row.asked, i) for i, row in enumerate(rows)]),
        crops=torch.from_numpy(np.concatenate([np.zeros((0, 3, size, size), np.uint8), *(row.crops for row in rows)])),
        patch_mask=torch.from_numpy(
            np.concatenate([np.zeros((0, patches, patches), np.bool_), *(row.patch_mask for row in rows)])
        ),
        order=_joined(
            [np.where(row.order < 0, row.order, row.order + at) for row, at in zip(rows, cells, strict=True)]
        ),
        image_places=_joined(
            [
                np.arange(s.tokens) + s.start + at
                for row, at in zip(rows, starts, strict=True)
                for s in row.spans("image")
            ]
        ),
        clip_frames=[len(feature) for feature in features],
        heads=[row.prompt.mode.audio_head for row, _, _ in clips],
        features=torch.from_numpy(np.concatenate([np.zeros((0, bins), np.float32), *features])).half(),
        clip_places=_joined([np.arange(span.tokens) + span.start + at for _, at, span in clips]),
        words=[row.words for row, _, _ in clips],
        letter_places=_end_to_end([torch.from_numpy(row.letter_places + at) for row, at in told]),
        letter_columns=[len(row.letter_places) for row, _ in told],
        letters=[row.letters for row, _ in told],
    )


class _Row:
    """One sample with its answer."""

    def __init__(self, sample: Sample, config: ModelConfig, tokenizer: Tokenizer, without_adapter: bool) -> None:
        self.prompt = prepare(conversation(lengthened(sample)), config, tokenizer)
        mode = self.prompt.mode
        off = without_adapter and mode.adapter is not None
        answer = tokenizer.encode_text(WITHOUT_ADAPTER[mode] if off else sample.answer)
        self.adapter = None if off else mode.adapter
        self.asked = len(self.prompt.ids)
        self.ids = np.array([*self.prompt.ids, *answer, tokenizer.end_id], np.int64)
        self.images = self.prompt.cropped_images
        self.patch_mask = np.concatenate(
            [np.zeros((0, *[config.vision.patches] * 2), np.bool_), *(i.patch_mask for i in self.images)]
        )
        self.crops = np.concatenate(
            [np.zeros((0, 3, *[config.vision.crop_size] * 2), np.uint8), *(_bytes(i.crops) for i in self.images)]
        )
        self.cells = len(self.crops) * (config.vision.patches // 2) ** 2
        self.order = _order(self.prompt, self.cells)
        self.words = [1 + SPOKEN_WORDS.index(word) for word in sample.answer.split()] if _is_told(sample) else []
        is_read = sample.task in READ_TASKS
        self.letters = [1 + READ_LETTERS.index(letter) for letter in sample.answer] if is_read else []
        self.letter_places = _letter_places(self.images[0]) if is_read else np.zeros((0, 0), np.int64)

    def spans(self, kind: str) -> list[MediaSpan]:
        return [span for span in self.prompt.spans if span.kind == kind]


def conversation(sample: Sample, sampling: SamplingParams | None = None) -> Request:
    """What a person would send to be answered as the sample is."""
    images = [image_media(picture, "picture") for picture in sample.images]
    clips = [audio_media(clip, RATE, "clip") for clip in sample.clips]
    request = Request.ask(sample.question, [*images, *clips], sample.system, sampling)
    *system, asked = request.messages
    talk = [
        message
        for question, answer in sample.earlier
        for message in (Message("user", (question,)), Message("assistant", (answer,)))
    ]
    return replace(request, messages=(*system, *talk, asked))


def lengthened(sample: Sample) -> Sample:
    """Repeat the background at each clip's end until its number of frames is one of few."""
    return replace(sample, clips=tuple(_lengthened_clip(clip) for clip in sample.clips))


def _lengthened_clip(clip: NDArray[np.int16]) -> NDArray[np.int16]:
    frames = (len(clip) - 400) // 160 + 1
    step = next((step for most, step in CLIP_STEPS if frames <= most), 1)
    wanted = -(-frames // step) * step
    missing = max(0, (wanted - 1) * 160 + 400 - len(clip))
    return np.concatenate((clip, np.resize(clip[-800:], missing)))


def _bytes(crops: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels of [-1, 1] in a byte each: exact but for the global view's interpolation."""
    pixels: NDArray[np.uint8] = np.clip(np.rint((crops + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels


def _order(prompt: Prompt, cells: int) -> NDArray[np.int64]:
    if not prompt.images:
        return np.zeros(0, np.int64)
    order = token_order(prompt.images)
    return np.where(order == cells, ROW_END, np.where(order == cells + 1, VIEW_END, order))


def _letter_places(image: ImageInput) -> NDArray[np.int64]:
    """Which patch of the image's crops stands where.

    A picture is read along its columns, so they come first. Returns [columns, rows].
    """
    mask = image.patch_mask
    return laid_out(np.arange(mask.size).reshape(mask.shape), mask, image.footprint).T


def _end_to_end(pictures: Sequence[Tensor]) -> Tensor:
    """The columns of several pictures, all made as tall as the tallest."""
    rows = max((picture.shape[1] for picture in pictures), default=0)
    padded = [F.pad(picture, (0, rows - picture.shape[1]), value=NO_PATCH) for picture in pictures]
    return torch.cat(padded) if padded else torch.zeros((0, 0), dtype=torch.int64)


def _is_told(sample: Sample) -> bool:
    """Whether the answer is, word for word, what the one clip says."""
    return sample.task == "transcribe"


def _joined(parts: Sequence[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))


def join(lessons: Sequence[Lesson]) -> Lesson:
    """Several lessons as one."""
    tokens = _offsets([len(lesson.ids) for lesson in lessons])
    rows = _offsets([len(lesson.lengths) for lesson in lessons])
    side = lessons[0].patch_mask.shape[-1] // 2
    cells = _offsets([len(lesson.crops) * side * side for lesson in lessons])
    patches = _offsets([lesson.patch_mask.numel() for lesson in lessons])
    shifted = list(zip(lessons, tokens, strict=True))
    return Lesson(
        tasks=[task for lesson in lessons for task in lesson.tasks],
        lengths=[length for lesson in lessons for length in lesson.lengths],
        adapters=[adapter for lesson in lessons for adapter in lesson.adapters],
        ids=torch.cat([lesson.ids for lesson in lessons]),
        answer_places=torch.cat([lesson.answer_places + at for lesson, at in shifted]),
        answers=torch.cat([lesson.answers for lesson in lessons]),
        answer_rows=torch.cat([lesson.answer_rows + at for lesson, at in zip(lessons, rows, strict=True)]),
        crops=torch.cat([lesson.crops for lesson in lessons]),
        patch_mask=torch.cat([lesson.patch_mask for lesson in lessons]),
        order=torch.cat(
            [torch.where(x.order < 0, x.order, x.order + at) for x, at in zip(lessons, cells, strict=True)]
        ),
        image_places=torch.cat([lesson.image_places + at for lesson, at in shifted]),
        clip_frames=[frames for lesson in lessons for frames in lesson.clip_frames],
        heads=[head for lesson in lessons for head in lesson.heads],
        features=torch.cat([lesson.features for lesson in lessons]),
        clip_places=torch.cat([lesson.clip_places + at for lesson, at in shifted]),
        words=[words for lesson in lessons for words in lesson.words],
        letter_places=_end_to_end(
            [
                torch.where(x.letter_places == NO_PATCH, NO_PATCH, x.letter_places + at)
                for x, at in zip(lessons, patches, strict=True)
            ]
        ),
        letter_columns=[columns for lesson in lessons for columns in lesson.letter_columns],
        letters=[letters for lesson in lessons for letters in lesson.letters],
    )


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()][:-1]
