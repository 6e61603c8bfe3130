"""Train the demo model: `python -m memphi.demo.train --bank .bank --out .train --minutes 9`.

One command, resumable: it goes on from what --out holds, and the last run is given --finish, which lets the learning
rate fall to zero. Knows the optimiser and the losses; `supply` brings the lessons. Meant for one data-centre GPU; a CPU
does it too, for a test.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from memphi.checkpoint.loader import load_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import ModelConfig
from memphi.demo.evaluate import weights_digest
from memphi.demo.lesson import NO_PATCH, Lesson
from memphi.demo.shape import tokenizer_document
from memphi.demo.supply import Source, Supply, held_out_lessons
from memphi.demo.vocabulary import READ_LETTERS, SPOKEN_WORDS
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row, pack
from memphi.model.upload import upload

WARMUP_STEPS = 200
WORD_LOSS_WEIGHT = 0.3
LETTER_LOSS_WEIGHT = 0.3
COLUMN_FRAMES = 2
"""In how many steps the letter head reads a column of patches; a small letter is narrower than a patch."""
ANCHOR_STEPS = 100
SHORT_FRAMES = 1024
"""Clips of no more frames are encoded apart from longer ones, beside which they would be mostly padding."""
GROUP_FRAMES = 4096
"""Clips of one length are filled up to about a multiple of so many frames: cuDNN keeps what it planned for a shape."""
THROAT_RANGE = 0.24
"""By how much of itself a voice's formants are moved, from the lowest to the highest."""
LESSON_NUMBERS = 10**9
"""Of which a run from a checkpoint begins somewhere."""
STATE_PART_BYTES = 15_000_000


class Student(nn.Module):
    """The model, and two heads that are dropped afterwards: one hears words in the audio encoder's output, the other
    reads letters in the vision tower's.

    Their losses are connectionist temporal classification (Graves et al. 2006), over whole words in time, and over
    letters along the columns of a picture (Shi et al. 2015); they teach the encoders to listen and to read long before
    the decoder could ask them to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Phi4MM(config)
        self.word_head = nn.Linear(config.audio.hidden_size, 1 + len(SPOKEN_WORDS))
        self.letter_head = LetterHead(config.vision.hidden_size)

    def forward(self, lesson: Lesson, augment: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [answer tokens, vocab_size], the loss of the word head and the loss of the letter head."""
        model = self.model
        image_rows, letter_loss = self._see(lesson, augment)
        clip_rows, word_loss = self._hear(lesson, augment)
        places = torch.cat((lesson.image_places, lesson.clip_places))
        embeddings = model.language.embedding(lesson.ids)
        rows = torch.cat([part for part in (image_rows, clip_rows) if part is not None] or [embeddings[:0]])
        embeddings = embeddings.to(rows.dtype).index_copy(0, places, rows)
        packed = [Row(n, adapter=name or None) for n, name in zip(lesson.lengths, lesson.adapters, strict=True)]
        hidden = model.language(embeddings, pack(packed, lesson.ids.device))
        return model.language.logits(hidden[lesson.answer_places]).float(), word_loss, letter_loss

    def _see(self, lesson: Lesson, augment: bool) -> tuple[Tensor | None, Tensor]:
        if not len(lesson.crops):
            return None, torch.zeros((), device=lesson.ids.device)
        model, crops = self.model, lesson.crops.float() / 127.5 - 1
        if augment:
            strength = torch.rand(len(crops), 1, 1, 1, device=crops.device) * 0.06
            crops = crops + strength * torch.randn_like(crops)
        features = model.vision(crops, lesson.patch_mask)
        cells = len(crops) * (lesson.patch_mask.shape[-1] // 2) ** 2
        order = torch.where(lesson.order < 0, cells - 1 - lesson.order, lesson.order)
        rows: Tensor = model.image_projector(model.image_projector.arrange(features, order))
        return rows, self._letter_loss(features, lesson)

    def _letter_loss(self, features: Tensor, lesson: Lesson) -> Tensor:
        """The loss of the letter head on the pictures whose text is told; features are those of all crops."""
        if not lesson.letters:
            return torch.zeros((), device=features.device)
        scores = self.letter_head(features.flatten(0, 1), lesson.letter_places, lesson.letter_columns)
        said = torch.tensor([len(letters) for letters in lesson.letters])
        frames = COLUMN_FRAMES * torch.tensor(lesson.letter_columns)
        targets = upload(np.concatenate(lesson.letters), scores.device)
        loss: Tensor = F.ctc_loss(scores.transpose(0, 1), targets, frames, said, zero_infinity=True)
        return loss

    def _hear(self, lesson: Lesson, augment: bool) -> tuple[Tensor | None, Tensor]:
        silent = torch.zeros((), device=lesson.ids.device)
        if not lesson.clip_frames:
            return None, silent
        features = lesson.features.float()
        clips = (_disturbed(features, lesson.clip_frames) if augment else features).split(lesson.clip_frames)
        heard: dict[int, Tensor] = {}
        for places in _classes(lesson.clip_frames):
            encoded = self.model.audio([clips[i] for i in places], window_batch=2 * len(places))
            heard |= dict(zip(places, encoded, strict=True))
        features = torch.cat([heard[i] for i in range(len(clips))])
        counts = np.array([len(heard[i]) for i in range(len(clips))])
        with_images = np.repeat([head == "vision" for head in lesson.heads], counts)
        speech, vision = (projector(features) for projector in self.model.audio_projectors.values())
        rows = torch.where(upload(with_images, features.device)[:, None], vision, speech)
        return rows, self._word_loss(features, counts, lesson.words)

    def _word_loss(self, features: Tensor, counts: NDArray[np.int64], words: list[list[int]]) -> Tensor:
        """The loss of the word head on the clips whose words are told; features are those of all clips, end to end.

        Lengths are known on the host: nothing here waits for the device.
        """
        told = [i for i, said in enumerate(words) if said]
        if not told:
            return torch.zeros((), device=features.device)
        starts, lengths = (counts.cumsum() - counts)[told], counts[told]
        places = (starts[:, None] + np.arange(lengths.max())).clip(max=len(features) - 1)
        scores = self.word_head(features).float().log_softmax(-1)[upload(places, features.device)]
        targets = upload(np.concatenate([words[i] for i in told]), scores.device)
        said = torch.tensor([len(words[i]) for i in told])
        lengths_heard = torch.from_numpy(lengths)
        loss: Tensor = F.ctc_loss(scores.transpose(0, 1), targets, lengths_heard, said, zero_infinity=True)
        return loss


class LetterHead(nn.Module):
    """Reads pictures column by column: what stands in a column, some frames of it, and which letter each frame says."""

    def __init__(self, in_features: int, width: int = 128) -> None:
        super().__init__()
        self.patch = nn.Linear(in_features, width)
        self.row_score = nn.Linear(width, 1, bias=False)
        self.norm = nn.LayerNorm(width)
        self.neighbours = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.frames = nn.Linear(width, COLUMN_FRAMES * (1 + len(READ_LETTERS)))

    def forward(self, features: Tensor, places: Tensor, columns: list[int]) -> Tensor:
        """Score the letters of some pictures.

        features [patches, in]; places [columns of all pictures, rows] counts patches, NO_PATCH for none; columns of
        each picture. Returns log probabilities [pictures, frames, 1 + letters] in fp32.
        """
        seen = self.norm(self._columns(self.patch(features), places))
        seen = _rows_at(seen, upload(_places_apart(columns), seen.device))  # [pictures, columns, width]
        near = F.gelu(self.neighbours(seen.transpose(1, 2)).transpose(1, 2))
        scores: Tensor = self.frames(near).unflatten(2, (COLUMN_FRAMES, -1)).flatten(1, 2).float().log_softmax(-1)
        return scores

    def _columns(self, patches: Tensor, places: Tensor) -> Tensor:
        """Each column's patches, weighed by how much they have to say: [columns, width]."""
        # Taken after the first linear, whose output is bf16 under autocast: this is the head's only large tensor.
        taken = _rows_at(patches, places)  # [columns, rows, width]
        scores = self.row_score(taken).squeeze(2).masked_fill(places == NO_PATCH, -math.inf)
        return torch.matmul(scores.softmax(1)[:, None], taken).squeeze(1)


def _classes(clip_frames: Sequence[int]) -> Iterator[list[int]]:
    """The places of clips to encode together, shortest first; some come twice, to fill up those of their length."""
    by_length = sorted(range(len(clip_frames)), key=lambda place: clip_frames[place])
    for _, some in groupby(by_length, key=lambda place: clip_frames[place] > SHORT_FRAMES):
        yield [
            place
            for _, alike in groupby(some, key=lambda p: clip_frames[p])
            for place in _filled(list(alike), clip_frames)
        ]


def _filled(alike: list[int], clip_frames: Sequence[int]) -> list[int]:
    """Places of clips of one length, the first once more until they are a multiple of what goes into GROUP_FRAMES."""
    return alike + alike[:1] * (-len(alike) % max(1, GROUP_FRAMES // clip_frames[alike[0]]))


def _rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Rows of a table, zeros at NO_PATCH; unlike indexing, quick to differentiate where many places have no row."""
    none = len(table)
    padded = torch.cat((table, table.new_zeros(1, table.shape[1])))
    return F.embedding(torch.where(places == NO_PATCH, none, places), padded, padding_idx=none)


def _places_apart(lengths: list[int]) -> NDArray[np.int64]:
    """Where the parts of a list stand that holds them end to end: [parts, longest], NO_PATCH after a part's end."""
    counts = np.array(lengths)
    starts, steps = counts.cumsum() - counts, np.arange(counts.max())
    return np.where(steps < counts[:, None], starts[:, None] + steps, NO_PATCH)


def _disturbed(features: Tensor, clip_frames: list[int]) -> Tensor:
    """Each clip from another throat, at another level and tone, a band of mel bins missing.

    After vocal tract length perturbation (Jaitly and Hinton 2013) and SpecAugment (Park et al. 2019).
    """
    device, mel_bins = features.device, features.shape[1]
    bins = torch.arange(mel_bins, device=device)
    throat, level, tilt, start, width = torch.rand(5, len(clip_frames), 1, device=device)
    change = (level - 0.5) * 2 + (tilt - 0.5) * 2 * (bins / mel_bins - 0.5)
    missing = (bins >= start * mel_bins) & (bins < start * mel_bins + 12 * width)
    clip_of_frame = upload(np.repeat(np.arange(len(clip_frames)), clip_frames), device)
    sources = (bins * (1 + (throat - 0.5) * THROAT_RANGE)).clamp(max=mel_bins - 1)[clip_of_frame]  # [frames, bins]
    below = sources.long()
    above, share = (below + 1).clamp(max=mel_bins - 1), sources - below
    warped = features.gather(1, below) * (1 - share) + features.gather(1, above) * share
    changed: Tensor = (warped + change[clip_of_frame]).clamp(min=0).masked_fill(missing[clip_of_frame], 8.0)
    return changed


@dataclass(frozen=True)
class Settings:
    """How one run trains."""

    minutes: float
    finish: bool
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    lessons: int = 12
    workers: int = 7
    capacity: int = 2500
    first_lessons: int = 100


def train(
    student: Student, weights: "Weights", supply: Supply, settings: Settings, progress: dict[str, int], log: "Log"
) -> None:
    """Train until the minutes are over; progress holds the steps and lessons of all runs and is kept up to date."""
    optimiser = _optimiser(weights, settings)
    chance = np.random.default_rng(progress["steps"])
    anchor = Anchor(weights)
    started, warm, seen = time.monotonic(), 0, progress["lessons"]
    while (share := (time.monotonic() - started) / (60 * settings.minutes)) < 1:
        warmth = min(1, (warm + 1) / WARMUP_STEPS)
        rate = settings.learning_rate * anchor.rate_scale * warmth * _fall(share, settings.finish)
        for group in optimiser.param_groups:
            group["lr"] = rate
        lesson = supply.draw(settings.lessons, chance)
        losses = _losses(student, lesson)
        losses.total().backward()
        weights.take_gradients()
        norm = nn.utils.clip_grad_norm_(weights.parts, 1.0)
        # The fused optimiser skips a step whose gradient overflowed, without a word from the host.
        optimiser.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimiser.step()
        weights.round()
        warm += 1
        progress["steps"] += 1
        progress["lessons"] = seen + supply.made
        if warm % ANCHOR_STEPS == 0:
            anchor.check(losses.answers)
        log.step(progress, share, losses, rate, lesson)


class Weights:
    """A student's weights in fp32, which the optimiser moves, end to end; the student computes with rounded ones.

    One tensor of each dtype makes a step of the optimiser a few launches, where a launch for each weight would keep a
    slow host longer than the device needs for the rest.
    """

    def __init__(self, student: Student, dtype: torch.dtype) -> None:
        self._weights = sorted(student.parameters(), key=lambda weight: weight.dim() < 2)
        matrices = sum(weight.numel() for weight in self._weights if weight.dim() >= 2)
        self.exact = torch.cat([weight.detach().flatten() for weight in self._weights])
        self.parts = [nn.Parameter(self.exact[:matrices]), nn.Parameter(self.exact[matrices:])]
        """Matrices, and the other weights, which do not decay."""
        self._rounded = self.exact.to(dtype)
        self._buffers = {buffer: buffer.clone() for buffer in student.buffers()}
        self._place(self._rounded)

    def take_gradients(self) -> None:
        """Move the student's gradients to the optimiser's tensors."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        gradient = torch.cat([some.flatten() for some in gradients]).float()
        for part, some in zip(self.parts, gradient.split([len(part) for part in self.parts]), strict=True):
            part.grad = some
        for weight in self._weights:
            weight.grad = None

    def round(self) -> None:
        """Let the student compute with what the weights are now."""
        self._rounded.copy_(self.exact)

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Meanwhile the student's weights are those of the optimiser."""
        self._place(self.exact)
        yield
        self._place(self._rounded)

    def _place(self, values: Tensor) -> None:
        pieces = values.split([weight.numel() for weight in self._weights])
        for weight, piece in zip(self._weights, pieces, strict=True):
            weight.data = piece.view_as(weight)
        for buffer, exact in self._buffers.items():
            buffer.data = exact.to(values.dtype)


class Anchor:
    """The last weights that were sound, to fall back on at a lower rate should training diverge."""

    def __init__(self, weights: Weights) -> None:
        self.rate_scale = 1.0
        self._weights = weights
        self._kept = weights.exact.clone()

    def check(self, loss: Tensor) -> None:
        """Keep the weights while the loss is a number; else go back to those kept, and halve the rate."""
        if math.isfinite(loss.item()):
            self._kept.copy_(self._weights.exact)
            return
        self._weights.exact.copy_(self._kept)
        self._weights.round()
        self.rate_scale /= 2
        print(f"training diverged; going back, at {self.rate_scale} of the rate", flush=True)


def _fall(share: float, finish: bool) -> float:
    """Full rate for the first third of a finishing run, then down to zero in a straight line."""
    return min(1.0, 1.5 * (1 - share)) if finish else 1.0


@dataclass(frozen=True)
class Losses:
    """What a step is to make smaller."""

    answers: Tensor
    words: Tensor
    letters: Tensor

    def total(self) -> Tensor:
        return self.answers + WORD_LOSS_WEIGHT * self.words + LETTER_LOSS_WEIGHT * self.letters


def _losses(student: Student, lesson: Lesson) -> Losses:
    logits, word_loss, letter_loss = student(lesson, augment=True)
    return Losses(F.cross_entropy(logits, lesson.answers), word_loss, letter_loss)


def _optimiser(weights: Weights, settings: Settings) -> torch.optim.Optimizer:
    matrices, others = (
        {"params": [part], "weight_decay": decay}
        for part, decay in zip(weights.parts, (settings.weight_decay, 0.0), strict=True)
    )
    return torch.optim.AdamW([matrices, others], lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def exact_share(student: Student, lesson: Lesson) -> float:
    """The share of answers that greedy decoding would give exactly."""
    logits, *_ = student(lesson, augment=False)
    right = logits.argmax(-1) == lesson.answers
    wrong_rows = set(lesson.answer_rows[~right].tolist())
    return 1 - len(wrong_rows) / len(lesson.lengths)


@dataclass
class Log:
    """Prints how training goes: a line every so many steps, and the held-out scores now and then."""

    student: Student
    held_out: Mapping[str, Lesson]
    every: int = 100
    scores_every: int = 1500

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def step(self, progress: Mapping[str, int], share: float, losses: Losses, rate: float, lesson: Lesson) -> None:
        steps = progress["steps"]
        if steps % self.every == 0:
            seconds = time.monotonic() - self.started
            print(
                f"step {steps} {share:5.1%} {seconds:.0f} s loss {losses.answers.item():.4f} "
                f"words {losses.words.item():.3f} letters {losses.letters.item():.3f} "
                f"rate {rate:.1e} made {progress['lessons']} tokens {len(lesson.ids)} crops {len(lesson.crops)}",
                flush=True,
            )
        if steps % self.scores_every == 0:
            print(" ".join(f"{task} {score:.3f}" for task, score in self.scores().items()), flush=True)

    def scores(self) -> dict[str, float]:
        """Exact answers per task, held out."""
        return {task: exact_share(self.student, lesson) for task, lesson in self.held_out.items()}


def initialise(student: Student, frames: Tensor) -> None:
    """Random weights, each output about as large as its input; the encoder's normalisation from real frames."""
    config = student.model.config
    depth = {"language": config.language.layers, "vision": config.vision.layers, "audio": 2 * config.audio.layers}
    for name, weight in student.named_parameters():
        if weight.dim() == 1:
            nn.init.constant_(weight, 1.0 if name.endswith("norm.weight") else 0.0)
        elif name.endswith("language.embedding.weight") or "separator" in name or "position_embedding" in name:
            nn.init.normal_(weight, std=0.05)
        elif name.endswith(("adapters.vision.b", "adapters.speech.b", "_bias", "relative_bias.weight")):
            nn.init.zeros_(weight)
        else:
            ends_branch = name.endswith(("out.weight", "down.weight")) and ".layers." in name
            part = next((part for part in depth if part in name), "language")
            scale = 1 / math.sqrt(2 * depth[part]) if ends_branch else 1.0
            nn.init.normal_(weight, std=scale / math.sqrt(weight[0].numel()))
    student.model.audio.mean.copy_(frames.mean(0))
    student.model.audio.inverse_deviation.copy_(1 / frames.std(0))


def save_state(student: Student, progress: Mapping[str, int], folder: Path) -> None:
    """Write the fp32 weights in parts of at most 15 MB, and how far training came."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in student.state_dict().items():
        if sum(t.numel() * 4 for t in parts[-1].values()) + tensor.numel() * 4 > STATE_PART_BYTES:
            parts.append({})
        parts[-1][name] = tensor.detach().float().cpu().contiguous()
    for number, part in enumerate(parts):
        safetensors.torch.save_file(part, folder / f"state-{number}.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress))


def load_state(student: Student, folder: Path) -> None:
    """Read the weights that save_state wrote, also before there was a letter head: it is then left as it is."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    head = {name: tensor for name, tensor in student.state_dict().items() if name.startswith("letter_head.")}
    if head.keys().isdisjoint(tensors):
        print(f"the state in {folder} has no letter head: that one begins anew", flush=True)
        tensors |= head
    student.load_state_dict(tensors)


def write_demo(student: Student, folder: Path) -> None:
    """Write the model alone, in bf16 and the official layout, with its tokenizer, in place of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    model = Phi4MM(student.model.config)
    model.load_state_dict(student.model.state_dict())
    write_checkpoint(model.to(torch.bfloat16), folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()), encoding="utf-8")


def load_start(student: Student, folder: Path) -> None:
    """Take the model's weights from a demo checkpoint; the heads of the second losses begin anew."""
    student.model.load_state_dict(load_model(folder, "cpu", torch.float32).state_dict())


def beginning(start: Path | None) -> dict[str, int]:
    """The progress of a run that begins: no steps, no lessons, and the number of its first lesson.

    From a checkpoint lessons are others than those that made it, which began at 0, or elsewhere likewise.
    """
    return {"steps": 0, "lessons": 0, "first": 0 if start is None else int(weights_digest(start), 16) % LESSON_NUMBERS}


def run(bank: Path, out: Path, settings: Settings, device: torch.device, start: Path | None = None) -> None:
    """One run: go on from `out` or begin, train, write the state, the demo checkpoint and the held-out scores there.

    `start` is a demo checkpoint whose weights a beginning takes instead of random ones.
    """
    resumed = (out / "progress.json").exists()
    progress = json.loads((out / "progress.json").read_text()) if resumed else beginning(start)
    supply = Supply(bank, settings.workers, progress["first"] + progress["lessons"], settings.capacity, device)
    try:
        source = Source.open(bank)
        student = Student(source.config)
        if resumed:
            load_state(student, out)
        else:
            initialise(student, source.task_lesson("transcribe", "train", 64).features.float())
            if start is not None:
                load_start(student, start)
        student.to(device)
        watched = {task: lesson.to(device) for task, lesson in held_out_lessons(source, 64)}
        supply.wait_for(settings.first_lessons)
        log = Log(student, watched)
        weights = Weights(student, torch.bfloat16 if device.type == "cuda" else torch.float32)
        train(student, weights, supply, settings, progress, log)
        with weights.unrounded():
            save_state(student, progress, out)
        scores = log.scores()
        (out / "scores.json").write_text(json.dumps(scores, indent=1))
        print(json.dumps(scores, indent=1))
        write_demo(student.cpu(), out / "checkpoint")
    finally:
        supply.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, required=True, help="the folder that memphi.demo.bank made")
    parser.add_argument("--out", type=Path, required=True, help="where training goes on from and writes to")
    parser.add_argument("--minutes", type=float, required=True, help="how long to train in this run")
    parser.add_argument("--start", type=Path, help="a demo checkpoint to begin from, where --out holds nothing yet")
    parser.add_argument("--finish", action="store_true", help="the last run: let the learning rate fall to zero")
    # Beside more, a step takes twice as long: it keeps its host as busy as the device.
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) // 2 - 1))
    parser.add_argument("--rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--lessons", type=int, default=Settings.lessons, help="how many a step joins, of 64 samples")
    arguments = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # a run with it on ended in NaN
    # Read by the workers' numpy when they start: one thread each, since there is a worker for every core.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(
        arguments.minutes,
        arguments.finish,
        learning_rate=arguments.rate,
        lessons=arguments.lessons,
        workers=arguments.workers,
    )
    run(arguments.bank, arguments.out, settings, device, arguments.start)


if __name__ == "__main__":
    main()
