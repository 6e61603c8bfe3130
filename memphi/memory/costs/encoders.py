"""A pass of the vision tower or of the audio encoder, and making their inputs on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from memphi.config import AudioConfig, ModelConfig
from memphi.memory.costs.cost import MIB, Cost, size_text
from memphi.memory.costs.products import with_block

CONVOLVED_VALUES, LEAST_CONVOLVED_VALUES = 32 * 1024, 96 * 1024
"""Tokens of sound times channels that are subsampled at once, for each window of a pass, and at least. The least is 8 s
at full size, and 30 MiB for the first convolution's output."""
BAND_VALUES = 4 * MIB
"""Numbers of a picture that the device resizes at once, about eleven bytes each."""
BIAS_STEP = 16
"""Numbers of which a conformer bias' rows begin at multiples: kernels would copy another bias in every layer."""
BAND_FRAMES = 1000
"""Log-mel frames that the device makes at once."""
SAMPLES_A_FRAME, WINDOW_SAMPLES, SPECTRUM = 160, 400, 257
"""Of sound at 16 kHz: a frame's step, its length, and the bins of its spectrum (spec 5.1)."""


def vision_pass(config: ModelConfig, crops: int, dtype_bytes: int) -> Cost:
    """Encode crops: attention holds the most, or the MLP where it is wide beside the tower."""
    vision, hidden = config.vision, config.language.hidden_size
    size, patches = vision.hidden_size, vision.patches**2
    projector = 2 * size + (3 * hidden + 2 * size) // 4 + 1
    numbers = max(7 * size, 2 * size + vision.intermediate_size, projector)
    pixels = 3 * vision.crop_size**2
    first = (pixels + 3 * patches * size) * dtype_bytes
    each = max(patches * numbers * dtype_bytes, first) + pixels * dtype_bytes + patches * 10
    cost = Cost(
        "vision pass",
        crops * each,
        f"{crops} crops x ({patches} patches x {numbers} numbers of {dtype_bytes} bytes, and the crop itself)",
    )
    return with_block(cost, cost.bytes, config, config.other_scheme, dtype_bytes)


def cropping(config: ModelConfig, crops: int, dtype_bytes: int) -> Cost:
    """Make crops of decoded pixels on the device, before they are encoded: one picture at a time, and in bands."""
    vision = config.vision
    crop = 3 * vision.crop_size**2
    # A band: its pixels, those of one tap, that times its weight and the sum so far in int32, and the last band's.
    # The global view: of four samples each, bytes, int32 and fp32; and what four such gave before.
    at_once = max(11 * BAND_VALUES, 52 * crop) + MIB  # and the weights of a line
    return Cost(
        "cropping",
        crops * crop * dtype_bytes + vision.max_crops * crop + at_once,
        f"where crops are made on the device: {crops} crops x {crop} x {dtype_bytes} bytes, a picture of at most "
        f"{vision.max_crops} crops in bytes, and {size_text(at_once)} to resize it in bands",
    )


@dataclass(frozen=True)
class WindowSize:
    """What a window of sound is encoded as."""

    convolved: int
    """Its tokens, with those at its borders."""
    length: int
    """What it has in the conformer."""


def audio_pass(
    config: ModelConfig,
    windows: int,
    dtype_bytes: int,
    decoded: bool = False,
    sizes: Sequence[WindowSize] = (),
) -> Cost:
    """Encode windows of sound: either the first convolution's output twice, or a conformer layer.

    decoded: their log-mel frames are made on the device first, and are there as long as it takes. sizes are the
    windows' in their order; each is as large as it may be where they are not given.
    """
    audio, hidden = config.audio, config.language.hidden_size
    sizes = sizes or [WindowSize(audio.window_tokens + 2, audio.window_tokens)] * windows
    length, (together, tokens) = max(size.length for size in sizes), _convolved_at_once(audio, sizes)
    height, width = 4 * (tokens + 2), -(-audio.mel_bins // 2)
    output = audio.conv_channels * height * width * dtype_bytes
    sound = 8 * (together + 2) * audio.mel_bins * 3 * dtype_bytes
    features = windows * length * audio.hidden_size * dtype_bytes
    projected = (windows + 2) * length * hidden * dtype_bytes
    linears = features + max(_conformer_bytes(audio, [size.length for size in sizes], dtype_bytes), projected)
    encoding = max(features + 2 * output + sound, linears)
    frames, making = _frames_bytes(audio, [size.convolved for size in sizes]) if decoded else (0, 0)
    cost = Cost(
        "audio pass",
        frames + max(encoding, making),
        f"the larger of the first convolution for {tokens} tokens, twice {audio.conv_channels} channels x {height} x "
        f"{width} x {dtype_bytes} bytes, and a conformer layer over {windows} windows of "
        f"{length} tokens with its biases" + (f"; and {size_text(frames)} of log-mel frames" if decoded else ""),
    )
    return with_block(cost, frames + linears, config, config.other_scheme, dtype_bytes)


def _convolved_at_once(audio: AudioConfig, sizes: Sequence[WindowSize]) -> tuple[int, int]:
    """The most tokens of neighbouring windows of one size that are taken together, and how many are subsampled at once:
    those, or a part of one window.
    """
    most = max(max(len(sizes) * CONVOLVED_VALUES, LEAST_CONVOLVED_VALUES) // audio.conv_channels, 1)
    alike = ((size.convolved, sum(1 for _ in group)) for size, group in groupby(sizes))
    together = max(tokens * min(count, max(most // tokens, 1)) for tokens, count in alike)
    return together, min(together, most)


def _frames_bytes(audio: AudioConfig, convolved: Sequence[int]) -> tuple[int, int]:
    """Windows' log-mel frames, and what takes the longest of them to be made: samples and spectra, in fp64 and fp32."""
    frames = 8 * max(convolved)
    each = frames * audio.mel_bins * 4
    band = min(frames, BAND_FRAMES) * (16 * WINDOW_SAMPLES + 16 * SPECTRUM)
    tables = (48 * WINDOW_SAMPLES + 16 * audio.mel_bins) * SPECTRUM
    return 8 * sum(convolved) * audio.mel_bins * 4, each + band + tables + frames * SAMPLES_A_FRAME * 4


def _conformer_bytes(audio: AudioConfig, lengths: Sequence[int], dtype_bytes: int) -> int:
    """One layer: residuals with the feed-forward's value and gate, or with query, key and value, and the biases; or
    before it the biases as they are made.
    """
    size, tokens = audio.hidden_size, max(lengths)
    layer = len(lengths) * tokens * max(2 * size + 4 * audio.intermediate_size, 8 * size) * dtype_bytes
    bias = audio.heads * tokens * (tokens + BIAS_STEP) * dtype_bytes
    # By distance one for all; for windows of different lengths one for each, with its padding masked.
    count = 1 if min(lengths) == tokens else len(lengths)
    return max(layer + count * bias, (1 + count) * bias + 16 * tokens**2)
