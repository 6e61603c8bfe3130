"""What a plan says: every size that follows from the one dial, and why it is what it is."""

from dataclasses import dataclass

from memphi.config import AdapterForm, CacheFormat, Place, Placement, Scheme
from memphi.memory.costs import Cost
from memphi.memory.placement import PlacedGroup


@dataclass(frozen=True)
class MemoryPlan:
    """Who may use how much; the six accounts add up to budget_bytes."""

    budget_bytes: int
    context_bytes: int
    weights_bytes: int
    graphs_bytes: int
    """Steps in CUDA graphs; 0 where there are none."""
    graph_rows: int
    """Rows at most of a decode step in one."""
    graph_tokens: int
    """Tokens at most of a step of prompts in one; 0: they go without."""
    workspace_bytes: int
    pool_bytes: int
    media_bytes: int
    page_bytes: int
    page_tokens: int
    cache_format: CacheFormat
    """How the pool keeps keys and values."""
    pages: int
    context_tokens: int
    """The longest sequence that fits alone, its answer included."""
    rows: int
    step_tokens: int
    shared_step_tokens: int
    """Prefill tokens in a step that also decodes."""
    crops_per_pass: int
    windows_per_pass: int
    adapters: AdapterForm
    """How they are kept."""
    preprocessing: Place
    """Where crops and log-mel frames are made of decoded media."""
    scheme: Scheme
    """How the weights are kept."""
    placement: Placement
    """What of them lies on the host until it is needed."""
    groups: tuple[PlacedGroup, ...]
    """The map: where each group of the weights lies, and why."""
    reasons: dict[str, str]
    """Why each number is what it is, by its name."""
    costs: tuple[Cost, ...]
