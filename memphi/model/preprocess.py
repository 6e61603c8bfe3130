"""Crops of decoded pixels and log-mel frames of samples, made on the device as `inputs` defines them on the host.

Crops are the same to the last bit (spec 4.3): resizing is Pillow's own fixed-point arithmetic, a sum of a few pixels'
multiples along rows, then along columns; the global view is the host's sums in its order. Frames (spec 5.1) differ by
what rounding in fp32 does: their spectrum is a product in fp64 with the Fourier transform's matrix, so that no library
is loaded for it. What is worked on at once is bounded, whatever a picture's or a clip's size. Nothing waits for the
device.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memphi.inputs.audio import FULL_SCALE, PRE_EMPHASIS, fft_size, hamming, mel_matrix, window_and_hop
from memphi.inputs.image import WHITE, cubic_taps, normalised_values
from memphi.memory.costs import BAND_FRAMES, BAND_VALUES
from memphi.model.upload import upload
from memphi.request import DecodedClip, DecodedImage

PRECISION_BITS = 22
"""After the point, of Pillow's weights."""


@dataclass(frozen=True)
class Taps:
    """Which inputs make each output of a resized line, and how much of each."""

    places: NDArray[np.int64]  # [taps, outputs]
    weights: NDArray[np.int32]  # [taps, outputs], in units of 2 ** -PRECISION_BITS

    def of(self, first: int, end: int) -> "Taps":
        """Those of some outputs."""
        return Taps(self.places[:, first:end], self.weights[:, first:end])


def make_crops(image: DecodedImage, first: int, out: Tensor) -> None:
    """Fill `out` [units, 3, crop_size, crop_size], of any float dtype, with a picture's crops from `first` on.

    Crop 0 is the global view.
    """
    size, columns = out.shape[-1], image.layout.crop_columns
    padded = resize_and_pad(image, size, out.device)
    table = upload(normalised_values(), out.device)
    for crop, place in zip(out, range(first - 1, first - 1 + len(out)), strict=True):
        if place < 0:
            crop.copy_(_bicubic(padded, table, size).permute(2, 0, 1))
            continue
        top, left = place // columns * size, place % columns * size
        crop.copy_(_look_up(table, padded[top : top + size, left : left + size]).permute(2, 0, 1))


def resize_and_pad(image: DecodedImage, size: int, device: torch.device) -> Tensor:
    """A picture on its white grid of crops of that size: uint8 [crop_rows * size, crop_columns * size, 3]."""
    layout, pixels = image.layout, image.pixels
    padded = torch.full(
        (layout.crop_rows * size, layout.crop_columns * size, 3), WHITE, dtype=torch.uint8, device=device
    )
    across, down = linear_taps(pixels.shape[1], layout.width), linear_taps(pixels.shape[0], layout.height)
    # Beside each output row lie as many inputs as it takes steps of.
    step = _lines(layout.width * max(-(-pixels.shape[0] // layout.height), 1))
    for first, end in _bands(0, layout.height, step):
        band = down.of(first, end)
        top, bottom = int(band.places.min()), int(band.places.max()) + 1
        most = _lines(max(pixels.shape[1], layout.width))
        narrow = torch.cat([_weigh(upload(pixels[rows], device), across, 1) for rows in _slices(top, bottom, most)])
        padded[first:end, : layout.width] = _weigh(narrow, Taps(band.places - top, band.weights), 0)
    return padded


def linear_taps(length: int, size: int) -> Taps:
    """Pillow's antialiased bilinear filter from `length` pixels to `size`: triangles as wide as a step, at least 1."""
    scale = length / size
    reach = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + reach + 0.5).astype(np.int64), length)
    steps = np.arange((end - first).max())[:, None]
    places = first + steps
    shares = np.maximum(1.0 - np.abs((places - centre + 0.5) * (1.0 / reach)), 0.0)
    shares[places >= end] = 0.0
    shares /= np.cumsum(shares, axis=0)[-1]  # summed one after the other, as Pillow does
    weights = (0.5 + shares * (1 << PRECISION_BITS)).astype(np.int32)
    return Taps(np.minimum(places, length - 1), weights)


def _weigh(pixels: Tensor, taps: Taps, dim: int) -> Tensor:
    """Sum taps along one dimension of uint8 [rows, columns, 3], rounded to uint8."""
    places, weights = upload(taps.places, pixels.device), upload(taps.weights, pixels.device)
    shape = [-1 if d == dim else 1 for d in range(3)]
    total: Tensor = pixels.index_select(dim, places[0]) * weights[0].view(shape)
    for place, weight in zip(places[1:], weights[1:], strict=True):
        total += pixels.index_select(dim, place) * weight.view(shape)
    total += 1 << (PRECISION_BITS - 1)
    total >>= PRECISION_BITS
    return total.clamp_(max=WHITE).to(torch.uint8)


def _bicubic(pixels: Tensor, table: Tensor, size: int) -> Tensor:
    """`inputs.image.bicubic`, column by column of its sixteen samples: float32 [size, size, 3]."""
    (rows, row_weights), (columns, column_weights) = (
        tuple(upload(part, pixels.device) for part in cubic_taps(length, size)) for length in pixels.shape[:2]
    )
    row_weights = row_weights[:, :, None, None]
    parts = []
    for column, weight in zip(columns, column_weights, strict=True):
        samples = _look_up(table, pixels[rows.flatten()[:, None], column]).unflatten(0, (4, size))
        one, two, three, four = samples.mul_(row_weights)
        parts.append((one + two + three + four) * weight[:, None])
    one, two, three, four = parts
    result: Tensor = one + two + three + four
    return result


def make_frames(clip: DecodedClip, first: int, end: int, bins: int, device: torch.device) -> Tensor:
    """A clip's log-mel frames from `first` to before `end`: fp32 [frames, bins]."""
    window, hop = window_and_hop(clip.rate)
    samples = upload(clip.samples[first * hop : (end - 1) * hop + window], device)
    basis = _fourier(clip.rate, device)
    mel = upload(mel_matrix(bins)[:, : fft_size(clip.rate)[1]].T, device).double()
    framed = samples.unfold(0, window, hop)
    return torch.cat([_log_mel(frames, basis, mel) for frames in framed.split(BAND_FRAMES)])


def _log_mel(frames: Tensor, basis: Tensor, mel: Tensor) -> Tensor:
    """Features [frames, bins] of frames [frames, window]."""
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    emphasised = (frames - PRE_EMPHASIS * before) * FULL_SCALE
    real, imaginary = (emphasised.double() @ basis).float().chunk(2, dim=1)
    power = torch.hypot(real, imaginary).square()
    return (power.double() @ mel).float().clamp_(min=1).log_()


def _fourier(rate: int, device: torch.device) -> Tensor:
    """What makes the bins that count of a frame's samples, the Hamming window in it: fp64 [window, 2 * bins]."""
    (window, _), (size, kept) = window_and_hop(rate), fft_size(rate)
    samples, bins = torch.arange(window, device=device), torch.arange(kept, device=device)
    angles = (samples[:, None] * bins % size).double() * (2 * math.pi / size)
    return torch.cat([angles.cos(), -angles.sin()], dim=1) * upload(hamming(window), device)[:, None]


def _look_up(table: Tensor, pixels: Tensor) -> Tensor:
    return table.index_select(0, pixels.flatten().int()).view(pixels.shape)


def _lines(values: int) -> int:
    """How many lines of a picture's row are a band: values [3] each."""
    return max(BAND_VALUES // (3 * values), 1)


def _bands(first: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, end)) for start in range(first, end, step))


def _slices(first: int, end: int, step: int) -> Iterator[slice]:
    return (slice(*band) for band in _bands(first, end, step))
