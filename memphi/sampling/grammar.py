"""Structured output: which tokens may come next so that an answer keeps to a grammar.

llguidance follows the grammar; here it gets the model's vocabulary and bounds on what it compiles. Imports no torch:
whoever takes requests checks their grammars, whoever runs them asks for masks.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memphi.config import ModelConfig
from memphi.errors import RequestError
from memphi.inputs.tokenizer import Tokenizer
from memphi.request import Grammar, SamplingParams

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Mask = NDArray[np.int32]
"""One bit for each id, the lowest first: [ceil(vocab_size / 32)]."""
JSON_SPACE = r"(\n {0,24}| )"
"""Where JSON may have white space. Any would do for JSON, but a model that may write it without end does so."""
MOST_CHARACTERS = 256 * 1024
MOST_PARTS = 1000
"""Rules and groups, and objects of a schema with references: the compiler may call itself for each, and a stack that is
full ends the process. One of 8 MiB is full after 1650 at the earliest (measured)."""
NAMES = {
    "json_object": "JSON grammar",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "Lark grammar",
}


class Grammars:
    """Grammars over one model's ids; the table of its tokens is made once, when the first grammar needs it."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self.vocab_size = config.language.vocab_size
        self._tokenizer = tokenizer
        self._stop_ids = list(config.stop_token_ids)

    def check(self, sampling: SamplingParams) -> None:
        """Raise RequestError for what only the vocabulary can tell: ids that there are not, a grammar of no use."""
        for number, _ in sampling.logit_bias:
            if not 0 <= number < self.vocab_size:
                raise RequestError(f"logit_bias names id {number}; this model's ids are 0 to {self.vocab_size - 1}")
        if sampling.grammar is not None:
            self.matcher(sampling.grammar).allowed(())

    def matcher(self, grammar: Grammar) -> "Matcher":
        """What follows an answer through a grammar; raises RequestError with the reason for one that cannot be used."""
        return Matcher(self, grammar)

    @cached_property
    def table(self) -> "LLTokenizer":
        """The vocabulary as llguidance wants it; ids without a token are empty there, and never allowed."""
        from llguidance import LLTokenizer, TokenizerWrapper

        words = _Vocabulary(self._tokenizer, self.vocab_size, self._stop_ids[0])
        return LLTokenizer(TokenizerWrapper(words), n_vocab=self.vocab_size, eos_token=self._stop_ids)

    @cached_property
    def known(self) -> Mask:
        """Ids that stand for a token."""
        return _pack(self._tokenizer.known_ids(self.vocab_size))

    @cached_property
    def stops(self) -> Mask:
        """Ids that end an answer."""
        flags = np.zeros(self.vocab_size, np.bool_)
        flags[self._stop_ids] = True
        return _pack(flags)


class Matcher:
    """One answer's way through its grammar."""

    def __init__(self, grammars: Grammars, grammar: Grammar) -> None:
        """Raises RequestError for a grammar that cannot be compiled."""
        self._grammars = grammars
        self._name = NAMES[grammar.kind]
        self._rules = _compile(grammar)
        self._start()

    def allowed(self, answer: Sequence[int], goes_on: bool = False) -> Mask:
        """Which ids may follow an answer; it depends on nothing else, whatever was asked before.

        Ids that end an answer are among them where the grammar is complete; with goes_on only if nothing else is.
        Raises RequestError where nothing may follow, or the grammar has become too complex.
        """
        answer = list(answer)
        if self._matcher.is_error() or not self._go_back(answer):
            self._start()
        fresh = answer[len(self._fed) :]
        self._check(self._matcher.consume_tokens(fresh))
        self._fed += fresh
        known = self._grammars.known
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(known)] & known
        self._check(not self._matcher.is_error())  # In error it would allow what ends an answer.
        without_stops = mask & ~self._grammars.stops
        if goes_on and without_stops.any():
            return without_stops
        if not mask.any():
            raise RequestError(f"the {self._name} asks for what the model has no token for")
        return mask

    def _go_back(self, answer: list[int]) -> bool:
        """Forget what was fed and is not in this answer; whether that went."""
        if answer[: len(self._fed)] == self._fed:
            return True
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer, self._fed, strict=False)))
        gone = len(self._fed) - common
        del self._fed[common:]
        return bool(self._matcher.rollback(gone))

    def _start(self) -> None:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        self._matcher = LLMatcher(self._grammars.table, self._rules, log_level=0, limits=limits)
        self._fed: list[int] = []
        self._check(not self._matcher.is_error())

    def _check(self, holds: bool) -> None:
        if not holds:
            raise RequestError(f"the {self._name} cannot be used: {_reason(self._matcher.get_error())}")


def allows(mask: Mask, number: int) -> bool:
    """Whether an id is among those of a mask."""
    return bool(mask[number // 32] >> number % 32 & 1)


class _Vocabulary:
    """The model's tokens by id, as llguidance reads them; special ones never match text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self.eos_token_id = end_id
        self.tokens = [tokenizer.token_bytes(number) for number in range(vocab_size)]
        special = {number: text for text, number in tokenizer.special_tokens.items() if number < vocab_size}
        for number, text in special.items():
            self.tokens[number] = text.encode()
        self.special_token_ids = list(special)
        self._encode = tokenizer.encode_text

    def __call__(self, text: str) -> list[int]:
        """Ids of text that a grammar leaves no choice about."""
        if not isinstance(text, str):
            raise TypeError("text is encoded, not bytes")  # llguidance tries both.
        return self._encode(text)


def _compile(grammar: Grammar) -> str:
    """The grammar in llguidance's own form, not looked into yet but for JSON; raises RequestError."""
    from llguidance import LLMatcher

    _check_size(grammar)
    try:
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        if grammar.kind == "lark":
            return LLMatcher.grammar_from_lark(grammar.source)
        schema = json.dumps({"type": "object"}) if grammar.kind == "json_object" else grammar.source
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": JSON_SPACE})
    except ValueError as wrong:
        name = NAMES[grammar.kind]
        raise RequestError(f"the {name} cannot be used: {_reason(str(wrong))}") from None


def _check_size(grammar: Grammar) -> None:
    """Raise RequestError for a grammar that might take the compiler too far."""
    source, name = grammar.source, NAMES[grammar.kind]
    if len(source) > MOST_CHARACTERS:
        raise RequestError(f"the {name} has {len(source)} characters; at most {MOST_CHARACTERS} are taken")
    if (parts := _count_parts(grammar)) > MOST_PARTS:
        raise RequestError(f"the {name} has {parts} parts that may refer to each other; at most {MOST_PARTS} are taken")


def _count_parts(grammar: Grammar) -> int:
    """How often the compiler may call itself: in the rules and groups of a grammar, and in one of its schemas."""
    rules, schemas = _split(grammar.source) if grammar.kind == "lark" else ("", [grammar.source])
    # References may be spelt with escapes; without them the depth of JSON is bounded by itself.
    linked = [schema for schema in schemas if re.search(r"\$\w*[rR]ef|\\u", schema)]
    return len(re.findall(r"^\s*[\w?!]|[(\[]", rules, re.MULTILINE)) + max((s.count("{") for s in linked), default=0)


def _split(source: str) -> tuple[str, list[str]]:
    """The rules of a Lark grammar, and the schemas that stand in it."""
    rules, *rest = source.split("%json")
    schemas = []
    for piece in rest:
        text = piece.lstrip()
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
        except (ValueError, RecursionError):
            end = 0
        schemas.append(text[:end])
        rules += text[end:]
    return rules, schemas


def _reason(message: str) -> str:
    """llguidance's message as part of a sentence: without excerpts of the source, which are indented."""
    lines = [line for line in message.splitlines() if line and not line[0].isspace() and "<non-verbose/>" not in line]
    if lines and lines[0].startswith("NoExtension"):
        return "no answer could match it"
    text = " ".join(lines).replace("regex parse error: error: ", "")
    text = re.sub(r"^at 1\(8\): (invalid regex .*) \(in regex\)", r"\1", text)  # Where llguidance puts a bare one.
    return text.replace("Expecting object schema to apply options", "it is no JSON object")


def _pack(flags: NDArray[np.bool_]) -> Mask:
    """[vocab_size] flags as a mask."""
    padded = np.zeros(-(-len(flags) // 32) * 32, np.bool_)
    padded[: len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.int32)
