"""The audio encoder: log-mel frames of clips in, one feature per 80 ms out (spec 5.2).

A clip's features never depend on the clips beside it: clips are subsampled in exact chunks of time, and windows of
different lengths are masked where they are batched.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.config import AudioConfig
from memphi.model.attention import Attention

CHUNK_TOKENS = 500
"""Tokens subsampled at once: 40 s of sound, at most 0.2 GB for the first convolution's output in bf16 at full size."""
WINDOW_BATCH = 8
"""Conformer windows encoded at once."""


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

    def forward(self, frames: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
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


class FeedForward(nn.Module):
    """value * silu(gate); the gate is the second half, other than in the decoder."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
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
        self.norm = nn.LayerNorm(size)
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
    """Half a feed-forward, attention, convolution, half a feed-forward, and a norm over the sum."""

    def __init__(self, config: AudioConfig, attention: Attention) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.attention = AudioAttention(config, attention)
        self.convolution = Convolution(config)
        self.feed_forward_out = FeedForward(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + 0.5 * self.feed_forward_in(x)
        x = x + self.attention(self.attention_norm(x), bias)
        x = x + self.convolution(x)
        x = x + 0.5 * self.feed_forward_out(x)
        return cast(Tensor, self.norm(x))


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

        Neighbouring clips of one length are subsampled as one call; at most window_batch windows of any lengths go
        through the conformer as one.
        """
        groups = [torch.stack(list(group)) for _, group in groupby(clips, key=lambda clip: clip.shape[0])]
        counts = [-(-frames.shape[1] // 8) for frames in groups]
        windows = [self._windows(frames) for frames in groups]
        seen = [self._seen_rows(count) * len(frames) for frames, count in zip(groups, counts, strict=True)]
        encoded = self._encode(windows, seen, window_batch)
        return [
            clip[:count]
            for group, frames, count in zip(encoded, groups, counts, strict=True)
            for clip in group.reshape(frames.shape[0], -1, group.shape[-1])
        ]

    def _windows(self, frames: Tensor) -> Tensor:
        """Normalise and subsample clips [clips, frames, mel_bins]; long ones are cut into windows, zeros at the end.

        Returns [clips * windows, rows, hidden].
        """
        size = self.config.window_tokens
        x = self.subsampling((frames.to(self.mean.dtype) - self.mean) * self.inverse_deviation)
        if x.shape[1] <= size:
            return cast(Tensor, x)
        return F.pad(x, (0, 0, 0, -x.shape[1] % size)).reshape(-1, size, x.shape[-1])

    def _seen_rows(self, count: int) -> list[int]:
        """How many rows of each of a clip's windows are keys; zeros after a long clip are, unless told otherwise."""
        size = self.config.window_tokens
        full, rest = divmod(count, size)
        tail = [] if not rest else [rest if full == 0 or self.config.mask_tail else size]
        return [size] * full + tail

    def _encode(self, groups: Sequence[Tensor], seen: Sequence[Sequence[int]], window_batch: int) -> list[Tensor]:
        """Run the conformer over groups of windows of different lengths, padded to the longest of a batch."""
        pieces = [piece for group in groups for piece in group.split(window_batch)]
        rows = [n for group in seen for n in group]
        encoded: list[Tensor] = []
        first = 0
        for batch in _batches(pieces, window_batch):
            size = sum(len(piece) for piece in batch)
            encoded.extend(self._conform(batch, rows[first : first + size]))
            first += size
        joined = iter(encoded)
        return [torch.cat([next(joined) for _ in group.split(window_batch)]) for group in groups]

    def _conform(self, pieces: Sequence[Tensor], seen: Sequence[int]) -> list[Tensor]:
        """One batch through the conformer, padded rows masked: pieces [windows, rows, hidden] in and out."""
        length = max(piece.shape[1] for piece in pieces)
        x = torch.cat([F.pad(piece, (0, 0, 0, length - piece.shape[1])) for piece in pieces])
        bias = self._bias(length)
        if min(seen) < length:
            ends = torch.tensor(seen, device=x.device)[:, None, None, None]
            hidden = torch.arange(length, device=x.device)[None, None, None, :] >= ends
            bias = bias.expand(len(seen), -1, -1, -1).masked_fill(hidden, float("-inf"))
        for layer in cast(Iterable[ConformerLayer], self.layers):
            x = layer(x, bias)
        parts = x.split([len(piece) for piece in pieces])
        return [part[:, : piece.shape[1]] for part, piece in zip(parts, pieces, strict=True)]

    def _bias(self, length: int) -> Tensor:
        """The bias of every query and key by their distance: [1, heads, length, length]."""
        reach = self.config.bias_distance
        steps = torch.arange(length, device=self.relative_bias.weight.device)
        distance = (steps[None, :] - steps[:, None]).clamp(-reach, reach - 1) + reach
        return cast(Tensor, self.relative_bias(distance)).permute(2, 0, 1)[None]


def _batches(pieces: Sequence[Tensor], windows: int) -> Iterator[list[Tensor]]:
    """Neighbouring pieces together, at most so many windows in all; a piece holds no more than that."""
    batch: list[Tensor] = []
    for piece in pieces:
        if batch and sum(len(p) for p in batch) + len(piece) > windows:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
