"""The audio encoder: log-mel frames of clips in, one feature per 80 ms out (spec 5.2).

A clip is cut into windows that do not see each other, but for eight frames at their borders. A window's features never
depend on the windows beside it: those of different lengths are masked where they are batched.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.config import AudioConfig
from memphi.memory.costs import BIAS_STEP, CONVOLVED_VALUES, LEAST_CONVOLVED_VALUES
from memphi.model.attention import Attention
from memphi.model.upload import upload

WINDOW_BATCH = 8
"""Conformer windows encoded at once."""


@dataclass(frozen=True)
class Window:
    """A stretch of a clip that is encoded alone; `make_window` makes it."""

    frames: Tensor  # [frames, mel_bins] fp32, on any device
    skip: int
    """Tokens of the frames before the window's first: 1 where there is sound before it, else 0."""
    tokens: int
    rows: int
    """What goes through the conformer: the tokens, and zeros after them at the end of a long clip."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Windows of one shape can be subsampled as one."""
        return (self.frames.shape[0], self.skip, self.tokens, self.rows)


def count_windows(frames: int, config: AudioConfig) -> int:
    """How many windows a clip of so many frames has."""
    return -(-frames // (8 * config.window_tokens))


def cut_window(clip: Tensor, index: int, config: AudioConfig) -> Window:
    """One window of a clip [frames, mel_bins]."""
    return make_window(clip.shape[0], index, config, lambda first, end: clip[first:end])


def make_window(frames: int, index: int, config: AudioConfig, read: Callable[[int, int], Tensor]) -> Window:
    """One window of a clip of so many frames, with eight more on either side, which the strides reach into.

    read gives the frames from a first one to before an end: [frames, mel_bins].
    """
    size, total = config.window_tokens, -(-frames // 8)
    first, end = index * size, min((index + 1) * size, total)
    tokens = end - first
    return Window(
        frames=read(max(8 * first - 8, 0), min(8 * end + 8, frames)),
        skip=min(first, 1),
        tokens=tokens,
        rows=tokens if total <= size or config.mask_tail else size,
    )


class Subsampling(nn.Module):
    """Three strided convolutions over time and mel bins, and a linear: 8 frames become one token."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        channels = config.conv_channels
        self.first = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels) for _ in range(2)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.out = nn.Linear(channels * -(-config.mel_bins // 8), config.hidden_size)

    def forward(self, frames: Tensor, chunk_tokens: int) -> Tensor:
        """Subsample clips of one length in chunks of time, which give exactly what the whole would give.

        frames [clips, frames, mel_bins], normalised. Returns [clips, ceil(frames / 8), hidden].
        """
        tokens = -(-frames.shape[1] // 8)
        firsts = range(0, tokens, chunk_tokens)
        return torch.cat([self._chunk(frames, first, min(first + chunk_tokens, tokens)) for first in firsts], dim=1)

    def _chunk(self, frames: Tensor, first: int, end: int) -> Tensor:
        """Tokens first..end from their frames and eight more on either side, which the three strides reach into."""
        start = max(8 * first - 8, 0)
        x = F.relu(self.first(frames[:, None, start : 8 * end + 8]))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = F.relu(pointwise(depthwise(x)))
        skip = first - start // 8
        return cast(Tensor, self.out(x[:, :, skip : skip + end - first].transpose(1, 2).flatten(2)))


class BranchNorm(nn.LayerNorm):
    """What a branch takes of the residuals' sum, which is kept in fp32, in its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class SumNorm(nn.LayerNorm):
    """A norm of the sum itself, which stays in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class FeedForward(nn.Module):
    """value * silu(gate); the gate is the second half, other than in the decoder."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.norm = BranchNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return cast(Tensor, self.down(value * F.silu(gate)))


class AudioAttention(nn.Module):
    """Full attention within a window, with a learned bias per distance."""

    def __init__(self, config: AudioConfig, attention: Attention) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.heads = config.heads
        self.attention = attention

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )  # [windows, heads, tokens, head_dim]
        return cast(Tensor, self.out(self.attention.full(query, key, value, bias).transpose(1, 2).flatten(2)))


class Convolution(nn.Module):
    """Gated pointwise convolution, then a causal depthwise one."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = BranchNorm(size)
        self.glu = nn.Conv1d(size, 2 * size, 1)
        self.value_bias = nn.Parameter(torch.empty(1, size, 1))
        self.gate_bias = nn.Parameter(torch.empty(1, size, 1))
        self.depthwise = nn.Conv1d(size, size, config.kernel_size, groups=size)
        self.pointwise = nn.Conv1d(size, size, 1)
        self.out = nn.Conv1d(size, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.glu(self.norm(x).transpose(1, 2)).chunk(2, dim=1)  # [windows, hidden, tokens]
        y = (value + self.value_bias) * F.silu(gate + self.gate_bias)
        y = self.depthwise(F.pad(y, (self.depthwise.kernel_size[0] - 1, 0)))
        return cast(Tensor, self.out(F.silu(self.pointwise(y))).transpose(1, 2))


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution and half a feed-forward, each of which the encoder adds to what it is
    given, and a norm over the sum.

    The encoder does, so that nobody holds what the layer began with while it computes.
    """

    def __init__(self, config: AudioConfig, attention: Attention) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(config)
        self.attention_norm = BranchNorm(config.hidden_size)
        self.attention = AudioAttention(config, attention)
        self.convolution = Convolution(config)
        self.feed_forward_out = FeedForward(config)
        self.norm = SumNorm(config.hidden_size)

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        return cast(Tensor, self.attention(self.attention_norm(x), bias))


class AudioEncoder(nn.Module):
    """Normalisation, subsampling and conformer."""

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, config: AudioConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.mel_bins))
        self.register_buffer("inverse_deviation", torch.ones(config.mel_bins))
        self.subsampling = Subsampling(config)
        self.relative_bias = nn.Embedding(2 * config.bias_distance, config.heads)
        self.layers = nn.ModuleList(ConformerLayer(config, attention) for _ in range(config.layers))

    def forward(self, clips: Sequence[Tensor], window_batch: int = WINDOW_BATCH) -> list[Tensor]:
        """Encode clips of log-mel frames [frames, mel_bins] into features [ceil(frames / 8), hidden] each.

        At most window_batch windows are encoded at once.
        """
        counts = [count_windows(clip.shape[0], self.config) for clip in clips]
        windows = [cut_window(clip, i, self.config) for clip, n in zip(clips, counts, strict=True) for i in range(n)]
        batches = (windows[first : first + window_batch] for first in range(0, len(windows), window_batch))
        encoded = iter([features for batch in batches for features in self.encode_windows(batch)])
        return [next(encoded) if n == 1 else torch.cat([next(encoded) for _ in range(n)]) for n in counts]

    def encode_windows(self, windows: Sequence[Window]) -> list[Tensor]:
        """Encode windows of any clips and lengths into features [tokens, hidden] each.

        All go through the conformer as one; neighbours of one shape are subsampled as one.
        """
        encoded = [features for part in self._conform(self.subsample(windows)) for features in part]
        return [features[: window.tokens] for window, features in zip(windows, encoded, strict=True)]

    def subsample(self, windows: Sequence[Window]) -> list[Tensor]:
        """Normalise and subsample the windows of a pass: [windows, rows, hidden] of neighbours of one shape."""
        values = max(len(windows) * CONVOLVED_VALUES, LEAST_CONVOLVED_VALUES)
        most_tokens = max(values // self.config.conv_channels, 1)
        return [self._subsample(group, most_tokens) for group in _alike(windows, most_tokens)]

    def _subsample(self, windows: Sequence[Window], most_tokens: int) -> Tensor:
        """The same of windows of one shape."""
        frames = torch.stack([window.frames for window in windows]).to(self.mean)
        x = self.subsampling((frames - self.mean) * self.inverse_deviation, most_tokens)
        one = windows[0]
        return F.pad(x[:, one.skip : one.skip + one.tokens], (0, 0, 0, one.rows - one.tokens))

    def _conform(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Run windows of different lengths through the conformer: pieces [windows, rows, hidden] in and out.

        Sums are kept in fp32: rounded to bf16 in each of 24 layers, features of noise were 1.8 % off, and so are 0.6 %.
        """
        length = max(piece.shape[1] for piece in pieces)
        x = torch.cat([F.pad(piece, (0, 0, 0, length - piece.shape[1])) for piece in pieces]).float()
        bias = self._bias([piece.shape[1] for piece in pieces for _ in range(len(piece))])
        for layer in cast(Iterable[ConformerLayer], self.layers):
            x = torch.add(x, layer.feed_forward_in(x), alpha=0.5)
            x = x + layer.attend(x, bias)
            x = x + layer.convolution(x)
            x = torch.add(x, layer.feed_forward_out(x), alpha=0.5)
            x = layer.norm(x)
        return list(x.to(pieces[0].dtype).split([len(piece) for piece in pieces]))

    def _bias(self, lengths: Sequence[int]) -> Tensor:
        """The bias of every query and key by their distance, for all layers: [1 or windows, heads, longest, longest].

        One for all windows where they are alike; else one for each, without the keys beyond its end.
        """
        reach, longest, device = self.config.bias_distance, max(lengths), self.relative_bias.weight.device
        steps = torch.arange(-(-longest // BIAS_STEP) * BIAS_STEP, device=device)
        distance = (steps[None, :] - steps[:longest, None]).clamp(-reach, reach - 1) + reach
        bias = cast(Tensor, self.relative_bias(distance)).permute(2, 0, 1)[None].contiguous()
        if min(lengths) < longest:
            ends = upload(np.array(lengths), device)
            bias = bias.masked_fill(steps >= ends[:, None, None, None], float("-inf"))
        return bias[..., :longest]


def _alike(windows: Sequence[Window], most_tokens: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one shape together, as many as have so many tokens, or one."""
    for shape, group in groupby(windows, key=lambda window: window.shape):
        alike, most = list(group), max(most_tokens // -(-shape[0] // 8), 1)
        yield from (alike[first : first + most] for first in range(0, len(alike), most))
