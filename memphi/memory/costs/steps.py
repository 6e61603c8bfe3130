"""A step of the decoder, and the choice of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from memphi.config import AdapterForm, CacheFormat, LanguageConfig, ModelConfig
from memphi.memory.costs.cached import SCALE_BYTES, page_tokens
from memphi.memory.costs.cost import MIB, Cost, size_text
from memphi.memory.costs.products import input_bytes, kernel_product_bytes, with_block
from memphi.memory.costs.sizes import all_ranks, key_size, largest_of, qkv_size, query_size, rotary_bytes

GATHER_TOKENS = 32768
"""Tokens whose keys and values are copied out of the pool at once; a longer row goes alone."""
MOST_LINED_TOKENS, LINE_TOKENS = 16, 8
"""New tokens at most of a row that a kernel takes over its pages, in lines; and of a line, where it has more than one.
A row of drafts reads its past once or twice, and there are two forms of the kernel to compile."""
RECURRING_TOKENS, RECURRING_MULTIPLE = 4096, 1024
"""At four thousand tokens a row fills a large card by itself; so coarse a step leaves a handful of lengths."""
PLACE_BYTES = 16
"""Page and place of a token that is copied out of its page."""
METADATA_BYTES = 64
"""Positions, pages, offsets and adapters' indices of one packed token."""
GRAPH_PROGRAMS = 1024
"""Programs among which a step's attention is divided, on the largest card: four for each of its multiprocessors."""
DRAW_BYTES = 64
"""Sorting and filtering one row's scores, per id: scaled, sorted, their ids, the sort's own copies, sums in fp64."""


@dataclass(frozen=True)
class Pasts:
    """What the rows of a step have behind them, by how it is read."""

    tokens: int = 0
    """The longest row of all, new tokens included, as in what follows."""
    rows: int = 0
    """All rows."""
    longest_copied: int = 0
    """Tokens of the longest row whose keys and values are copied out of their pages."""
    all_copied: int = 0
    """Tokens of all such rows."""
    longest_lined: int = 0
    """Tokens of the longest row that a kernel takes over its pages."""
    single_lines: int = 0
    """Such rows of one new token."""
    lines: int = 0
    """In how many lines of LINE_TOKENS the others go."""
    copied_at_once: int | None = None
    """Tokens of rows whose keys and values are copied together; None: as many as may be."""
    joined: int | None = None
    """New tokens of the longest row that sees its past block by block; None: as many as may be."""


def recurring(tokens: int) -> int:
    """How many of a row's new tokens are long and likely to come again as many; 0: it is too short.

    For such lengths it pays to make ready a kernel for that one length, cuDNN's, which takes longer than most steps.
    """
    return tokens - tokens % RECURRING_MULTIPLE if tokens >= RECURRING_TOKENS else 0


def divided(rows: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows of (new tokens, past) as attention takes them: of a long one what recurs, and then the rest."""
    parts = list[tuple[int, int]]()
    for new, past in rows:
        first = recurring(new)
        parts += [(first, past)] * bool(first) + [(new - first, past + first)] * (new > first)
    return parts


def pasts_of(rows: Sequence[tuple[int, int]], in_lines: bool) -> Pasts:
    """The pasts of rows of (new tokens, past), as `divided`; in_lines where kernels take rows of few tokens."""
    lined = [(new, past) for new, past in rows if in_lines and past and new <= MOST_LINED_TOKENS]
    sizes = [new + past if past and not (in_lines and new <= MOST_LINED_TOKENS) else 0 for new, past in rows]
    copied = [size for size in sizes if size]
    return Pasts(
        tokens=largest_of(new + past for new, past in rows),
        rows=len(rows),
        longest_copied=largest_of(copied),
        all_copied=sum(copied),
        longest_lined=largest_of(new + past for new, past in lined),
        single_lines=sum(new == 1 for new, _ in lined),
        lines=sum(-(-new // LINE_TOKENS) for new, _ in lined if new > 1),
        copied_at_once=_most_together(sizes),
        joined=largest_of(new for new, past in rows if past and recurring(new) == new),
    )


def _most_together(sizes: Sequence[int]) -> int:
    """The most of neighbouring rows that are copied at once: up to GATHER_TOKENS, or one that is longer; 0 parts."""
    most = group = 0
    for size in sizes:
        group = group + size if size and group + size <= GATHER_TOKENS else size
        most = max(most, group)
    return most


def prefill_chunk(
    config: ModelConfig,
    tokens: int,
    keys: int,
    dtype_bytes: int,
    rows: int = 1,
    masked: bool = False,
    form: AdapterForm = "plain",
    all_keys: int | None = None,
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute packed tokens of rows through the decoder.

    keys: what a row with a past sees at most, its own tokens included, and rows how many such there are; 0: none has a
    past. masked: whether the attention kernel takes a mask of tokens x keys there (a CPU's does); all_keys is what all
    rows see, at most.
    """
    language = config.language
    numbers = max(_layer_numbers(config, form))
    shared = rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    widest, attention = numbers * dtype_bytes + shared, _attention_bytes(language, dtype_bytes, cache_format) + shared
    gathered = _gather_bytes(language, rows, keys, dtype_bytes, cache_format) if keys else 0
    places = _place_bytes(rows, keys, all_keys)
    mask = 2 * tokens * keys if masked else 0
    attention += _joining_bytes(language) if keys and tokens >= RECURRING_TOKENS else 0
    norm = 8 * language.hidden_size + 4 * language.hidden_size * dtype_bytes
    cost = Cost(
        "prefill chunk",
        max(tokens * max(widest, norm), tokens * attention + gathered + mask) + places,
        f"{tokens} tokens x {numbers} numbers of {dtype_bytes} bytes alive at once in the MLP, or attention with "
        f"{keys} tokens of a layer copied out of their pages",
    )
    beside = tokens * _product_bytes(config, dtype_bytes, form) + input_bytes(config, tokens, dtype_bytes) + places
    return with_block(cost, beside, config, config.scheme, dtype_bytes)


def decode_step(
    config: ModelConfig,
    rows: int,
    keys: int,
    dtype_bytes: int,
    form: AdapterForm = "plain",
    all_keys: int | None = None,
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute one token of each row; keys is the longest row's number of tokens, all_keys that of all rows at most."""
    language = config.language
    widest = max(_layer_numbers(config, form)) * dtype_bytes
    shared = rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    each = max(widest, _attention_bytes(language, dtype_bytes, cache_format)) + shared
    tokens, places = _gathered_tokens(rows, keys, cache_format), _place_bytes(rows, keys, all_keys)
    masks = tokens * (1 + dtype_bytes) + places
    cost = Cost(
        "decode step",
        rows * each + _gather_bytes(language, rows, keys, dtype_bytes, cache_format) + masks,
        f"{rows} rows' activations, and one layer's keys and values copied out of their pages, "
        f"2 x {key_size(language)} x {dtype_bytes} bytes a token: {tokens} tokens at once",
    )
    beside = rows * _product_bytes(config, dtype_bytes, form) + input_bytes(config, rows, dtype_bytes) + places
    return with_block(cost, beside, config, config.scheme, dtype_bytes)


def kernel_step(
    config: ModelConfig,
    tokens: int,
    pasts: Pasts,
    dtype_bytes: int,
    form: AdapterForm = "plain",
    cache_format: CacheFormat = "plain",
) -> Cost:
    """Compute packed tokens of rows, new or not, through memphi's own kernels."""
    language = config.language
    numbers, query = max(_kernel_numbers(config, form)), query_size(language)
    shared = rotary_bytes(language, dtype_bytes) + METADATA_BYTES
    # The running sum, the product that is turned in place, the next one's operand, and what attention gives.
    mixing = language.hidden_size + qkv_size(language) + 2 * query + (all_ranks(config) if form == "packed" else 0)
    longest = _copied_at_once(pasts)
    attention = tokens * (mixing * dtype_bytes + shared) + _past_bytes(
        language, tokens, pasts, dtype_bytes, cache_format
    )
    products = kernel_product_bytes(config, tokens, dtype_bytes)
    staying = _staying_bytes(language, pasts, cache_format)
    return Cost(
        "kernel step",
        max(tokens * (numbers * dtype_bytes + shared) + products, attention) + staying,
        f"{tokens} tokens x {numbers} numbers of {dtype_bytes} bytes alive at once in the MLP, or attention with "
        f"{longest} tokens of a layer copied out of their pages; and what pieces of attention found, for "
        f"{pasts.single_lines} rows of one token and {pasts.lines} lines of {LINE_TOKENS}"
        + (f"; and {size_text(products)} for a block of weights in {config.scheme}, dequantised" if products else ""),
    )


def attention_between_pieces(
    config: ModelConfig, tokens: int, pasts: Pasts, dtype_bytes: int, cache_format: CacheFormat
) -> int:
    """What attention takes by itself in a step whose other tensors stay where they are: also what it gives, once."""
    language = config.language
    given = tokens * (query_size(language) * dtype_bytes + METADATA_BYTES)
    past_bytes = _past_bytes(language, tokens, pasts, dtype_bytes, cache_format)
    return given + past_bytes + _staying_bytes(language, pasts, cache_format)


def _past_bytes(
    language: LanguageConfig, tokens: int, pasts: Pasts, dtype_bytes: int, cache_format: CacheFormat
) -> int:
    """Of a layer's attention over pasts: what is copied and joined, or what rows in lines ask and find."""
    longest, joined = _copied_at_once(pasts), pasts.joined
    copied = (2 * key_size(language) * dtype_bytes + _code_bytes(language, cache_format)) * longest
    asked = (pasts.single_lines + LINE_TOKENS * pasts.lines) * 3 * query_size(language) * dtype_bytes
    if joined is None:
        joined = recurring(tokens) if longest else 0
    return max(joined * _joining_bytes(language) + copied, asked)


def _copied_at_once(pasts: Pasts) -> int:
    if pasts.copied_at_once is not None:
        return pasts.copied_at_once
    return max(pasts.longest_copied, min(pasts.all_copied, GATHER_TOKENS))


def _staying_bytes(language: LanguageConfig, pasts: Pasts, cache_format: CacheFormat) -> int:
    """What stays all the step of the pasts of its rows."""
    return _lines_bytes(language, pasts, page_tokens(cache_format)) + PLACE_BYTES * pasts.all_copied


def _lines_bytes(language: LanguageConfig, pasts: Pasts, page_size: int) -> int:
    """What stays all the step: tables of pages, and for rows in lines their places, and what pieces of them found."""
    n_bytes = 4 * pasts.rows * -(-pasts.tokens // page_size)
    for count, new_tokens in ((pasts.single_lines, 1), (pasts.lines, LINE_TOKENS)):
        if count:
            units = count + GRAPH_PROGRAMS // language.kv_heads
            n_bytes += units * (new_tokens * language.heads * (language.head_dim + 2) * 4 + 32)
            n_bytes += count * (new_tokens * 24 + 4 + 4 * language.kv_heads)
            n_bytes += count * 4 * -(-pasts.longest_lined // page_size)
    return n_bytes


def logits(config: ModelConfig, rows: int, step_tokens: int, dtype_bytes: int) -> Cost:
    """Score rows over the vocabulary and draw from them."""
    vocabulary, hidden = config.language.vocab_size, config.language.hidden_size
    states = (2 * step_tokens + rows) * hidden * dtype_bytes
    cost = Cost(
        "logits",
        rows * vocabulary * (dtype_bytes + 4 + 4) + vocabulary * (1 + DRAW_BYTES) + states,
        f"{rows} rows x {vocabulary} ids x ({dtype_bytes} bytes, 4 in fp32, and 4 masked), "
        f"{DRAW_BYTES} bytes an id to draw from one row at a time, and the states of {step_tokens} tokens",
    )
    beside = rows * vocabulary * dtype_bytes + states
    return with_block(cost, beside, config, config.other_scheme, dtype_bytes)


def _layer_numbers(config: ModelConfig, form: AdapterForm) -> tuple[int, ...]:
    """Numbers a token that each linear of a layer has alive at its widest, an adapter applied to some of the tokens.

    Three of a plain linear's outputs stand at once: its own, the adapter's, and that scaled or the sum. A packed one
    has its output alone, and beside its input what the adapters make of it. Merged, a linear has its output alone.
    """
    language = config.language
    hidden, inner, query = language.hidden_size, language.intermediate_size, query_size(language)
    qkv = qkv_size(language)
    rotated = query + key_size(language)
    # Beside its input, with the embeddings, the layer's input and the residual after attention alive all the while.
    linears = (
        (3 * hidden, hidden, qkv),
        (3 * hidden + qkv + rotated + query, query, hidden),
        (4 * hidden, hidden, 2 * inner),
        (4 * hidden + 2 * inner, inner, hidden),
    )
    gated = 4 * hidden + 2 * inner + 2 * inner
    if form == "packed":
        ranks = all_ranks(config)
        packed = [others + n_in + ranks + n_out for others, n_in, n_out in linears]
        packed[1] += query  # What attention gives is copied into its operand; the others' inputs arise in theirs.
        return (gated + ranks, *packed)
    outputs = 3 if form == "plain" else 1
    return (gated, *(others + n_in + outputs * n_out for others, n_in, n_out in linears))


def _kernel_numbers(config: ModelConfig, form: AdapterForm) -> tuple[int, ...]:
    """The same through memphi's own kernels, where the running sum is one tensor and nothing is kept for its parts."""
    language = config.language
    hidden, inner, query, qkv = (
        language.hidden_size,
        language.intermediate_size,
        query_size(language),
        qkv_size(language),
    )
    ranks = all_ranks(config) if form == "packed" else 0
    outputs = 3 if form == "plain" else 1
    # Beside its input and output: the running sum, and the product before it.
    linears = (
        (hidden, hidden, qkv),
        (hidden + qkv, query, hidden),
        (hidden, hidden, 2 * inner),
        (hidden + 2 * inner, inner, hidden),
    )
    return tuple(others + n_in + ranks + outputs * n_out for others, n_in, n_out in linears)


def _product_bytes(config: ModelConfig, dtype_bytes: int, form: AdapterForm) -> int:
    """Bytes a token while a linear's base is multiplied, before what its adapters add to it."""
    numbers = max(_layer_numbers(config, "packed" if form == "packed" else "merged"))
    return numbers * dtype_bytes + rotary_bytes(config.language, dtype_bytes) + METADATA_BYTES


def _attention_bytes(language: LanguageConfig, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """A token while attention runs: what a linear beside it has, and the output twice.

    In 8 bits there are also keys and values as they are kept, and before all this they are made, one after the other:
    in fp32, as codes and as what these stand for.
    """
    query, key = query_size(language), key_size(language)
    before = (3 * language.hidden_size + qkv_size(language) + query + key) * dtype_bytes
    attending = 2 * query * dtype_bytes
    if cache_format == "plain":
        return before + attending
    writing = key * (4 + 4 + dtype_bytes) + language.kv_heads * 16
    return before + max(attending + 2 * key * dtype_bytes, key * dtype_bytes + writing)


def _joining_bytes(language: LanguageConfig) -> int:
    """A token whose past is seen block by block: the sum of what they give in fp32, and what each is weighed by."""
    return 4 * (query_size(language) + 5 * language.heads)


def _gathered_tokens(rows: int, keys: int, cache_format: CacheFormat) -> int:
    """Tokens copied out of their pages at once: the longest row alone, or short rows together."""
    return max(keys, min(rows * keys, GATHER_TOKENS)) + page_tokens(cache_format)


def _gather_bytes(language: LanguageConfig, rows: int, keys: int, dtype_bytes: int, cache_format: CacheFormat) -> int:
    """One layer's keys and values copied out of their pages, in the blocks that the allocator gives."""
    tokens = _gathered_tokens(rows, keys, cache_format)
    numbers_bytes = 2 * _block_bytes(tokens * key_size(language) * dtype_bytes)
    return numbers_bytes + _block_bytes(tokens * _code_bytes(language, cache_format))


def _code_bytes(language: LanguageConfig, cache_format: CacheFormat) -> int:
    """A token that is copied out as codes and scales, of which there is one of either, keys or values, at a time."""
    return 0 if cache_format == "plain" else key_size(language) + language.kv_heads * SCALE_BYTES


def _block_bytes(n_bytes: int) -> int:
    """Of PyTorch's allocator on CUDA, for large tensors: what is left of a multiple of 2 MiB goes along."""
    return -(-n_bytes // (2 * MIB)) * 2 * MIB if n_bytes >= 10 * MIB else n_bytes


def _place_bytes(rows: int, keys: int, all_keys: int | None) -> int:
    """Where the tokens lie that rows see; of each row, if nothing else is known, as many as of the longest."""
    return PLACE_BYTES * min(rows * keys, rows * keys if all_keys is None else all_keys)
