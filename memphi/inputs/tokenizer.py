"""Text to ids and back: the byte-level BPE of tokenizer.json, with its special tokens kept apart from text.

Text that looks like a special token stays text: the encoder knows no added tokens, and special ids come only from
`special`. Knows nothing of conversations (`chat`). Called by `prompt`, and by whoever turns new ids into text.
"""

import codecs
import gzip
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memphi.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import tokenizers

IMAGE_TOKEN = "<|endoftext10|>"
AUDIO_TOKEN = "<|endoftext11|>"
END_TOKEN = "<|end|>"

# What the tokenizers library strips after a token whose rstrip flag is set: Unicode's White_Space. str.lstrip() would
# take the separators U+001C to U+001F too.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"  # noqa: E501


class Tokenizer:
    """One checkpoint's vocabulary; made by `from_folder`, immutable afterwards."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Takes a parsed tokenizer.json; raises CheckpointError where it is not a byte-level BPE."""
        try:
            self._encoder = _plain_encoder(document)
            vocabulary: dict[str, int] = document["model"]["vocab"]
            added = document["added_tokens"]
            self._special: dict[str, int] = {token["content"]: int(token["id"]) for token in added}
            self._swallowing = frozenset(int(token["id"]) for token in added if token["rstrip"])
            self._hidden = frozenset(int(token["id"]) for token in added if token["special"])
        except Exception as wrong:  # the library raises a bare Exception on JSON that it does not understand
            raise CheckpointError(f"tokenizer.json is not a byte-level BPE tokenizer ({wrong!r})") from None
        self._texts = {number: text for text, number in (vocabulary | self._special).items()}
        self._bytes: dict[int, bytes] = {}  # What ids add to answers, as far as it was asked for.

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json or tokenizer.json.gz; raises CheckpointError, naming the file."""
        plain, packed = folder / "tokenizer.json", folder / "tokenizer.json.gz"
        path = plain if plain.exists() or not packed.exists() else packed
        try:
            raw = path.read_bytes()
            document = json.loads(gzip.decompress(raw) if path == packed else raw)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; a model folder holds the model's tokenizer.json") from None
        except (OSError, EOFError, ValueError) as wrong:
            raise CheckpointError(f"{path} cannot be read as JSON: {wrong}") from None
        return cls(document)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; never a special one, whatever the text says.

        Raises RequestError for text that is not valid Unicode (half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as wrong:
            raise RequestError(f"the text is not valid Unicode: half a surrogate pair at {wrong.start}") from None
        # As `encode`, which keeps Python's lock all the while: nobody else would get on during a long text.
        ids: list[int] = self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def special(self, token: str) -> int:
        """The id of a special token by its text; raises CheckpointError where the vocabulary lacks it."""
        if token not in self._special:
            raise CheckpointError(f"tokenizer.json has no special token {token}; is it Phi-4-multimodal's?")
        return self._special[token]

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of all special tokens, by their texts."""
        return self._special

    @property
    def image_id(self) -> int:
        """The placeholder of one row of image features."""
        return self.special(IMAGE_TOKEN)

    @property
    def audio_id(self) -> int:
        """The placeholder of one row of audio features."""
        return self.special(AUDIO_TOKEN)

    @property
    def end_id(self) -> int:
        """The end of a turn."""
        return self.special(END_TOKEN)

    def swallows_space(self, token_id: int) -> bool:
        """Whether white space right after this special token vanishes when a prompt is encoded (spec 7, rstrip)."""
        return token_id in self._swallowing

    def known_ids(self, vocab_size: int) -> NDArray[np.bool_]:
        """Which of the model's ids stand for a token, [vocab_size]; the others must never be sampled (spec 7)."""
        known = np.zeros(vocab_size, np.bool_)
        ids = np.fromiter(self._texts, np.int64)
        known[ids[ids < vocab_size]] = True
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """What an id adds to an answer, perhaps part of a character; b"" for hidden special tokens and unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            known = b"" if token_id in self._hidden else self._bytes_of(self._texts.get(token_id, ""))
            if token_id in self._texts:  # So there are never more than the vocabulary has.
                self._bytes[token_id] = known
        return known

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, hidden special tokens left out; bytes that are no character become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def _bytes_of(self, text: str) -> bytes:
        if any(character not in self._byte_of for character in text):
            return text.encode()
        return bytes(self._byte_of[character] for character in text)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The printable character that stands for each byte in the vocabulary, as GPT-2 chose them."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TextStream:
    """Turns ids into text as they arrive; a character split over several tokens is held back until it is whole.

    All pieces together are exactly `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The whole characters that this id completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


def _plain_encoder(document: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """The BPE without any added token; the library would find them in a user's text, the non-special ones always.

    Vocabulary and merges go in as Python objects: writing them back to JSON for the library would take as long again.
    """
    import tokenizers

    options = {name: value for name, value in document["model"].items() if name not in ("type", "vocab", "merges")}
    empty = dict(document, added_tokens=[], model=dict(document["model"], vocab={}, merges=[]))
    encoder = tokenizers.Tokenizer.from_str(json.dumps(empty))
    merges: list[Any] = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in document["model"]["merges"]
    ]
    encoder.model = tokenizers.models.BPE(document["model"]["vocab"], merges, **options)
    return encoder
