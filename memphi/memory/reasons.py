"""A plan's numbers in words: why each is what it is."""

from collections.abc import Sequence

from memphi.config import AdapterForm, ModelConfig
from memphi.memory import costs
from memphi.memory.choices import enough_tokens
from memphi.memory.costs import Cost, size_text
from memphi.memory.plan import MemoryPlan
from memphi.memory.sizing import GRAPHS_SHARE, PREFILLS_SHARE, TYPICAL_TOKENS, Sizing


def reasons(sizing: Sizing, plan: MemoryPlan, dial_reason: str) -> dict[str, str]:
    """Why each number of a plan is what it is, by its name."""
    transients = {cost.name: cost for cost in plan.costs}
    largest = transients["largest step"]
    told = {
        "budget_bytes": dial_reason,
        "context_bytes": sizing.context.formula,
        "weights_bytes": f"{_numbers(sizing.config, plan.adapters):,} parameters {_stored_words(sizing)}"
        + (f", the {sizing.engine.merge} adapter merged into them" if sizing.engine.merge else "")
        + (", some of them on the host" if sizing.placement != "resident" else "")
        + (", and the allocator's rounding" if sizing.device.kind == "cuda" else ""),
        "graphs_bytes": "; for prompts: ".join(cost.formula for cost in sizing.graphs) or "none",
        "graph_rows": f"as many as may run at once, and as 1/{GRAPHS_SHARE} of what is left beyond the least has "
        "room for",
        "graph_tokens": f"as many as 1/{PREFILLS_SHARE} of what is left beyond the least has room for",
        "adapters": _reason_of_adapters(sizing),
        "preprocessing": _reason_of_preprocessing(sizing),
        "scheme": sizing.scheme_reason,
        "placement": "",  # Told by who chose it.
        "workspace_bytes": f"{size_text(largest.bytes)} for {largest.formula}; the rest is the "
        "allocator's rounding and slack",
        "pool_bytes": f"{plan.pages} pages of {plan.page_tokens} tokens: what is left",
        "media_bytes": "embeddings of pictures and sound, for as many tokens as the pool holds",
        "page_bytes": sizing.page.formula,
        "page_tokens": "at full size the keys and values of so many are what CUDA maps at once",
        "cache_format": _reason_of_format(sizing),
        "pages": f"{size_text(plan.pool_bytes)} in pages of {size_text(plan.page_bytes)}",
        "context_tokens": "the model's own limit"
        if plan.context_tokens == sizing.most_tokens
        else f"{plan.pages} pages x {plan.page_tokens} tokens, shared by all rows",
        "shared_step_tokens": "so that answers in progress keep flowing while a prompt is computed",
    }
    for field, cost, ladder in (
        ("step_tokens", "prefill chunk", "step_tokens"),
        ("rows", "logits", "rows"),
        ("crops_per_pass", "vision pass", "crops"),
        ("windows_per_pass", "audio pass", "windows"),
    ):
        told[field] = _reason_of_size(getattr(plan, field), transients[cost], sizing.ladders[ladder])
    rows = sizing.rows_that_fit(sizing.ladders["rows"], plan.pages)
    if plan.rows == rows[0] < sizing.ladders["rows"][0]:
        told["rows"] = f"the pool has room for so many of {min(TYPICAL_TOKENS, sizing.most_tokens)} tokens each"
    if not sizing.engine.kv_cache:
        told |= {
            "pool_bytes": "no cache (kv_cache=False): every step computes its rows anew",
            "pages": "no cache",
            "context_tokens": "the longest sequence that a step can compute whole",
            "step_tokens": "a step computes a whole sequence" if sizing.engine.step_tokens is None else "as pinned",
            "shared_step_tokens": "as step_tokens",
        }
    return told


def _stored_words(sizing: Sizing) -> str:
    if sizing.config.scheme == "bf16":
        return f"of {sizing.dtype_bytes} bytes"
    other = (
        "" if sizing.config.scheme == sizing.config.other_scheme else f", other linears in {sizing.config.other_scheme}"
    )
    return f"in {sizing.config.scheme}{other}, what is no matrix in {sizing.dtype_bytes} bytes"


def _reason_of_adapters(sizing: Sizing) -> str:
    reasons = {
        "plain": "weights by themselves, which only the requests that use them pay for",
        "packed": "beside the weights they adapt, so that one product computes both; the bytes are the same",
        "merged": f"{sizing.engine.merge} is part of the weights and costs nothing; requests without it are refused",
    }
    return reasons[sizing.adapters]


def _reason_of_preprocessing(sizing: Sizing) -> str:
    if sizing.preprocessing == "host":
        return "crops and log-mel frames are made ahead of need by the host's threads"
    return "pictures and sound are decoded on the host; crops and log-mel frames are made of them here, just in time"


def _reason_of_format(sizing: Sizing) -> str:
    if sizing.engine.cache_format != "auto":
        return "as pinned"
    if sizing.cache_format == "plain":
        return "keys and values as the model computes them"
    return f"in the model's own format there would be room for fewer than {enough_tokens(sizing.config)} tokens"


def _reason_of_size(chosen: int, cost: Cost, ladder: Sequence[int]) -> str:
    takes = f"the {cost.name} takes {size_text(cost.bytes)}"
    if len(ladder) == 1:
        return f"as pinned; {takes}"
    more = "the most that is worth having" if chosen == ladder[0] else "more would not fit the work space"
    return f"{more}; {takes}"


def _numbers(config: ModelConfig, form: AdapterForm) -> int:
    return sum(size * count for tensors in costs.weight_tensors(config, form).values() for size, count in tensors)
