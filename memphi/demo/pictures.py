"""Pictures of the demo's world: text in a typeface, and coloured shapes, on grounds of many kinds.

Knows how to draw what it is told, with chance only in what does not matter to the answer (place, tint, texture). Knows
no questions. `tasks` calls `text_picture` and `shapes_picture`; both return uint8 arrays of shape (height, width, 3).
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Colour = tuple[float, float, float]
Chance = np.random.Generator

LEAST_GLYPH = 14
_OVERSAMPLING = 3
# Hue (degrees), saturation and value ranges that everybody would call by that name.
_COLOUR_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 6), (0.8, 1.0), (0.7, 1.0)),
    "orange": ((24, 34), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((50, 60), (0.8, 1.0), (0.88, 1.0)),
    "green": ((100, 145), (0.6, 1.0), (0.45, 0.8)),
    "blue": ((208, 240), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((272, 296), (0.55, 1.0), (0.45, 0.8)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
}


@dataclass(frozen=True)
class Drawn:
    """One shape: its name, its colour's name, centre and radius in pixels, turn in radians."""

    shape: str
    colour: str
    centre: tuple[float, float]
    radius: float
    turn: float


def text_picture(text: str, font: bytes, size: tuple[int, int], chance: Chance) -> Picture:
    """Draw the text in the typeface somewhere in a picture of size (width, height), large enough to read."""
    ink, (low, high) = _ink_and_ground(chance)
    ground = _ground(size, low, high, chance)
    mask = _text_mask(text, font, size, chance)
    left = int(chance.integers(0, max(1, size[0] - mask.width + 1)))
    top = int(chance.integers(0, max(1, size[1] - mask.height + 1)))
    ground.paste(_byte_colour(ink), (left, top), mask)
    return np.asarray(ground)


def shapes_picture(drawn: Sequence[Drawn], size: tuple[int, int], chance: Chance) -> Picture:
    """Draw the shapes in a picture of size (width, height), on a ground that every one of them stands out from."""
    fills = [_named_colour(item.colour, chance) for item in drawn]
    low, high = _ground_apart_from(fills, chance)
    ground = _ground(size, low, high, chance)
    for item, fill in zip(drawn, fills, strict=True):
        mask = _shape_mask(item)
        corner = (round(item.centre[0] - mask.width / 2), round(item.centre[1] - mask.height / 2))
        ground.paste(_byte_colour(fill), corner, mask)
    return np.asarray(ground)


def _named_colour(name: str, chance: Chance) -> Colour:
    hue, saturation, value = (float(chance.uniform(*limits)) for limits in _COLOUR_RANGES[name])
    return _rgb(hue, saturation, value)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    """Return red, green and blue in 0..1 for a hue in degrees."""
    parts = [(shift + hue / 60) % 6 for shift in (5, 3, 1)]
    red, green, blue = (value - value * saturation * max(0.0, min(part, 4 - part, 1.0)) for part in parts)
    return red, green, blue


def _light(colour: Colour) -> float:
    """Return how light a colour looks, 0..1."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _byte_colour(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colour)
    return red, green, blue


def _any_colour(chance: Chance) -> Colour:
    saturation = float(chance.uniform(0, 1)) * float(chance.uniform(0, 1))
    return _rgb(float(chance.uniform(0, 360)), saturation, float(chance.uniform(0, 1)))


def _ink_and_ground(chance: Chance) -> tuple[Colour, tuple[Colour, Colour]]:
    """Return the ink and the two colours that the ground varies between, both far from the ink in lightness."""
    if chance.random() < 0.25:
        return (0.0, 0.0, 0.0), ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    while True:
        ink, low, high = _any_colour(chance), _any_colour(chance), _any_colour(chance)
        gaps = [_light(ground) - _light(ink) for ground in (low, high)]
        if min(gaps) > 0.3 or max(gaps) < -0.3:
            return ink, (low, high)


def _ground_apart_from(fills: Sequence[Colour], chance: Chance) -> tuple[Colour, Colour]:
    """Return two similar ground colours, white, pale, dark or grey, that no fill could be lost against."""
    if chance.random() < 0.3 and min(math.dist((1, 1, 1), fill) for fill in fills) > 0.4:
        return (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)
    nearest, best = 0.0, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for _ in range(12):
        shade = _rgb(float(chance.uniform(0, 360)), float(chance.uniform(0, 0.25)), float(chance.uniform(0.05, 1)))
        other = tuple(min(1.0, max(0.0, part + float(chance.uniform(-0.08, 0.08)))) for part in shade)
        distance = min(math.dist(ground, fill) for ground in (shade, other) for fill in fills)
        if distance > nearest:
            nearest, best = distance, (shade, (other[0], other[1], other[2]))
        if distance > 0.4:
            break
    return best


def _ground(size: tuple[int, int], low: Colour, high: Colour, chance: Chance) -> Image.Image:
    """Draw a flat, graded, striped, chequered, cloudy or noisy ground between two colours."""
    width, height = size
    kind = chance.choice(["flat", "graded", "striped", "chequered", "cloudy"], p=[0.4, 0.2, 0.13, 0.07, 0.2])
    first, second = np.array(_byte_colour(low), np.float32), np.array(_byte_colour(high), np.float32)
    if kind == "flat":
        ground = Image.new("RGB", size, _byte_colour(low))
    else:
        weight = _weights(str(kind), width, height, chance)[..., None]
        ground = Image.fromarray((first + (second - first) * weight).astype(np.uint8))
    return _grainy(ground, chance) if chance.random() < 0.25 else ground


def _weights(kind: str, width: int, height: int, chance: Chance) -> NDArray[np.float32]:
    """Return where the second colour shows: an array (height, width) in 0..1."""
    if kind == "cloudy":
        coarse = chance.integers(0, 256, (max(2, height // 24), max(2, width // 24)), dtype=np.uint8)
        cloud = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(cloud, dtype=np.float32) / np.float32(255)
    period = int(chance.integers(5, 30))
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    if kind == "chequered":
        return np.asarray((rows // period + columns // period) % 2, dtype=np.float32)
    angle = float(chance.uniform(0, 2 * math.pi))
    slope = columns * np.float32(math.cos(angle)) + rows * np.float32(math.sin(angle))
    if kind == "striped":
        return np.asarray((slope / period) % 1 < 0.5, dtype=np.float32)
    return np.asarray((slope - slope.min()) / max(1.0, float(np.ptp(slope))), dtype=np.float32)


def _grainy(ground: Image.Image, chance: Chance) -> Image.Image:
    strength = int(chance.integers(4, 25))
    pixels = np.asarray(ground).astype(np.int16)
    grain = chance.integers(-strength, strength + 1, pixels.shape[:2], dtype=np.int16)
    return Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))


def _text_mask(text: str, font: bytes, size: tuple[int, int], chance: Chance) -> Image.Image:
    """Return the text as a mask that fits the picture, sometimes turned by a few degrees."""
    turn = float(chance.uniform(-8, 8)) if chance.random() < 0.4 else 0.0
    face, (left, top, right, bottom) = _fitting_face(text, font, size, turn, chance)
    mask = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), text, fill=255, font=face)
    return mask.rotate(turn, Image.Resampling.BICUBIC, expand=True) if turn else mask


def _fitting_face(
    text: str, font: bytes, size: tuple[int, int], turn: float, chance: Chance
) -> tuple[ImageFont.FreeTypeFont, tuple[int, int, int, int]]:
    """Return the typeface at a size drawn between the least legible and the largest that fits, and the text's box."""
    trial = ImageFont.truetype(io.BytesIO(font), 64)
    box, capital = trial.getbbox(text), trial.getbbox("H")
    width, height, glyph = box[2] - box[0] + 4, box[3] - box[1] + 4, capital[3] - capital[1]
    sine, cosine = abs(math.sin(math.radians(turn))), math.cos(math.radians(turn))
    largest = 0.94 * min(size[0] / (width * cosine + height * sine), size[1] / (width * sine + height * cosine))
    smallest = min(largest, max(LEAST_GLYPH / glyph, 0.4 * largest))
    face = trial.font_variant(size=max(4, int(64 * chance.uniform(smallest, largest))))
    left, top, right, bottom = face.getbbox(text)
    return face, (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))


def _shape_mask(item: Drawn) -> Image.Image:
    """Return a square mask with the shape in its middle, smooth at its edges."""
    side = 2 * math.ceil(item.radius) + 2
    middle, radius = side * _OVERSAMPLING / 2, item.radius * _OVERSAMPLING
    mask = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    if item.shape == "circle":
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
    else:
        cosine, sine = math.cos(item.turn) * radius, math.sin(item.turn) * radius
        corners = [(middle + x * cosine - y * sine, middle + x * sine + y * cosine) for x, y in _outline(item.shape)]
        draw.polygon(corners, fill=255)
    return mask.reduce(_OVERSAMPLING)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape within the unit circle, y downwards."""
    if shape == "square":
        return [(-0.71, -0.71), (0.71, -0.71), (0.71, 0.71), (-0.71, 0.71)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.87, 0.5), (-0.87, 0.5)]
    if shape == "star":
        turns = [(math.pi * step / 5, 1.0 if step % 2 == 0 else 0.42) for step in range(10)]
        return [(length * math.sin(turn), -length * math.cos(turn)) for turn, length in turns]
    if shape == "cross":
        arm, reach = 0.3, 0.95
        quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
        half = quarter + [(-y, x) for x, y in quarter]
        return half + [(-x, -y) for x, y in half]
    angles = [2 * math.pi * step / 32 for step in range(32)]
    return [(0.06 * 16 * math.sin(angle) ** 3, -0.06 * _heart_height(angle)) for angle in angles]


def _heart_height(angle: float) -> float:
    return 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
