"""How likely tokens were, in the two forms that OpenAI has for it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from memphi.inputs.tokenizer import Tokenizer
from memphi.request import TokenLogprob


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """As chat completions have it; tokens that show no text (the end of a turn) are left out."""
    shown = [item for item in logprobs if tokenizer.token_bytes(item.id)]
    return {
        "content": [
            {
                **_token(item.id, item.logprob, tokenizer),
                "top_logprobs": [_token(token, logprob, tokenizer) for token, logprob in item.top],
            }
            for item in shown
        ],
        "refusal": None,
    }


def plain_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """As plain completions have it; offset is how many characters came before."""
    shown = [item for item in logprobs if tokenizer.token_bytes(item.id)]
    texts = [_text(item.id, tokenizer) for item in shown]
    offsets = list(accumulate(map(len, texts), initial=offset))[: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [item.logprob for item in shown],
        "top_logprobs": [{_text(token, tokenizer): logprob for token, logprob in item.top} for item in shown],
        "text_offset": offsets,
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token": _text(token, tokenizer), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
