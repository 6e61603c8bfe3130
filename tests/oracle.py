"""What the parity and model tests share: prompts of any shape, and transformers' answers to them."""

from dataclasses import replace

import numpy as np
import torch

from memphi.config import ModelConfig
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.oracle import build_oracle, fill_oracle, merge_adapter, model_weights, oracle_inputs
from memphi.request import (
    ClipFootprint,
    ClipInput,
    Footprint,
    ImageFootprint,
    ImageInput,
    InputMode,
    MediaSpan,
    Prompt,
)
from tests.checkpoints import tiny_config

TOLERANCE = 1e-4


def parity_config(config: ModelConfig | None = None, short_tokens: int = 4096) -> ModelConfig:
    """A tiny config with the one size that transformers has in its code: windows of 500 tokens."""
    config = config or tiny_config()
    language = replace(config.language, short_tokens=short_tokens, max_tokens=32 * short_tokens)
    return replace(config, language=language, audio=replace(config.audio, window_tokens=500))


def make_image(
    config: ModelConfig, rows: int = 1, columns: int = 1, valid: tuple[int, int] | None = None, seed: int = 0
) -> ImageInput:
    """An image of noise in a grid of crops, of which the first valid[0] x valid[1] patches (all: None) count."""
    side, size = config.vision.patches, config.vision.crop_size
    height, width = valid or (rows * side, columns * side)
    grid = np.zeros((rows * side, columns * side), dtype=bool)
    grid[:height, :width] = True
    tiles = grid.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
    crops = np.random.default_rng(seed).standard_normal((rows * columns + 1, 3, size, size)).astype(np.float32)
    tokens = -(-height // 2) * (-(-width // 2) + 1) + 1 + side // 2 * (side // 2 + 1)
    mask = np.concatenate((np.ones((1, side, side), dtype=bool), tiles))
    return ImageInput(crops, mask, ImageFootprint(columns * size, rows * size, rows, columns, tokens))


def make_clip(config: ModelConfig, frames: int, seed: int = 0) -> ClipInput:
    """A clip of noise that looks like log-mel features."""
    noise = np.random.default_rng(seed).standard_normal((frames, config.audio.mel_bins)).astype(np.float32)
    return ClipInput(10 + 3 * noise, ClipFootprint(frames / 100, frames, -(-frames // 8)))


def placeholders(config: ModelConfig) -> dict:
    """Ids that stand for media in `make_prompt`: the vocabulary's last two."""
    return {"image": config.language.vocab_size - 2, "audio": config.language.vocab_size - 1}


def make_prompt(config: ModelConfig, images=(), clips=(), text_tokens: int = 7, seed: int = 0) -> Prompt:
    """Random text, with images and clips in turn standing in it."""
    random, ids = np.random.default_rng(seed), placeholders(config)
    media = [("image", i, image.footprint.tokens) for i, image in enumerate(images)]
    media += [("audio", i, clip.footprint.tokens) for i, clip in enumerate(clips)]
    sequence, spans = [], []
    for kind, index, tokens in sorted(media, key=lambda item: (item[1], item[0])):
        sequence += random.integers(0, ids["image"], 3).tolist()
        spans.append(MediaSpan(kind, index, len(sequence), tokens))
        sequence += [ids[kind]] * tokens
    sequence += random.integers(0, ids["image"], text_tokens).tolist()
    mode = InputMode.of(images=bool(images), audio=bool(clips))
    footprint = Footprint(
        mode,
        len(sequence) - sum(tokens for *_, tokens in media),
        tuple(image.footprint for image in images),
        tuple(clip.footprint for clip in clips),
    )
    return Prompt(tuple(sequence), tuple(spans), tuple(images), tuple(clips), footprint)


def mode_prompts(config: ModelConfig) -> list[Prompt]:
    """One prompt in each input mode, of different lengths, with padding in the images."""
    side = config.vision.patches
    image = make_image(config, 2, 1, (side + 3, side - 1), seed=1)
    clip = make_clip(config, 90, seed=2)
    return [
        make_prompt(config, text_tokens=11, seed=3),
        make_prompt(config, [image], text_tokens=5, seed=4),
        make_prompt(config, clips=[clip], text_tokens=8, seed=5),
        make_prompt(config, [make_image(config, seed=6)], [clip, make_clip(config, 31, seed=7)], seed=8),
    ]


def make_row(
    model: Phi4MM, prompt: Prompt, tokens: int | None = None, past: int = 0, pages: tuple[int, ...] = ()
) -> Row:
    """A prompt's row, whole or a part of it."""
    long = model.config.language.is_long(len(prompt.ids))
    return Row(len(prompt.ids) if tokens is None else tokens, past, prompt.mode.adapter, long, pages)


def cut_media(media: list, first: int, end: int, shift: int = 0) -> list:
    """What of a prompt's media rows falls into first..end, and where it starts there, moved by shift."""
    pieces = []
    for start, rows in media:
        low, high = max(start, first), min(start + rows.shape[0], end)
        if low < high:
            pieces.append((low - first + shift, rows[low - start : high - start]))
    return pieces


@torch.inference_mode()
def all_logits(model: Phi4MM, prompt: Prompt) -> torch.Tensor:
    """memphi's logits at every position of a prompt."""
    tokens = len(prompt.ids)
    return model(
        torch.tensor(prompt.ids), [make_row(model, prompt)], model.encode_media(prompt), logits_at=range(tokens)
    )


class Oracle:
    """transformers' model with a memphi model's weights."""

    def __init__(self, model: Phi4MM) -> None:
        self.config, self.weights = model.config, model_weights(model)
        self.network = build_oracle(self.config, placeholders(self.config), "cpu", torch.float32)
        fill_oracle(self.network, self.config, self.weights)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, **changes) -> torch.Tensor:
        """Logits at every position, the adapter of the prompt's mode merged."""
        merge_adapter(self.network, self.config, self.weights, prompt.mode.adapter)
        return self.network(**oracle_inputs(prompt, "cpu") | changes, use_cache=False).logits[0]

    @torch.inference_mode()
    def logits_with(self, prompt: Prompt, embeddings: list) -> torch.Tensor:
        """The same from given media embeddings, as (position, rows)."""
        merge_adapter(self.network, self.config, self.weights, prompt.mode.adapter)
        embedded = self.network.model.embed_tokens(torch.tensor([prompt.ids]))
        for start, rows in embeddings:
            embedded[0, start : start + rows.shape[0]] = rows
        return self.network(inputs_embeds=embedded, use_cache=False).logits[0]

    @property
    def image_embed(self):
        return self.network.model.embed_tokens_extend.image_embed

    @property
    def audio_embed(self):
        return self.network.model.embed_tokens_extend.audio_embed

    @torch.inference_mode()
    def patch_features(self, image: ImageInput) -> torch.Tensor:
        """The vision tower's features of every crop: [crops, patches ** 2, hidden]."""
        masks = torch.from_numpy(image.patch_mask)
        output = self.image_embed.img_processor(torch.from_numpy(image.crops), masks, output_hidden_states=True)
        return output.hidden_states[-2]

    @torch.inference_mode()
    def clip_features(self, clips: list, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The audio encoder's features of clips, padded to the longest: [clips, tokens, hidden]."""
        features = [torch.from_numpy(clip.features) for clip in clips]
        return self.audio_embed.encoder(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), mask)

    @torch.inference_mode()
    def embed_clip(self, clip: ClipInput, head: str) -> torch.Tensor:
        """A clip's embedding, computed alone."""
        name = {"speech": "speech", "vision": "vision_speech"}[head]
        up, down = (getattr(self.audio_embed, f"{part}_proj_for_{name}") for part in ("up", "down"))
        return down(torch.nn.functional.gelu(up(self.clip_features([clip])[0])))


class PlainPool:
    """The simplest `KeyValuePool` there is, full of garbage; `take` hands out pages in no order."""

    def __init__(self, model: Phi4MM, pages: int = 200, page_tokens: int = 4) -> None:
        language = model.config.language
        shape = (pages, language.layers, 2, page_tokens, language.kv_heads, language.head_dim)
        self.memory = torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)
        self.page_tokens = page_tokens
        self.left = np.random.default_rng(0).permutation(pages).tolist()

    def layer(self, index: int, /) -> tuple[torch.Tensor, torch.Tensor]:
        return self.memory[:, index, 0], self.memory[:, index, 1]

    def scales(self, index: int, /) -> None:
        return None

    def take(self, tokens: int) -> tuple[int, ...]:
        """Pages for so many tokens, taken by nobody before."""
        count = -(-tokens // self.page_tokens)
        taken, self.left = tuple(self.left[:count]), self.left[count:]
        assert len(taken) == count
        return taken


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b|; shapes must be equal."""
    assert a.shape == b.shape
    return float((a - b).abs().max())
