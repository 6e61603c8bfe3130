"""The decoder: packed tokens of many rows in, hidden states out (spec 3).

Knows nothing of media, sampling or who owns which page; `KeyValuePool` is all it asks of a cache.
"""

from collections.abc import Callable, Iterable
from typing import Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from memphi.config import LanguageConfig, ModelConfig
from memphi.model.adapters import AdaptedLinear, multiply
from memphi.model.attention import Attention
from memphi.model.kept import kept_layer
from memphi.model.rotary import rotary_table, rotate
from memphi.model.rows import Packing


class KeyValuePool(Protocol):
    """Keys and values of all layers in pages that rows name."""

    @property
    def page_tokens(self) -> int: ...

    def layer(self, index: int, /) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, each [pages, page_tokens, kv_heads, head_dim]; views, to be written to."""
        ...

    def scales(self, index: int, /) -> Tensor | None:
        """Of keys and values that are kept in 8 bits the scales, a view [pages, page_tokens, kv_heads, 2]."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded to x's dtype before the weight is applied, as in the reference."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The norm of x; in out, where one is given."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return torch.mul(normed, self.weight, out=out)


Norm = Callable[[Tensor | None], Tensor]
"""Gives a layer's normed input; into the tensor that it is called with, if any."""


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        language = config.language
        adapters = {"vision": config.vision_adapter, "speech": config.speech_adapter}
        query, key = language.heads * language.head_dim, language.kv_heads * language.head_dim
        self.qkv = AdaptedLinear(language.hidden_size, query + 2 * key, adapters)
        self.out = AdaptedLinear(query, language.hidden_size, adapters)
        self.widths = (query, key, key)
        self.head_dim = language.head_dim
        self.layer = layer
        self.attention = attention

    def forward(
        self, norm: Norm, packing: Packing, rotary: tuple[Tensor, Tensor], cache: KeyValuePool | None
    ) -> Tensor:
        count = len(packing.positions)
        parts = self.qkv.follow(norm, count, packing.adapter_tokens).split(self.widths, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [tokens, heads, head_dim]
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        mixed = self._mix(query, key, value, packing, cache)
        return cast(Tensor, self.out(mixed.flatten(1), packing.adapter_tokens))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, cache: KeyValuePool | None) -> Tensor:
        """Attention within each row, over what the pool keeps of it."""
        if cache is None:
            return self.attention.packed(query, key, value, packing)
        assert packing.paging is not None
        keys, values = kept_layer(*cache.layer(self.layer), cache.scales(self.layer))
        # Every row sees what is kept, a whole one too: so it does not matter in how many steps a row is computed.
        key, value = packing.paging.write(keys, key), packing.paging.write(values, value)
        out = torch.empty_like(query)
        self.attention.paged(query, key, value, keys, values, packing, out)
        return out


class MLP(nn.Module):
    """down(up * silu(gate)); the gate is the first half of gate_up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        language = config.language
        adapters = {"vision": config.vision_adapter, "speech": config.speech_adapter}
        self.gate_up = AdaptedLinear(language.hidden_size, 2 * language.intermediate_size, adapters)
        self.down = AdaptedLinear(language.intermediate_size, language.hidden_size, adapters)

    def forward(self, norm: Norm, packing: Packing) -> Tensor:
        count = len(packing.positions)
        gate, up = self.gate_up.follow(norm, count, packing.adapter_tokens).chunk(2, dim=-1)
        return self.down.follow(lambda out: torch.mul(up, F.silu(gate), out=out), count, packing.adapter_tokens)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ModelConfig, layer: int, attention: Attention) -> None:
        super().__init__()
        size, eps = config.language.hidden_size, config.language.norm_eps
        self.attention_norm = RMSNorm(size, eps)
        self.attention = SelfAttention(config, layer, attention)
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, packing: Packing, rotary: tuple[Tensor, Tensor], cache: KeyValuePool | None) -> Tensor:
        x = x + self.attention(lambda out: self.attention_norm(x, out), packing, rotary, cache)
        return cast(Tensor, x + self.mlp(lambda out: self.mlp_norm(x, out), packing))


class TiedEmbedding(nn.Embedding):
    """Ids to embeddings, and hidden states to scores by the same matrix."""

    def look_up(self, ids: Tensor, out: Tensor) -> None:
        """As `forward`, into out [tokens, hidden]; for inference."""
        torch.index_select(self.weight, 0, ids, out=out)

    def score(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows, hidden] -> [rows, vocab_size]; in out, where one is given, by memphi's own kernels."""
        return F.linear(hidden, self.weight) if out is None else multiply(hidden, self.weight, out, kernels=True)


class LanguageModel(nn.Module):
    """Embedding, decoder layers, final norm; the embedding is also the output head."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.config: LanguageConfig = config.language
        self.embedding = TiedEmbedding(config.language.vocab_size, config.language.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, attention) for i in range(config.language.layers))
        self.norm = RMSNorm(config.language.hidden_size, config.language.norm_eps)
        self.bring: Callable[[Iterable[nn.Module]], Iterable[nn.Module]] = iter
        """Gives the layers one after another, as each is there to be computed."""

    def forward(self, embeddings: Tensor, packing: Packing, cache: KeyValuePool | None = None) -> Tensor:
        """Run the decoder over packed rows.

        embeddings [tokens, hidden]; cache keeps the rows' keys and values in the pages they name; with None, rows are
        whole and nothing is kept.
        Returns the normed hidden states [tokens, hidden].
        """
        rotary = rotary_table(self.config, packing.positions, packing.long, embeddings.dtype)
        x = embeddings
        for layer in self.bring(self.layers):
            x = layer(x, packing, rotary, cache)
        return cast(Tensor, self.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary for the hidden states given: [rows, hidden] -> [rows, vocab_size]."""
        return self.embedding.score(hidden)
