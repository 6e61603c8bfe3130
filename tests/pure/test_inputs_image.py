"""Pictures cost what the official processor says, and what is measured is what is prepared."""

import io
import json
import struct
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memphi.errors import MediaError, MemphiError, RequestError
from memphi.inputs.image import (
    footprint,
    lay_out,
    measure_image,
    most_crops,
    position_buckets,
    prepare_image,
    preprocess,
)
from memphi.inputs.media import MediaLimits, image_media, open_media
from tests.pure.inputs_samples import DATA, PICTURE_FORMATS, config, gradient, picture, png_header, small_config

VISION = config().vision
SMALL = small_config().vision
DETAILS = ["low", "auto", "high", *range(1, SMALL.max_crops + 1)]
EXAMPLES = json.loads((DATA / "token_count_examples.json").read_text())["images"]
BUCKETS = json.loads((DATA / "navit_position_buckets.json").read_text())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e['width']}x{e['height']}")
def test_official_counts(example):
    media = open_media(png_header(example["width"], example["height"]))
    found = measure_image(media, VISION, MediaLimits(pixels=8448 * 8448))
    assert (found.crop_columns, found.crop_rows) == (example["grid_w"], example["grid_h"])
    assert (found.crops, found.tokens) == (example["crops_incl_global"], example["num_img_tokens"])
    layout = lay_out(example["width"], example["height"], VISION)
    assert [layout.width, layout.height] == example["resized_wh"]
    assert [layout.valid_columns, layout.valid_rows] == example["valid_patches_wh"]


@pytest.mark.parametrize("count", range(1, 33))
def test_position_buckets_are_the_official_ones(count):
    assert position_buckets(count, 32).tolist() == BUCKETS[str(count)]


def test_a_picture_that_fills_its_grid_is_only_cut():
    pixels = gradient(112, 56)
    prepared = preprocess(pixels, SMALL)
    normal = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    assert prepared.crops.shape == (3, 3, 56, 56)
    assert prepared.patch_mask.all()
    np.testing.assert_allclose(prepared.crops[1], normal[:, :56].transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(prepared.crops[2], normal[:, 56:].transpose(2, 0, 1), atol=1e-6)


def test_padding_is_white_and_masked():
    prepared = preprocess(np.zeros((56, 57, 3), np.uint8), SMALL)
    assert (prepared.crops[1] == -1).all()
    assert (prepared.crops[2][:, :, 1:] == 1).all()
    assert prepared.patch_mask[2].sum() == 4  # one column of four patches
    assert prepared.patch_mask[2][:, 0].all()


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    format=st.sampled_from(PICTURE_FORMATS),
    orientation=st.none() | st.integers(0, 9),
    reference=st.booleans(),
    detail=st.sampled_from(DETAILS),
)
@settings(max_examples=120, deadline=None)
def test_measured_is_prepared(width, height, format, orientation, reference, detail):
    takes_exif = format not in ("GIF", "BMP")
    media = replace(open_media(picture(width, height, format, orientation if takes_exif else None)), detail=detail)
    try:
        measured = measure_image(media, SMALL, reference=reference)
    except MediaError:
        with pytest.raises(MediaError):
            prepare_image(media, SMALL, reference=reference)
        return
    prepared = prepare_image(media, SMALL, reference=reference)
    assert prepared.footprint == measured
    assert prepared.crops.shape == (measured.crops, 3, 56, 56)
    assert measured.crops <= 1 + most_crops(detail, SMALL)
    rows, columns = measured.crop_rows, measured.crop_columns
    grid = prepared.patch_mask[1:].reshape(rows, columns, 4, 4).transpose(0, 2, 1, 3).reshape(rows * 4, columns * 4)
    pooled = grid[::2, ::2]
    assert measured.tokens == pooled.sum() + pooled[:, 0].sum() + 1 + 2 * 3
    assert np.array_equal(grid, np.outer(grid[:, 0], grid[0]))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format, orientation):
    """A picture turned away and marked with the turn that brings it back is the picture itself."""
    upright = Image.fromarray(np.kron(gradient(6, 4) // 64 * 64, np.ones((16, 16, 1), np.uint8)))
    away = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored = upright if away is None else upright.transpose(Image.Transpose(away))
    stored.save(file, format, exif=exif, **({} if format == "TIFF" else {"quality": 100, "lossless": True}))
    found = prepare_image(open_media(file.getvalue()), SMALL)
    expected = preprocess(np.asarray(upright), SMALL)
    assert found.footprint == expected.footprint
    assert np.abs(found.crops - expected.crops).mean() < 0.03
    if format == "PNG":
        as_stored = prepare_image(open_media(file.getvalue()), SMALL, reference=True)
        assert np.array_equal(as_stored.crops, preprocess(np.asarray(stored), SMALL).crops)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    image = Image.new("RGBA", (56, 56), (255, 0, 0, 0)).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG", **({"transparency": image.getpixel((0, 0))} if mode == "P" else {}))
    media = open_media(file.getvalue())
    assert (prepare_image(media, SMALL).crops == 1).all()
    assert not (prepare_image(media, SMALL, reference=True).crops == 1).all()


def test_transparent_grey_of_sixteen_bits_is_white():
    file = io.BytesIO()
    Image.fromarray(np.full((56, 56), 0x1234, np.uint16)).save(file, "PNG", transparency=0x1234)
    assert (prepare_image(open_media(file.getvalue()), SMALL).crops == 1).all()


def test_white_of_a_tiff_is_what_its_header_says():
    """Of 12 bits, and where zero is white."""
    white = {"bits": (np.full((56, 56), 0x0FFF, np.uint16), 12, 1), "zero": (np.zeros((56, 56), np.uint16), 16, 0)}
    for values, bits, meaning in white.values():
        digits = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(digits).tobytes() if bits < 16 else values.tobytes()
        tags = {256: 56, 257: 56, 258: bits, 259: 1, 262: meaning, 273: 8, 277: 1, 278: 56, 279: len(packed)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        folder = struct.pack("<H", len(tags)) + entries + bytes(4)
        content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + folder
        assert (prepare_image(open_media(content), SMALL).crops == 1).all()


def test_sixteen_bit_grey_is_scaled():
    file = io.BytesIO()
    Image.fromarray(np.full((56, 56), 0x8000, np.uint16)).save(file, "PNG")
    media = open_media(file.getvalue())
    assert np.abs(prepare_image(media, SMALL).crops[1]).max() < 0.01
    assert (prepare_image(media, SMALL, reference=True).crops[1] == 1).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(format):
    file = io.BytesIO()
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("white", "black")]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    media = open_media(file.getvalue())
    assert (prepare_image(media, SMALL).crops[1] > 0.98).all()


def test_pixels_need_no_file():
    media = image_media(gradient(100, 50))
    assert prepare_image(media, SMALL).footprint == measure_image(media, SMALL)


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), most=st.integers(1, 36))
def test_a_number_bounds_the_crops_and_changes_nothing_where_they_are_fewer(width, height, most):
    with suppress(MediaError):
        found = footprint(width, height, VISION, most)
        assert found.crops <= 1 + most
        if -(-width // 448) * -(-height // 448) <= most:
            assert found == footprint(width, height, VISION)


@pytest.mark.parametrize(
    ("width", "height", "detail", "crops", "tokens"),
    [
        (2480, 3508, "low", 2, 481),
        (2480, 3508, 1, 2, 481),
        (2480, 3508, 4, 3, 664),
        (4000, 3000, 12, 13, 3393),
        (4000, 3000, 11, 7, 1681),
        (2480, 3508, 36, 36, 9345),
        (2480, 3508, "high", 36, 9345),
    ],
)
def test_a_detail_chooses_the_closest_shape_within_its_crops(width, height, detail, crops, tokens):
    found = footprint(width, height, VISION, detail)
    assert (found.crops, found.tokens) == (crops, tokens)


@given(width=st.integers(1, 30_000), height=st.integers(1, 30_000))
def test_low_costs_no_more_than_the_smallest_picture(width, height):
    with suppress(MediaError):
        found = footprint(width, height, VISION, "low")
        assert found.crops == 2
        assert found.tokens <= footprint(448, 448, VISION).tokens == 545


def test_low_is_what_a_picture_of_one_crop_is():
    small = Image.fromarray(gradient(600, 336)).resize((56, 31), Image.Resampling.BILINEAR)
    low = preprocess(gradient(600, 336), SMALL, "low")
    auto = preprocess(np.asarray(small), SMALL)
    assert np.array_equal(low.crops, auto.crops)
    assert np.array_equal(low.patch_mask, auto.patch_mask)


@pytest.mark.parametrize("detail", [0, -1, 37, 10**30, True, 2.0, "", "medium", "12", None])
def test_a_detail_that_there_is_not_is_refused(detail):
    media = replace(open_media(picture(20, 10), "a.png"), detail=detail)
    for use in (measure_image, prepare_image):
        with pytest.raises(RequestError, match=r"^a\.png: .* is no detail; use low, .* 1 to 36 crops"):
            use(media, VISION)


def test_a_picture_too_long_for_its_detail_is_told_so():
    for detail in ("low", 2):
        with pytest.raises(MediaError, match="or raise its detail"):
            footprint(5000, 50, VISION, detail)
    assert footprint(5000, 50, VISION).crops == 13


def test_extreme_shapes_are_refused():
    for width, height in ((20000, 4), (4, 20000), (1, 2**31 - 1)):
        with pytest.raises(MediaError, match="too narrow"):
            footprint(width, height, VISION)
    with pytest.raises(MediaError, match=r"long\.png: a picture of 20000 x 4"):
        measure_image(open_media(png_header(20000, 4), "long.png"), VISION)


def test_a_bomb_is_not_decoded():
    for side in (10_001, 60_000):
        media = open_media(png_header(side, side), "bomb.png")
        started = time.process_time()
        for use in (measure_image, prepare_image):
            with pytest.raises(MediaError, match=r"bomb\.png.* more than 100000000 pixels"):
                use(media, VISION)
        assert time.process_time() - started < 1


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_half_a_picture_is_an_error(format):
    whole = picture(200, 200, format)
    media = open_media(whole[: len(whole) // 2], f"half.{format}")
    with pytest.raises(MediaError, match=f"half.{format}: .*damaged or cut short"):
        prepare_image(media, SMALL)


@pytest.mark.parametrize("format", PICTURE_FORMATS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_damage_raises_only_our_errors(format, data):
    content = bytearray(picture(40, 30, format, orientation=None if format in ("GIF", "BMP") else 6))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 300)))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(1, len(content)))]
    with suppress(MemphiError):
        media = open_media(bytes(content))
        measured = measure_image(media, SMALL, MediaLimits(pixels=10**6))
        assert prepare_image(media, SMALL, MediaLimits(pixels=10**6)).footprint == measured


def test_nothing_is_printed(capfd, recwarn):
    exif = picture(40, 30, "JPEG", orientation=6)
    for content in (exif[:30] + b"\xff" * 8 + exif[38:], picture(40, 30, "TIFF")[:-40], png_header(9_500, 9_500)):
        with suppress(MediaError):
            prepare_image(open_media(content), SMALL)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
