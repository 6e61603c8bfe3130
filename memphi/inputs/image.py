"""Pictures: what one costs from its header alone, and its dynamic-HD crops, the definition of vision preprocessing.

Knows Pillow and the arithmetic of spec 4.3; nothing of ids or tensors. `prompt` calls it; the vision tower takes
`position_buckets` from here.

Differs from the official processor in three things, which `reference=True` switches off: a picture stands as its EXIF
orientation says, transparent parts lie on white, and 16-bit grey is scaled to 8 bits rather than clipped.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memphi.config import VisionConfig
from memphi.errors import MediaError
from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits, attached, sniff
from memphi.request import DecodedImage, Detail, Float32, ImageFootprint, ImageInput, Layout, Media, Pixels

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_SIDE = 10
"""Pixels that a resized picture must have in each direction (spec 4.3, step 5)."""
WHITE = 255
CUBIC = -0.75
"""The parameter of PyTorch's bicubic kernel."""
ORIENTATION_TAG = 0x0112
BITS_TAG, MEANING_TAG = 258, 262
"""Of TIFF: bits of each sample, and what its values mean, of which 0 is that zero is white."""


def measure_image(
    media: Media, vision: VisionConfig, limits: MediaLimits = DEFAULT_LIMITS, reference: bool = False
) -> ImageFootprint:
    """What a picture costs in its detail, from its header; raises MediaError, naming the attachment."""
    with attached(media.name):
        if isinstance(media.content, np.ndarray):
            height, width = media.content.shape[:2]
        else:
            with _reading(media):
                picture = _open(media, limits)
                width, height = _upright_size(picture, reference)
        return footprint(width, height, vision, media.detail)


def prepare_image(
    media: Media, vision: VisionConfig, limits: MediaLimits = DEFAULT_LIMITS, reference: bool = False
) -> ImageInput:
    """Decode a picture and cut it into normalised crops; raises MediaError, naming the attachment."""
    with attached(media.name):
        return preprocess(_decode(media, vision, limits, reference), vision, media.detail)


def decode_image(
    media: Media, vision: VisionConfig, limits: MediaLimits = DEFAULT_LIMITS, reference: bool = False
) -> DecodedImage:
    """Decode a picture whose crops the device makes; raises MediaError, naming the attachment."""
    with attached(media.name):
        pixels = _decode(media, vision, limits, reference)
        height, width = pixels.shape[:2]
        layout = lay_out(width, height, vision, media.detail)
        return DecodedImage(
            np.require(pixels, requirements=("C", "W")),  # what torch takes as it is
            layout,
            _patch_mask(layout, vision),
            footprint(width, height, vision, media.detail),
        )


def footprint(width: int, height: int, vision: VisionConfig, detail: Detail = "auto") -> ImageFootprint:
    """Crops and tokens of a picture of this size (spec 4.3); raises MediaError where its shape is too extreme."""
    layout = lay_out(width, height, vision, detail)
    rows, columns = -(-layout.valid_rows // 2), -(-layout.valid_columns // 2)
    side = vision.patches // 2
    return ImageFootprint(
        width=width,
        height=height,
        crop_rows=layout.crop_rows,
        crop_columns=layout.crop_columns,
        tokens=rows * (columns + 1) + 1 + side * (side + 1),
    )


def lay_out(width: int, height: int, vision: VisionConfig, detail: Detail = "auto") -> Layout:
    """Choose the grid of crops and the size inside it, in doubles as the official processor does (spec 4.3).

    Raises MediaError for a detail that there is not, and for a picture that would be less than ten pixels wide or high.
    """
    most = most_crops(detail, vision)
    columns, rows = _grid(width, height, vision.crop_size, most)
    full_width, full_height = columns * vision.crop_size, rows * vision.crop_size
    scale_x, scale_y = full_width / width, full_height / height
    if scale_x < scale_y:
        new_width, new_height = full_width, int(height * scale_x)
    else:
        new_width, new_height = int(width * scale_y), full_height
    if min(new_width, new_height) < SMALLEST_SIDE:
        advice = "crop it or add a border" + (", or raise its detail" if most < vision.max_crops else "")
        raise MediaError(f"a picture of {width} x {height} is too narrow to be seen; {advice}")
    return Layout(
        crop_rows=rows,
        crop_columns=columns,
        height=new_height,
        width=new_width,
        valid_rows=rows * vision.patches - (full_height - new_height) // vision.patch_size,
        valid_columns=columns * vision.patches - (full_width - new_width) // vision.patch_size,
    )


def most_crops(detail: Detail, vision: VisionConfig) -> int:
    """The most crops besides the global view; raises MediaError for a detail that there is not.

    Low is one crop: the smallest form that the official processor makes, so the model has learned from it.
    """
    if detail in ("auto", "high"):
        return vision.max_crops
    if detail == "low":
        return 1
    if type(detail) is int and 1 <= detail <= vision.max_crops:
        return detail
    raise MediaError(f"{detail!r} is no detail; use low, auto, high, or a maximum of 1 to {vision.max_crops} crops")


def _grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """Columns and rows of crops: enough for every pixel, or else the allowed grid of the closest aspect ratio."""
    columns, rows = math.ceil(width / size), math.ceil(height / size)
    if columns * rows <= most:
        return columns, rows
    sides = range(1, most + 1)
    grids = [(i, j) for i in sides for j in sides if i * j <= most]
    aspect, best, closest = width / height, (1, 1), math.inf
    for i, j in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(aspect - i / j)
        fills = width * height > 0.5 * size**2 * i * j
        if distance < closest or (distance == closest and fills):
            best, closest = (i, j), distance
    return best


def preprocess(pixels: Pixels, vision: VisionConfig, detail: Detail = "auto") -> ImageInput:
    """Resize, pad with white, normalise and cut (spec 4.3, steps 6 to 9).

    Takes uint8 [height, width, 3]; gives crops float32 [1 + rows * columns, 3, crop_size, crop_size] in [-1, 1] (the
    global view may reach a little beyond), the global view first. Raises MediaError as `lay_out` does.
    """
    height, width = pixels.shape[:2]
    layout = lay_out(width, height, vision, detail)
    padded = _resize_and_pad(pixels, layout, vision.crop_size)
    size, rows, columns = vision.crop_size, layout.crop_rows, layout.crop_columns
    table = normalised_values()
    crops = np.empty((1 + rows * columns, 3, size, size), np.float32)
    crops[0] = bicubic(padded, table, size).transpose(2, 0, 1)
    tiles = padded.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
    for row in range(rows):  # one row of crops at a time: `table[tiles]` at once would double the memory
        crops[1 + row * columns : 1 + (row + 1) * columns] = table[tiles[row]]
    return ImageInput(crops, _patch_mask(layout, vision), footprint(width, height, vision, detail))


def _resize_and_pad(pixels: Pixels, layout: Layout, size: int) -> Pixels:
    from PIL import Image

    # Pillow rounds between its two passes, and since version 13 chooses which comes first: here it is always the rows'.
    narrow = Image.fromarray(pixels).resize((layout.width, pixels.shape[0]), Image.Resampling.BILINEAR)
    resized = narrow.resize((layout.width, layout.height), Image.Resampling.BILINEAR)
    padded = np.full((layout.crop_rows * size, layout.crop_columns * size, 3), WHITE, np.uint8)
    padded[: layout.height, : layout.width] = np.asarray(resized)
    return padded


def normalised_values() -> Float32:
    """What each of the 256 values of a channel becomes: (x / 255 - 0.5) / 0.5."""
    return (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def _patch_mask(layout: Layout, vision: VisionConfig) -> NDArray[np.bool_]:
    """Which patches of each crop hold picture: [crops, patches, patches], the global view's all True."""
    rows, columns, patches = layout.crop_rows, layout.crop_columns, vision.patches
    grid = np.zeros((rows * patches, columns * patches), np.bool_)
    grid[: layout.valid_rows, : layout.valid_columns] = True
    tiles = grid.reshape(rows, patches, columns, patches).transpose(0, 2, 1, 3).reshape(-1, patches, patches)
    return np.concatenate([np.ones((1, patches, patches), np.bool_), tiles])


def bicubic(pixels: Pixels, table: Float32, size: int) -> Float32:
    """Shrink or stretch `table[pixels]` to float32 [size, size, channels] as PyTorch's bicubic interpolation does.

    No antialiasing, corners not aligned, no clamping; only the rows that count are looked up.
    """
    rows, row_weights = cubic_taps(pixels.shape[0], size)
    columns, column_weights = cubic_taps(pixels.shape[1], size)
    partial = sum(w[:, None, None] * table[pixels[r]] for r, w in zip(rows, row_weights, strict=True))
    assert isinstance(partial, np.ndarray)
    result = sum(w[None, :, None] * partial[:, c] for c, w in zip(columns, column_weights, strict=True))
    assert isinstance(result, np.ndarray)
    return result


def cubic_taps(length: int, size: int) -> tuple[NDArray[np.int64], Float32]:
    """Positions and weights of the four samples that make each of `size` outputs: two arrays [4, size]."""
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(0.5)
    base = np.floor(centre)
    distance = np.abs(centre - base - np.arange(-1, 3, dtype=np.float32)[:, None])
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
    positions = base.astype(np.int64) + np.arange(-1, 3)[:, None]
    return positions.clip(0, length - 1), np.where(distance <= 1, near, far)


def position_buckets(count: int, patches: int) -> NDArray[np.int64]:
    """Row (or column) of the position table for each of `count` valid patches, stretched over `patches` (spec 4.1).

    floor(patches * j / count), except where float32 rounding puts the official code one below: it buckets a float32
    linspace, whose second half counts back from the end.
    """
    last = np.float32(1 - 1 / count)
    step = np.float64(last / np.float32(max(count - 1, 1)))
    j = np.arange(count)
    fractions = np.where(j < count // 2, step * j, last - step * (count - 1 - j)).astype(np.float32)
    boundaries = (np.arange(1, patches) / patches).astype(np.float32)
    return np.searchsorted(boundaries, fractions, side="right")


@contextmanager
def _reading(media: Media) -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged file into one MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as wrong:  # a parser of untrusted bytes: Pillow's plugins raise nearly anything
        reason = str(wrong) or type(wrong).__name__
        raise MediaError(f"cannot be read as a picture, it is damaged or cut short ({reason})") from None


def _open(media: Media, limits: MediaLimits) -> "Image.Image":
    """Read the header; nothing is decoded, and a picture beyond the limit is refused."""
    from PIL import Image

    _quieten_pillow()
    assert isinstance(media.content, bytes)
    kind, format = sniff(media.content)
    if kind != "image":
        raise MediaError("is a sound, not a picture")
    try:
        picture = Image.open(io.BytesIO(media.content), formats=[format])
    except Image.DecompressionBombError:
        most = min(limits.pixels, 2 * (Image.MAX_IMAGE_PIXELS or limits.pixels))  # Pillow's own limit, and ours.
        raise MediaError(f"has more than {most} pixels; send a smaller picture") from None
    if picture.width * picture.height > limits.pixels:
        size = f"{picture.width} x {picture.height}"
        raise MediaError(f"is {size}, more than {limits.pixels} pixels; send a smaller picture")
    return picture


def _quieten_pillow() -> None:
    """Keep Pillow off stderr: its warnings of odd metadata are no matter here, and of big pictures there is a limit.

    Its log stays open to a program that configures logging.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    log = logging.getLogger("PIL")
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def _orientation(picture: "Image.Image") -> int:
    """The EXIF orientation in the header, 1 where there is none; Pillow applies a TIFF's own by itself."""
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(picture.info.get("exif", b""))
        return int(exif.get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata says nothing about how the picture stands
        return 1


def _upright_size(picture: "Image.Image", reference: bool) -> tuple[int, int]:
    turned = not reference and 5 <= _orientation(picture) <= 8
    return (picture.height, picture.width) if turned else picture.size


def _decode(media: Media, vision: VisionConfig, limits: MediaLimits, reference: bool) -> Pixels:
    if isinstance(media.content, np.ndarray):
        return media.content
    with _reading(media):
        picture = _open(media, limits)
        # Refuse a too narrow picture before decoding it.
        lay_out(*_upright_size(picture, reference), vision, media.detail)
        if reference:
            return np.asarray(picture.convert("RGB"))
        orientation = _orientation(picture)
        picture.load()
        return np.asarray(_turn(_on_white(picture), orientation))


def _on_white(picture: "Image.Image") -> "Image.Image":
    """As RGB, with white behind transparent parts."""
    from PIL import Image

    if picture.mode.startswith("I;16"):
        return _narrowed(picture)
    if picture.mode in ("I", "F"):
        raise MediaError("has pixels of 32 bits or with a sign, whose white is unknown; save it with 8 or 16 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    colours = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _narrowed(picture: "Image.Image") -> "Image.Image":
    """Grey of up to 16 bits in 8, on white; in a TIFF there may be fewer bits, and zero may be white."""
    from PIL import Image

    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    bits = tags.get(BITS_TAG, (16,))[0]
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(MEANING_TAG) == 0:
        grey = WHITE - grey
    grey[values == picture.info.get("transparency", -1)] = WHITE
    return Image.fromarray(grey).convert("RGB")


def _turn(picture: "Image.Image", orientation: int) -> "Image.Image":
    from PIL import Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture
