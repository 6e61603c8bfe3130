"""How likely tokens were, in the two forms that OpenAI has for it."""

from collections.abc import Sequence
from typing import Any

from memphi.inputs.tokenizer import TextStream, Tokenizer
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


class TextOffsets:
    """Where the tokens of one answer begin in its text, in characters, of which each counts once it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = TextStream(tokenizer)
        self._count = 0

    def take(self, token: int) -> int:
        """Where the answer's next token begins."""
        offset = self._count
        self._count += len(self._text.feed(token))
        return offset


def plain_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offsets: TextOffsets) -> dict[str, Any]:
    """As plain completions have it, of an answer's next tokens."""
    shown = [item for item in logprobs if tokenizer.token_bytes(item.id)]
    return {
        "tokens": [_text(item.id, tokenizer) for item in shown],
        "token_logprobs": [item.logprob for item in shown],
        "top_logprobs": [{_text(token, tokenizer): logprob for token, logprob in item.top} for item in shown],
        "text_offset": [offsets.take(item.id) for item in shown],
    }


def _token(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"token": _text(token, tokenizer), "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
