"""Scaled dot-product attention behind one small interface; `eager` is the definition that every backend must equal."""

from typing import Literal, Protocol, get_args

from torch import Tensor

from memphi.errors import RequestError
from memphi.model.attention.eager import EagerAttention
from memphi.model.attention.sdpa import SdpaAttention
from memphi.model.kept import Kept
from memphi.model.rows import Packing

AttentionName = Literal["auto", "eager", "sdpa"]


class Attention(Protocol):
    """What the model asks of an attention backend.

    In the decoder a group of heads / kv_heads query heads shares one key and value head.
    """

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows of the decoder, all alike: each query sees the keys up to its own position, the last query sees all.

        query [rows, tokens, heads, head_dim]; key and value [rows, past + tokens, kv_heads, head_dim].
        Returns [rows, tokens, heads, head_dim].
        """
        ...

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """Whole rows of the decoder, end to end and without a past: each query sees its row up to its own position.

        query [tokens, heads, head_dim]; key and value [tokens, kv_heads, head_dim]. Returns [tokens, heads, head_dim].
        """
        ...

    def paged(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Kept, values: Kept, packing: Packing, out: Tensor
    ) -> None:
        """Rows of the decoder over what a pool keeps of them, their new tokens included.

        query [tokens, heads, head_dim]; key and value [tokens, kv_heads, head_dim] are the new tokens' as the pool
        keeps them, all that rows without a past need; keys and values are one layer of the pool, where packing.paging
        finds each row's. What comes of it goes into out [tokens, heads, head_dim].
        """
        ...

    def full(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """A tower's attention: every query sees every key that the mask leaves.

        query, key, value [batch, heads, tokens, head_dim]; mask is None, boolean (False: not seen) or a bias that is
        added to the scaled scores, and broadcasts to [batch, heads, tokens, tokens]. Every query sees some key.
        """
        ...


def select_attention(name: AttentionName) -> Attention:
    """The backend of that name; `auto` is the fastest that runs everywhere. Raises RequestError for another name."""
    if name not in get_args(AttentionName):
        raise RequestError(f"attention is {name!r}; it must be one of {', '.join(get_args(AttentionName))}")
    return EagerAttention() if name == "eager" else SdpaAttention()
