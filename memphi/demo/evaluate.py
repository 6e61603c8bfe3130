"""Measure the demo model: `python -m memphi.demo.evaluate --bank .bank --json scores.json`.

Asks the engine every part of the exam as a person would, again with both adapters switched off, and prints tables.
Knows how to ask, switch off and report; `exam` knows what is asked, `score` what is right.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from memphi.checkpoint.locate import locate
from memphi.config import CacheChoice, EngineConfig, SchemeChoice
from memphi.demo import bank, exam, photographs
from memphi.demo.exam import Group, Part
from memphi.demo.lesson import conversation
from memphi.demo.score import DEMANDS, Score, aligned, scored, scores, table
from memphi.demo.tasks import Sample
from memphi.engine.engine import Engine, load
from memphi.model.adapters import Adapter
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.weights import Int8Weight
from memphi.request import Request, SamplingParams

Pairs = list[tuple[str, str]]
Advance = Callable[[int], object]
"""Called with the number of samples just answered."""

BATCH = 32
TITLES: Mapping[Group, str] = {
    "asked": "Task by task",
    "closer": "A closer look",
    "voices": "Each voice that training never heard (word error rate)",
    "tried": "Real photographs and voices of other kinds, never trained for",
}


@dataclass(frozen=True)
class SwitchedOff:
    """One demand with its adapter on and off, as the share that is right."""

    name: str
    on: float
    off: float

    @property
    def guards(self) -> bool:
        """Whether the score really rests on the adapter: without it, it falls under half."""
        return self.off < self.on / 2


@dataclass(frozen=True)
class Report:
    """All scores of one evaluation."""

    demands: list[Score]
    groups: dict[Group, list[Score]]
    switched_off: list[SwitchedOff]

    def text(self) -> str:
        """Every table below its title."""
        sections = [
            ("What is asked for", table(self.demands)),
            ("Adapters switched off (share right)", _switched_off_table(self.switched_off)),
            *((TITLES[group], table(lines)) for group, lines in self.groups.items() if lines),
        ]
        return "\n\n".join(f"{title}\n{'-' * len(title)}\n{body}" for title, body in sections)

    def document(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "demands": [_plain(line) for line in self.demands],
            "groups": {group: [_plain(line) for line in lines] for group, lines in self.groups.items()},
            "adapters_off": [asdict(line) | {"guards": line.guards} for line in self.switched_off],
        }


def evaluate(engine: Engine, parts: Sequence[Part], advance: Advance = lambda _: None) -> Report:
    """Ask all parts, then those that need an adapter without adapters; the model is left as it was."""
    answered = [ask(engine, part.samples, advance) for part in parts]
    guarded = [part for part in parts if is_guarded(part)]
    # A fresh engine: what the old one keeps of earlier prompts was computed with adapters.
    with adapters_off(engine.model), closing(Engine(engine.model, engine.tokenizer, engine.config)) as bare:
        unadapted = [ask(bare, part.samples, advance) for part in guarded]
    lines = list(zip(parts, answered, strict=True))
    return Report(
        demands=scores(_by_task(lines)),
        groups={group: [_score(part, pairs) for part, pairs in lines if part.group == group] for group in TITLES},
        switched_off=_compare(lines, list(zip(guarded, unadapted, strict=True))),
    )


def ask(engine: Engine, samples: Sequence[Sample], advance: Advance = lambda _: None) -> Pairs:
    """The engine's greedy answers beside the right ones, in the order of the samples."""
    # Answers of about one length end together: no row of a batch waits for another.
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].answer))
    answers = [""] * len(samples)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        for i, result in zip(batch, engine.generate([request(samples[i]) for i in batch]), strict=True):
            answers[i] = result.text
        advance(len(batch))
    return [(answer, sample.answer) for answer, sample in zip(answers, samples, strict=True)]


def request(sample: Sample) -> Request:
    """What a person would send; the answer may be half as long again as the right one, and a sentence more."""
    return conversation(sample, SamplingParams(max_tokens=48 + len(sample.answer) * 3 // 2))


@contextmanager
def adapters_off(model: Phi4MM) -> Iterator[None]:
    """Make both adapters add nothing, until the end of the block; they must not come and go."""
    assert model.placement in ("resident", "towers"), "adapters on the host would come back as they were"
    found = [module.b for module in model.modules() if isinstance(module, Adapter)]
    matrices = cast(list[Tensor | Int8Weight], found)  # Under a scheme the one is in the other's place.
    weights = [matrix.codes if isinstance(matrix, Int8Weight) else matrix for matrix in matrices]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def is_guarded(part: Part) -> bool:
    """Whether the part is one that must fail without adapters: text alone uses none."""
    return part.group == "asked" and part.demand.tasks[0] not in DEMANDS[-1].tasks


def weights_digest(folder: Path) -> str:
    """Sixteen hex digits that tell a folder's weights from any other's."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the demo model on held-out samples."""
    parser = argparse.ArgumentParser(prog="python -m memphi.demo.evaluate", description=main.__doc__)
    parser.add_argument("--bank", type=Path, required=True, help="the folder that memphi.demo.bank made")
    parser.add_argument("--model", default="demo", help="a folder, or demo: the shipped one")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--samples", type=int, default=200, help="samples of each task")
    parser.add_argument(
        "--photographs", action="store_true", help=f"fetch Debian's {photographs.PACKAGE} and try it too"
    )
    parser.add_argument("--cache-format", choices=get_args(CacheChoice), default="auto", help="of keys and values")
    parser.add_argument("--scheme", choices=get_args(SchemeChoice), default="auto", help="of the weights")
    parser.add_argument("--json", type=Path, help="write all scores into this file")
    chosen = parser.parse_args(arguments)
    parts = exam.parts(bank.read(chosen.bank), chosen.samples)
    if chosen.photographs:
        parts += photographs.parts()
    engine = load(
        chosen.model, chosen.device, config=EngineConfig(cache_format=chosen.cache_format, scheme=chosen.scheme)
    )
    report = _with_progress(engine, parts)
    print(report.text())
    if chosen.json:
        facts = _facts(chosen.model, engine, chosen.samples)
        chosen.json.write_text(json.dumps(facts | report.document(), indent=1) + "\n")
    return 0


def _with_progress(engine: Engine, parts: Sequence[Part]) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    asked = sum(len(part.samples) * (1 + is_guarded(part)) for part in parts)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answering", total=asked)
        return evaluate(engine, parts, lambda answered: progress.advance(bar, answered))


def _facts(model: str, engine: Engine, samples: int) -> dict[str, Any]:
    return {
        "digest": weights_digest(locate(model).folder),
        "samples": samples,
        "first_seed": exam.FIRST_SEED,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "cache_format": engine.plan.cache_format,
        "scheme": engine.plan.scheme,
    }


def _by_task(lines: Sequence[tuple[Part, Pairs]]) -> dict[str, Pairs]:
    return {part.demand.tasks[0]: pairs for part, pairs in lines if part.group == "asked"}


def _score(part: Part, pairs: Pairs) -> Score:
    return scored(part.demand, pairs)


def _compare(on: Sequence[tuple[Part, Pairs]], off: Sequence[tuple[Part, Pairs]]) -> list[SwitchedOff]:
    with_adapters, without = scores(_by_task(on)), scores(_by_task(off))
    return [
        SwitchedOff(one.name, one.share_right, other.share_right)
        for one, other in zip(with_adapters, without, strict=True)
        if other.count
    ]


def _switched_off_table(lines: Sequence[SwitchedOff]) -> str:
    rows = [(line.name, f"{line.on:.1%}", f"{line.off:.1%}", "ok" if line.guards else "missed") for line in lines]
    return aligned([("", "on", "off", "under half"), *rows])


def _plain(line: Score) -> dict[str, Any]:
    return asdict(line) | {"passed": line.passed}


if __name__ == "__main__":
    sys.exit(main())
