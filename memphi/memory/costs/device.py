"""What a device takes beyond tensors: its context, CUDA graphs, and what its allocator loses."""

from memphi.config import AdapterForm, ModelConfig
from memphi.memory.costs.cached import PAGE_TOKENS
from memphi.memory.costs.cost import MIB, Cost, size_text
from memphi.memory.costs.products import kernel_product_bytes
from memphi.memory.costs.sizes import all_ranks, qkv_size
from memphi.memory.costs.steps import GRAPH_PROGRAMS, METADATA_BYTES

GRAPHS_BYTES = 128 * MIB
"""What CUDA keeps of all graphs, some hundred launches each, and cuBLAS' work space for them."""
PIECE_SCORES = 2048
"""Scores of a row in a graph that the likeliest id is first looked for among."""
CONTEXT_BYTES = {"cuda": 768 * MIB, "mps": 600 * MIB, "cpu": 400 * MIB}
MEASURED_CONTEXTS = {"H100": 800 * MIB, "H200": 800 * MIB}
"""The CUDA context with kernels and libraries, by a word of the device's name: up to 779 MiB after mixed requests."""


def context(kind: str, name: str) -> Cost:
    """What a device holds before any tensor: the CUDA context and libraries; on a CPU, Python and torch."""
    measured = next((n_bytes for word, n_bytes in MEASURED_CONTEXTS.items() if word in name), None)
    if kind == "cpu":
        return Cost("context", CONTEXT_BYTES["cpu"], "Python, torch and their libraries (measured on Linux)")
    if measured is not None:
        return Cost("context", measured, "the CUDA context, kernels and libraries (measured on this card)")
    return Cost(
        "context", CONTEXT_BYTES[kind], "the device's context, kernels and libraries (an estimate: not measured)"
    )


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


def allocator_rounding(kind: str, peak_bytes: int) -> Cost:
    """What an allocator needs beyond the tensors' own bytes (an assumption, held against what is measured)."""
    if kind == "cuda":
        return Cost(
            "allocator",
            peak_bytes // 8 + 32 * MIB,
            "an eighth of the largest step and 32 MiB: PyTorch's blocks come from segments of 2 MiB, of 20 MiB up to "
            "10 MiB, and above that rounded up to 2 MiB, and pieces too small to serve lie between them (assumed)",
        )
    return Cost("allocator", peak_bytes // 16 + 16 * MIB, "a sixteenth of the largest step and 16 MiB (assumed)")
