"""What steps in CUDA graphs take, whose tensors stay where they are, and which steps of prompts are for one."""

from collections.abc import Sequence

from memphi.config import AdapterForm, CacheFormat, ModelConfig, Scheme
from memphi.memory.costs.cached import PAGE_TOKENS, page_tokens
from memphi.memory.costs.cost import MIB, Cost, size_text
from memphi.memory.costs.products import kernel_product_bytes
from memphi.memory.costs.sizes import all_ranks, qkv_size, query_size
from memphi.memory.costs.steps import GRAPH_PROGRAMS, LINE_TOKENS, METADATA_BYTES, Pasts, kernel_step

GRAPHS_BYTES = 128 * MIB
"""What CUDA keeps of all graphs, some hundred launches each, and cuBLAS' work space for them."""
PIECE_SCORES = 2048
"""Scores of a row in a graph that the likeliest id is first looked for among."""
PREFILL_GRAPH_BYTES = 2 * MIB
"""What CUDA keeps of a graph of prompts: an H200 took nothing for most, and 8 MiB for one."""
PREFILL_KINDS = 3
"""Of each size as many graphs are held, for prompts without an adapter, with one, or with some."""
SEGMENT_BYTES = 24 * MIB
"""Of the allocator's segments for a graph's tensors, not all of which fills up."""
LEAST_PREFILL_TOKENS, MOST_PREFILL_TOKENS = 64, 2048
"""Of a graph of prompts: fewer tokens take no less time, and with more a large card takes longer than their host."""
MOST_PIECES_TOKENS = 8192
"""Of graphs of pieces, between which attention is launched kernel by kernel: for so many tokens lines are slow.
They are for the largest cards, of which an H200 was tried: elsewhere so large a step takes a card longer than its
host."""
LARGEST_CAPABILITY = ((9, 0), (10, 0))
PIECES_SCHEMES = ("fp8", "int8")
"""Where they take less: in 16 bits, and in int4, a step without a graph knows which adapter's tokens lie where."""
PIECES_STEP, PIECES_HELD = 256, 24
"""Their sizes are multiples of so many tokens; and of how many steps they are held at most."""
PIECES_BYTES = 4 * MIB
"""What CUDA keeps of the graphs of a step's pieces (an estimate: not measured by itself)."""
PREFILL_LINE_TOKENS = 16
"""Of a line: with the heads that share a key they fill three quarters of a block on tensor cores."""
PREFILL_ROWS, TOKENS_A_ROW, PREFILL_ROW_TOKENS, PREFILL_LINE_KEYS = 64, 8, 16384, 1 << 19
"""Of a step in such a graph: rows at most, and one for so many tokens of the graph; at most, tokens of a row with its
past; keys that lines see, all in all. With more of these kernels that take rows as a whole are faster."""


def graphs(config: ModelConfig, rows: int, tokens: int, dtype_bytes: int, form: AdapterForm = "plain") -> Cost:
    """Decode steps in CUDA graphs: the tensors of the largest, and what CUDA keeps of each; tokens a row at most."""
    language = config.language
    ranks = all_ranks(config) if form == "packed" else 0
    hidden, inner = language.hidden_size, language.intermediate_size
    activations = 4 * hidden + 3 * inner + qkv_size(language) + 2 * ranks + 2 * language.rotary_dim
    pages = -(-tokens // PAGE_TOKENS)
    units = rows + GRAPH_PROGRAMS // language.kv_heads
    attention = units * (language.heads * (language.head_dim + 2) * 4 + 32) + rows * language.kv_heads * 4
    choice = -(-language.vocab_size // PIECE_SCORES) * (4 + 4)
    each = (activations + language.vocab_size) * dtype_bytes + choice + 2 * pages * 4 + METADATA_BYTES
    products = kernel_product_bytes(config, rows, dtype_bytes)
    return Cost(
        "graphs",
        rows * each + attention + products + GRAPHS_BYTES,
        f"{rows} rows x ({activations} activations and {language.vocab_size} scores of {dtype_bytes} bytes, "
        f"{choice} bytes to choose an id, twice {pages} pages of 4), {units} pieces of attention, "
        + (f"{size_text(products)} for a block of weights in {config.scheme}, dequantised, " if products else "")
        + f"and {size_text(GRAPHS_BYTES)} for CUDA and cuBLAS (an estimate: not measured)",
    )


def most_graph_tokens(scheme: Scheme, capability: tuple[int, int] | None) -> int:
    """Of a graph of prompts, or of pieces, at most."""
    has_pieces = scheme in PIECES_SCHEMES and capability in LARGEST_CAPABILITY
    return MOST_PIECES_TOKENS if has_pieces else MOST_PREFILL_TOKENS


def is_in_pieces(tokens: int) -> bool:
    """Whether so many tokens of prompts have graphs of pieces, and not one."""
    return tokens > MOST_PREFILL_TOKENS


def prefill_lines(tokens: int) -> int:
    """Lines that a graph of so many tokens has: a row's first may be filled in part. None in pieces."""
    return 0 if is_in_pieces(tokens) else -(-tokens // PREFILL_LINE_TOKENS) + _most_rows(tokens)


def most_prefill_lines(tokens: int) -> int:
    """The most lines that any graph of up to so many tokens has."""
    return prefill_lines(min(tokens, MOST_PREFILL_TOKENS))


def _most_rows(tokens: int) -> int:
    return min(tokens // TOKENS_A_ROW, PREFILL_ROWS)


def prefill_bucket(tokens: int, most: int) -> int:
    """The tokens of the graph that serves so many: few sizes, of which large ones leave a third of it idle at most."""
    step = max(LEAST_PREFILL_TOKENS, (1 << (tokens - 1).bit_length()) // 4)
    step = PIECES_STEP if is_in_pieces(tokens) else step
    return min(-(-tokens // step) * step, most)


def most_prefills(tokens: int) -> int:
    """Graphs of prompts that are held, where the largest has so many tokens; those of pieces apart."""
    most = min(tokens, MOST_PREFILL_TOKENS)
    sizes = {prefill_bucket(size, most) for size in range(LEAST_PREFILL_TOKENS, most + 1, LEAST_PREFILL_TOKENS)}
    return PREFILL_KINDS * len(sizes)


def most_held(size: int, most_tokens: int) -> int:
    """Of graphs like the one of so many tokens, or of steps in pieces like its, how many are held at most."""
    return PIECES_HELD if is_in_pieces(size) else most_prefills(most_tokens)


def prefill_size(rows: Sequence[tuple[int, int]], most_tokens: int) -> int:
    """The tokens of the graph that takes rows of (new tokens, past), of those up to so many; 0: none does."""
    tokens = sum(new for new, _ in rows)
    if not 0 < tokens <= most_tokens:
        return 0
    size = prefill_bucket(tokens, most_tokens)
    return size if is_in_pieces(size) or _line_up(rows, size) else 0


def _line_up(rows: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether a graph of so many tokens with all rows in lines has room for them."""
    if len(rows) > _most_rows(size) or max(new + past for new, past in rows) > PREFILL_ROW_TOKENS:
        return False
    return sum(_line_keys(*row) for row in rows) <= PREFILL_LINE_KEYS


def _line_keys(new: int, past: int) -> int:
    """Keys that the lines of a row see, all in all: each those up to its end."""
    lines = -(-new // PREFILL_LINE_TOKENS)
    return lines * (past + new) - PREFILL_LINE_TOKENS * lines * (lines - 1) // 2


def prefill_graphs(
    config: ModelConfig, tokens: int, dtype_bytes: int, form: AdapterForm, cache_format: CacheFormat
) -> Cost:
    """Steps of up to so many tokens of prompts in CUDA graphs: the tensors of the largest, and what CUDA keeps."""
    language, lined = config.language, min(tokens, MOST_PREFILL_TOKENS)
    lines, pages = most_prefill_lines(tokens), -(-PREFILL_ROW_TOKENS // page_tokens(cache_format))
    programs = GRAPH_PROGRAMS // language.kv_heads
    # As `kernel_step` knows them, whose lines are shorter and which divides them among as many programs.
    shorter = PREFILL_LINE_TOKENS // LINE_TOKENS * (lines + programs) - programs
    pasts = Pasts(lines=shorter, copied_at_once=0, joined=0)
    step = kernel_step(config, lined, pasts, dtype_bytes, form, cache_format).bytes
    staying = tokens * (language.hidden_size * dtype_bytes + METADATA_BYTES)
    staying += lines * (PREFILL_LINE_TOKENS * 8 + 4 + 2 * 4 * pages)
    if is_in_pieces(tokens):
        step = max(step, kernel_step(config, tokens, Pasts(), dtype_bytes, form, cache_format).bytes)
        ranks = all_ranks(config) if form == "packed" else 0
        staying += tokens * (qkv_size(language) + query_size(language) + ranks) * dtype_bytes
    step += step // 8 + SEGMENT_BYTES
    count, of_pieces = most_prefills(tokens), PIECES_HELD * is_in_pieces(tokens)
    kept = count * PREFILL_GRAPH_BYTES + of_pieces * PIECES_BYTES
    return Cost(
        "graphs of prompts",
        step + staying + kept,
        f"a step of {tokens} tokens, {size_text(step)}; their embeddings, and the pages of {lines} lines, "
        f"{size_text(staying)}; and {size_text(PREFILL_GRAPH_BYTES)} of each of {count} for CUDA"
        + (f", {size_text(PIECES_BYTES)} of each of {of_pieces} steps in pieces" if of_pieces else ""),
    )
