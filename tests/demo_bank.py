"""A bank small enough to make in a test: Pillow's own typeface, a few words, voices that are sines."""

import io

import numpy as np
from PIL import ImageFont

from memphi.demo import sound
from memphi.demo.bank import Bank, Face, Voice
from memphi.demo.vocabulary import SPOKEN_SENTENCES, SPOKEN_WORDS


def tone(seed, seconds):
    times = np.arange(int(seconds * sound.RATE)) / sound.RATE
    return sound.levelled(np.sin(2 * np.pi * (200 + 40 * seed) * times))


def sine_voice(name, make, split, seed):
    words = {text: tone(seed + place, 0.25) for place, text in enumerate(SPOKEN_WORDS)}
    questions = {text: tone(seed, 0.6) for text in SPOKEN_SENTENCES}
    return Voice(name, make, split, words, questions, {"one two three": tone(seed, 0.7)})


def tiny_bank():
    font = ImageFont.load_default(20).path
    assert isinstance(font, io.BytesIO), "Pillow carries this typeface itself"
    data = font.getvalue()
    splits = ("train", "held-out")
    silent = Voice("a person", "human", "tried", {"seven": tone(7, 0.5)}, {}, {})
    return Bank(
        faces={split: (Face(f"family {split}", "Regular", split, data),) for split in splits},
        words={"train": ("cat", "house", "be", "window", "alphabets"), "held-out": ("dog", "garden", "it")},
        voices={
            "train": tuple(sine_voice(f"voice {seed}", f"make {seed % 2}", "train", seed) for seed in range(3)),
            "held-out": (sine_voice("voice 9", "make 9", "held-out", 9),),
            "tried": (silent,),
        },
    )
