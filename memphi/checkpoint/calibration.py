"""A folder's decoder quantised layer by layer on example texts, so that each layer's codes suit what reaches it.

Every layer is read from the source, sees the texts as the quantised layers before it left them, and is quantised by
what its linears saw (`model.quant.gptq`). The texts are memphi's own, in `examples/`; adapters play no part. Called by
`quantisation`, which writes what is made and reports the errors. `filling`, which quantises while loading, shows the
layers a few of the texts in a way of its own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from memphi.checkpoint.headers import StoredTensor, read_header
from memphi.checkpoint.names import LAYERS, official_name
from memphi.checkpoint.reader import fill_tensors
from memphi.config import ModelConfig, Scheme
from memphi.errors import CheckpointError
from memphi.inputs.chat import END, ROLE_TOKENS, Piece, Special
from memphi.inputs.prompt import encode
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.adapters import remove_adapters
from memphi.model.attention import select_attention
from memphi.model.language import DecoderLayer
from memphi.model.meta import on_meta
from memphi.model.quant.examples import CalibratedLinear, Examples, adapted_linears, put_in_place
from memphi.model.quant.swap import checked
from memphi.model.quant.weights import WEIGHTS, Int8Weight

TEXTS = Path(__file__).parent / "examples"
EXAMPLE_TOKENS = 16384
"""Of texts that are read: all conversations, and of the prose what is left."""
ROW_TOKENS = 1024
"""Of prose that are read together."""


def conversations() -> list[list[str]]:
    """The turns of short conversations, the user's first."""
    parsed: list[list[str]] = json.loads((TEXTS / "conversations.json").read_text(encoding="utf-8"))
    return parsed


def prose() -> str:
    """The first chapters of a novel."""
    return (TEXTS / "prose.txt").read_text(encoding="utf-8")


def example_rows(tokenizer: Tokenizer, config: ModelConfig, tokens: int = EXAMPLE_TOKENS) -> list[list[int]]:
    """The texts as rows of ids, so many at most; raises CheckpointError for a tokenizer of another model."""
    most = min(ROW_TOKENS, config.language.short_tokens, tokens)  # So that there is a row at least.
    talks = [encode(_laid_out(turns), tokenizer)[:most] for turns in conversations()]
    rows = chosen_rows(talks, tokenizer.encode_text(prose()), most, tokens)
    if (largest := max(map(max, rows))) >= config.language.vocab_size:
        raise CheckpointError(
            f"tokenizer.json makes the id {largest} and config.json has {config.language.vocab_size}; they are of "
            "different models"
        )
    return rows


def computed_in(kind: str, device: torch.device) -> torch.dtype:
    """What layers compute in: fp32, but on a GPU bf16 where that is what is stored."""
    return torch.bfloat16 if kind == "BF16" and device.type == "cuda" else torch.float32


def chosen_rows(
    talks: Sequence[list[int]], novel: Sequence[int], length: int, tokens: int = EXAMPLE_TOKENS
) -> list[list[int]]:
    """Conversations and rows of so many ids of the prose, so many tokens at most in all; conversations first."""
    pieces = [list(novel[first : first + length]) for first in range(0, len(novel) - length + 1, length)]
    rows, left = list[list[int]](), tokens
    for row in (*talks, *pieces):
        if len(row) <= left:
            rows.append(row)
            left -= len(row)
    return rows


def _laid_out(turns: Sequence[str]) -> list[Piece]:
    roles = zip(cycle(("user", "assistant")), turns)
    return [piece for role, text in roles for piece in (Special(ROLE_TOKENS[role]), text, Special(END))]


@torch.no_grad()
def embed(
    rows: Sequence[list[int]], stored: StoredTensor, dtype: torch.dtype, device: torch.device, buffer: Tensor
) -> Tensor:
    """Embeddings of all ids [tokens, hidden], as they are in int8; of the table, ids that occur are read alone."""
    ids, places = torch.tensor([number for row in rows for number in row]).unique(return_inverse=True)
    table = torch.empty((len(ids), stored.shape[1]), dtype=dtype, device=device)
    pairs = [(stored.rows(number, number + 1), row[None]) for number, row in zip(ids.tolist(), table, strict=True)]
    fill_tensors(pairs, device, None, buffer)
    with device:
        weight = Int8Weight(*table.shape)
    weight.store(0, checked(table, f"{stored.file}: tensor {stored.name!r}"))
    return weight.look_up(places.to(device), dtype)


def bare_layer(config: ModelConfig, number: int, dtype: torch.dtype) -> DecoderLayer:
    """A layer of the decoder without its adapters, on the meta device."""
    with on_meta():
        layer = DecoderLayer(config, number, select_attention("auto")).to(dtype)
        remove_adapters(layer)
    return layer


class Calibration:
    """The layers of a folder's decoder, one after another.

    Memory of the device: `costs.calibrating`.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme: Scheme,
        stored: Mapping[str, StoredTensor],
        rows: Sequence[list[int]],
        device: torch.device,
        buffer: Tensor,
    ) -> None:
        """Reads the embeddings of the rows, too."""
        self._config, self._kind = config, WEIGHTS[scheme]
        self._stored, self._device, self._buffer = stored, device, buffer
        self._dtype = computed_in(stored["language.norm.weight"].kind, device)
        embeddings = embed(rows, stored["language.embedding.weight"], self._dtype, device, buffer)
        self._examples = Examples(config.language, [len(row) for row in rows], embeddings)
        self._behind: list[Path] = []
        """Shards of layers that the examples have still to go through."""

    def skip(self, shard: Path) -> None:
        """Take the next layer as an earlier run wrote it."""
        self._behind.append(shard)

    def quantise(self, number: int) -> Iterator[CalibratedLinear]:
        """Quantise the linears of the next layer, as `Examples.quantise` does.

        Raises CheckpointError for a number that is infinite or none at all.
        """
        for place, shard in enumerate(self._behind, number - len(self._behind)):
            self._examples.advance(self._layer(place, shard))
        self._behind.clear()
        layer = self._layer(number)
        for name, linear in adapted_linears(layer).items():
            stored = self._stored[f"{LAYERS}.{number}.{name}.weight"]
            checked(linear.weight, f"{stored.file}: tensor {stored.name!r}")
        yield from self._examples.quantise(layer, self._kind)

    @torch.no_grad()
    def _layer(self, number: int, shard: Path | None = None) -> DecoderLayer:
        """A layer without its adapters, as it is stored, or as a shard has it: what its codes stand for."""
        layer = bare_layer(self._config, number, self._dtype).to_empty(device=self._device).requires_grad_(False)
        prefix = f"{LAYERS}.{number}."
        tensors = {prefix + name: tensor for name, tensor in layer.state_dict().items()}
        if shard is None:
            self._fill((self._stored[name], tensor) for name, tensor in tensors.items())
            return layer
        held = {tensor.name: tensor for tensor in read_header(shard)}
        for name, linear in adapted_linears(layer).items():
            with self._device:
                weight = self._kind(linear.out_features, linear.in_features)
            parts = weight.named_buffers()
            self._fill((held[official_name(f"{prefix}{name}.weight.{part}")], buffer) for part, buffer in parts)
            put_in_place(linear, weight)
            del tensors[f"{prefix}{name}.weight"]
        self._fill((held[official_name(name)], tensor) for name, tensor in tensors.items())
        return layer

    def _fill(self, pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
        fill_tensors(pairs, self._device, None, self._buffer)
