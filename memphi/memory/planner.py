"""One dial in, every size out: which scheme, placement and cache format a device's memory is shared out under.

Knows prices (`costs`) and a device's numbers; touches no tensors. `memphi plan` prints what it says, the engine obeys.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from memphi.config import AdapterForm, CacheFormat, EngineConfig, ModelConfig, Placement, Scheme
from memphi.errors import DeviceError, DoesNotFitError, RequestError
from memphi.memory.choices import ASKED, AUTO_SCHEMES, USEFUL_TOKENS, adapter_form, enough_tokens, placements_of
from memphi.memory.devices import DeviceFacts
from memphi.memory.placement import PLACEMENT_WORDS
from memphi.memory.plan import MemoryPlan
from memphi.memory.reasons import reasons
from memphi.memory.sizing import Sizing


def make_plan(
    config: ModelConfig,
    device: DeviceFacts,
    engine: EngineConfig,
    dtype_bytes: int = 2,
    adapters: AdapterForm | None = None,
    placement: Placement | None = None,
) -> MemoryPlan:
    """Share the dial out, and choose scheme and placement.

    Raises DoesNotFitError, with what is needed and what would work, for a dial too small, and RequestError for a scheme
    or a merged adapter that quantised weights cannot be given.

    adapters says how those of a model that is loaded already are kept, and placement where its weights lie; None leaves
    that to the plan. The config has the scheme of the folder's weights, or of the loaded model's; where that is bf16,
    these can be quantised.
    """
    if engine.cache_format == "fp8" and device.kind == "mps":
        raise DeviceError(f"{device.name} has no numbers in fp8; --cache-format int8 works there")
    if adapters is not None and placement is None:
        placement = "resident"

    def plan(scheme: Scheme, where: Placement, reason: str) -> MemoryPlan:
        form = adapters or adapter_form(device, engine, where)
        kept = replace(config, scheme=scheme), device, engine, dtype_bytes, form, reason, where
        return _choose_format(lambda cache_format: _with_reasons(Sizing(*kept, cache_format)), config, engine)

    def placements(scheme: Scheme) -> Sequence[Placement]:
        if placement is not None:
            return (placement,)
        can_shrink = config.scheme == "bf16" and engine.scheme == "auto" and scheme != AUTO_SCHEMES[-1]
        return placements_of(device, engine, scheme, can_shrink)

    useful_tokens = min(USEFUL_TOKENS, config.language.max_tokens)
    if config.scheme != "bf16":
        if engine.scheme not in ("auto", config.scheme):
            raise RequestError(
                f"these weights are in {config.scheme} and cannot be made {engine.scheme}; leave --scheme out, or "
                "give the folder that they were made from"
            )
        if engine.merge and adapters is None:
            raise RequestError(
                f"these weights are in {config.scheme}, into which no adapter can be merged; leave --merge out, or "
                "give the folder that they were made from"
            )
        return _choose(plan, (config.scheme,), placements, useful_tokens, "as the weights are stored")
    if engine.scheme == "auto":
        return _choose(plan, AUTO_SCHEMES, placements, useful_tokens)
    return _choose(plan, (engine.scheme,), placements, useful_tokens, ASKED)


def _with_reasons(sizing: Sizing) -> MemoryPlan:
    plan, dial_reason = sizing.plan()
    return replace(plan, reasons=reasons(sizing, plan, dial_reason))


def _choose_format(plan: Callable[[CacheFormat], MemoryPlan], config: ModelConfig, engine: EngineConfig) -> MemoryPlan:
    """Keys and values as they are, where that leaves room for enough tokens, else in int8; or as pinned."""
    if engine.cache_format != "auto" or not engine.kv_cache:
        return plan("plain" if engine.cache_format == "auto" else engine.cache_format)
    with suppress(DoesNotFitError):
        made = plan("plain")
        if made.context_tokens >= enough_tokens(config):
            return made
    return plan("int8")


def _choose(
    plan: Callable[[Scheme, Placement, str], MemoryPlan],
    schemes: Sequence[Scheme],
    placements: Callable[[Scheme], Sequence[Placement]],
    useful_tokens: int,
    scheme_reason: str | None = None,
) -> MemoryPlan:
    """The first scheme, and under it the first placement, that leaves so many tokens of context; where none does, the
    last that fits. Answers come before speed: weights are moved before they are made smaller.

    scheme_reason tells of a scheme that was not chosen. Raises the last one's DoesNotFitError.
    """
    passed: list[str] = []
    last: MemoryPlan | None = None
    refusal: DoesNotFitError | None = None
    for scheme in schemes:
        moved: list[str] = []
        told = ""
        for placement in placements(scheme):
            if placement == "streamed" and last is not None:
                continue  # So slow that it is taken for any context at all, and for no more of it.
            try:
                made = plan(scheme, placement, scheme_reason or "")
            except DoesNotFitError as error:
                refusal, told = error, "does not fit"
            else:
                refusal, told = None, _room_words(made.context_tokens, useful_tokens)
                why_scheme = scheme_reason or "; ".join((*passed, f"{scheme} {told}"))
                why_placement = "; ".join((*moved, f"{PLACEMENT_WORDS[placement]} {told}"))
                last = replace(made, reasons=made.reasons | {"scheme": why_scheme, "placement": why_placement})
                if made.context_tokens >= useful_tokens:
                    return last
            moved.append(f"{PLACEMENT_WORDS[placement]} {_only(told)}")
        passed.append(f"{scheme} {_only(told)}")
    if last is None:
        assert refusal is not None
        raise refusal
    return last


def _room_words(context_tokens: int, useful_tokens: int) -> str:
    enough = context_tokens >= useful_tokens
    return (
        f"leaves room for {useful_tokens} tokens of context" if enough else f"leaves {context_tokens} tokens of context"
    )


def _only(words: str) -> str:
    return words.replace("leaves ", "leaves only ")
