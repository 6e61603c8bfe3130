"""What a device takes beyond tensors: its context, and what its allocator loses."""

from memphi.memory.costs.cost import MIB, Cost

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
