"""One dial in, every size out: how a device's memory is shared between weights, work space and keys and values.

Knows prices (`costs`) and a device's numbers; touches no tensors. `memphi plan` prints what it says, the engine obeys.

    dial = context + weights + graphs + work space + pool + media

The work space is a share of what weights, context and graphs leave, capped by what the largest steps could use, and
never below what the smallest steps need; the pool gets the rest. A larger dial therefore never makes a smaller pool.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from memphi.config import AdapterForm, CacheFormat, EngineConfig, ModelConfig, Place, Placement, Scheme
from memphi.errors import DeviceError, DoesNotFitError, RequestError
from memphi.memory import costs
from memphi.memory.costs import GIB, MIB, Cost, size_text
from memphi.memory.devices import DeviceFacts
from memphi.memory.placement import PLACEMENT_WORDS, PlacedGroup, place_groups

STEP_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 128)
ROWS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
MOST_WINDOWS = 8
SHARED_STEP_TOKENS = {(10, 0): 4096, (9, 0): 4096, (8, 0): 1024}
FEWEST_SHARED_STEP_TOKENS = 512
"""Prompt tokens in a step that also decodes: enough to keep a GPU busy, few enough that answers keep flowing. By the
compute capability of data-centre cards: an H100 takes about 50 ms for so many, and its host as long to launch them. All
others get the fewest."""
TYPICAL_TOKENS = 1024
"""A request with a picture and a short answer; so many rows run as fit at this length, and one always must."""
MOST_PAGES = 1 << 18
ENOUGH_TOKENS = 16384
"""Room for so many is worth more than exact keys and values: a page of print in full detail and its answer, or as many
typical requests as make good use of a GPU."""
WORK_SHARE = 3
"""The work space gets no more than one part in so many of what weights and context leave, unless steps need it."""
RESERVE_SHARE, RESERVE_BYTES = 20, 512 * MIB
GRAPHS_SHARE = 8
"""Graphs are for one row at least; for more, one part in so many of what is left beyond the least may go."""
ENCODER_PASSES = {"vision pass": "vision pass", "cropping": "vision pass", "audio pass": "audio pass"}
"""The kinds of encoder passes by their costs, of which one pass may have several."""
DECODER_STEPS = ("prefill chunk", "decode step", "mixed step")
"""The kinds of steps of which predictions are held against what is observed; a decoder step's scores are in each."""
AUTO_SCHEMES: tuple[Scheme, ...] = ("bf16", "int8", "int4")
"""What --scheme auto tries, from the exact to the small; fp8 has to be asked for."""
USEFUL_TOKENS = 10240
"""A scheme or placement is passed over that leaves less context: an A4 page in full detail, a question and its
answer."""
ASKED = "as asked for"
HOST_SHARE = 0.8
HOST_POOL_TOKENS = 32768
HOST_LARGEST = {"step_tokens": 2048, "rows": 64, "crops": 8}
"""A CPU gains nothing from larger steps, and they make it slow to answer."""


@dataclass(frozen=True)
class MemoryPlan:
    """Who may use how much; the six accounts add up to budget_bytes."""

    budget_bytes: int
    context_bytes: int
    weights_bytes: int
    graphs_bytes: int
    """Decode steps in CUDA graphs; 0 where there are none."""
    graph_rows: int
    """Rows at most of such a step."""
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


@dataclass(frozen=True)
class _Sizes:
    """What one step does at most."""

    step_tokens: int
    rows: int
    crops: int
    windows: int


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
        form = adapters or _adapter_form(device, engine, where)
        kept = replace(config, scheme=scheme), device, engine, dtype_bytes, form, reason, where
        return _choose_format(lambda cache_format: _Planner(*kept, cache_format).plan(), config, engine)

    def placements(scheme: Scheme) -> Sequence[Placement]:
        if placement is not None:
            return (placement,)
        can_shrink = config.scheme == "bf16" and engine.scheme == "auto" and scheme != AUTO_SCHEMES[-1]
        return _placements(device, engine, scheme, can_shrink)

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


def _choose_format(plan: Callable[[CacheFormat], MemoryPlan], config: ModelConfig, engine: EngineConfig) -> MemoryPlan:
    """Keys and values as they are, where that leaves room for enough tokens, else in int8; or as pinned."""
    if engine.cache_format != "auto" or not engine.kv_cache:
        return plan("plain" if engine.cache_format == "auto" else engine.cache_format)
    with suppress(DoesNotFitError):
        made = plan("plain")
        if made.context_tokens >= enough_tokens(config):
            return made
    return plan("int8")


def enough_tokens(config: ModelConfig) -> int:
    """From how many tokens on the pool of a plan keeps keys and values as they are."""
    return min(ENOUGH_TOKENS, config.language.max_tokens)


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


def _placements(
    device: DeviceFacts, engine: EngineConfig, scheme: Scheme, can_shrink: bool = False
) -> Sequence[Placement]:
    """Where weights may lie, the fastest first; towers and adapters share a room only where no smaller scheme is left.

    In 16 bits adapters stay, as columns of the weights they adapt: apart and on their way they would cost more time
    than fewer bits cost in exactness.
    """
    if engine.placement != "auto":
        return (engine.placement,)
    if device.kind != "cuda":
        return ("resident",)
    if scheme == "bf16" or engine.merge:
        return ("resident", "towers")
    return (
        ("resident", "towers", "adapters") if can_shrink else ("resident", "towers", "adapters", "shared", "streamed")
    )


def _adapter_form(device: DeviceFacts, engine: EngineConfig, placement: Placement) -> AdapterForm:
    """Packed ones cost a GPU a third of plain ones' time; a CPU gains little by them, and answers to text slow down.

    Those that come and go are by themselves: in one matrix, both would have to be there.
    """
    if engine.merge:
        return "merged"
    return "packed" if device.kind == "cuda" and placement in ("resident", "towers") else "plain"


def _preprocessing(device: DeviceFacts, engine: EngineConfig) -> Place:
    """A GPU makes crops and frames faster than a host; a CPU is the host, whose threads make them ahead of need."""
    if engine.preprocessing == "auto":
        return "device" if device.kind == "cuda" else "host"
    if engine.preprocessing == "device" and device.kind == "mps":
        raise DeviceError(f'{device.name} has no fp64, which log-mel frames need; use preprocessing="host"')
    return engine.preprocessing


def reserve_bytes(total_bytes: int) -> int:
    """What a card's memory is left to the screen and others where no dial says otherwise."""
    return max(total_bytes // RESERVE_SHARE, RESERVE_BYTES)


class _Planner:
    """One plan in the making."""

    def __init__(
        self,
        config: ModelConfig,
        device: DeviceFacts,
        engine: EngineConfig,
        dtype_bytes: int,
        adapters: AdapterForm,
        scheme_reason: str,
        placement: Placement,
        cache_format: CacheFormat,
    ) -> None:
        """The config's scheme is the plan's."""
        self.placement = placement
        self.config, self.device, self.engine, self.dtype_bytes = config, device, engine, dtype_bytes
        self.adapters, self.scheme_reason = adapters, scheme_reason
        self.cache_format: CacheFormat = cache_format
        self.preprocessing = _preprocessing(device, engine)
        self.most_tokens = config.language.max_tokens
        self.context = costs.context(device.kind, device.name)
        kept = config, dtype_bytes, adapters, placement
        rounding = (costs.weights_rounding(*kept),) if device.kind == "cuda" else ()
        self.weights = (*costs.placed_weights(*kept), *rounding)
        self.weights_bytes = _sum(self.weights)
        self.page_tokens = costs.page_tokens(cache_format)
        self.page = costs.page(config, dtype_bytes, self.page_tokens, cache_format)
        self.token_media_bytes = costs.media_embeddings(config, 1, dtype_bytes).bytes
        self.unit_bytes = self.page.bytes + self.page_tokens * self.token_media_bytes
        self.ladders = self._make_ladders()
        self.smallest = self._pick(lambda ladder: ladder[-1])
        self.largest = self._pick(lambda ladder: ladder[0])
        self.graph_rows = 1
        self.graphs = self._price_graphs(self.graph_rows)

    @property
    def fixed_bytes(self) -> int:
        return self.context.bytes + self.weights_bytes + _sum(self.graphs)

    def plan(self) -> MemoryPlan:
        dial_bytes, dial_reason = self._dial()
        least_bytes = self._least_bytes()
        if dial_bytes > self.device.free_bytes or least_bytes > dial_bytes:
            raise self._does_not_fit(least_bytes, dial_bytes)
        self._enlarge_graphs(dial_bytes - least_bytes)
        left_bytes = dial_bytes - self.fixed_bytes
        units = self._units(left_bytes)
        kept_bytes = units * self._kept_bytes
        workspace_bytes = left_bytes - kept_bytes
        if units == self._most_units:
            workspace_bytes = self._workspace_bytes(left_bytes, units)
        sizes = self._sizes(workspace_bytes, units)
        pages = units if self.engine.kv_cache else 0
        pool_bytes = pages * self.page.bytes
        result = MemoryPlan(
            budget_bytes=self.fixed_bytes + workspace_bytes + kept_bytes,
            context_bytes=self.context.bytes,
            weights_bytes=self.weights_bytes,
            graphs_bytes=_sum(self.graphs),
            graph_rows=self.graph_rows,
            workspace_bytes=workspace_bytes,
            pool_bytes=pool_bytes,
            media_bytes=kept_bytes - pool_bytes,
            page_bytes=self.page.bytes,
            page_tokens=self.page_tokens,
            cache_format=self.cache_format,
            pages=pages,
            context_tokens=self._context_tokens(units),
            rows=sizes.rows,
            step_tokens=sizes.step_tokens,
            shared_step_tokens=min(sizes.step_tokens, self._shared_step_tokens(sizes)),
            crops_per_pass=sizes.crops,
            windows_per_pass=sizes.windows,
            adapters=self.adapters,
            preprocessing=self.preprocessing,
            scheme=self.config.scheme,
            placement=self.placement,
            groups=place_groups(self.config, self.dtype_bytes, self.adapters, self.placement),
            reasons={},
            costs=(self.context, *self.weights, *self.graphs, *self._transients(sizes, units)),
        )
        return replace(result, reasons=self._reasons(result, dial_bytes, dial_reason))

    def _shared_step_tokens(self, sizes: "_Sizes") -> int:
        if not self.engine.kv_cache:
            return sizes.step_tokens
        return SHARED_STEP_TOKENS.get(self.device.capability or (0, 0), FEWEST_SHARED_STEP_TOKENS)

    def _price_graphs(self, rows: int) -> tuple[Cost, ...]:
        """For the longest sequence that any dial gives, so that a larger one never leaves less."""
        engine = self.engine
        if engine.kernels == "plain" or self.device.kind != "cuda" or not engine.kv_cache:
            return ()
        if self.placement == "streamed":
            return ()
        return (costs.graphs(self.config, rows, self.most_tokens, self.dtype_bytes, self.adapters),)

    def _enlarge_graphs(self, spare_bytes: int) -> None:
        """Give graphs of more rows a part of what a dial leaves beyond the least; so more of it never leaves less.

        Of no more than run at once, each of which has room in the pool.
        """
        price, least = self._price_graphs, _sum(self.graphs)
        most = self.largest.rows
        if len(self.ladders["rows"]) > 1:
            most = min(most, 1 + spare_bytes // (self._least_units * self._kept_bytes))
        for rows in range(most, self.graph_rows, -1):
            if _sum(price(rows)) - least <= spare_bytes // GRAPHS_SHARE:
                self.graph_rows, self.graphs = rows, price(rows)
                return

    # --- the dial ------------------------------------------------------------------------------------------------

    def _dial(self) -> tuple[int, str]:
        """What memphi may take in all, and why."""
        if self.engine.memory_bytes is not None:
            return self.engine.memory_bytes, "as asked for"
        free_bytes = self.device.free_bytes
        if self.device.kind == "cuda":
            reserve = reserve_bytes(self.device.total_bytes)
            return max(free_bytes - reserve, 0), (
                f"what is free, {size_text(free_bytes)}, less {size_text(reserve)} for the screen and others"
            )
        return int(free_bytes * HOST_SHARE), f"at most {HOST_SHARE:.0%} of the {size_text(free_bytes)} that are free"

    def _least_bytes(self) -> int:
        """The smallest dial that works: the smallest steps and one typical row."""
        units = self._least_units
        return self.fixed_bytes + units * self._kept_bytes + self._need_bytes(self.smallest, units)

    def _does_not_fit(self, least_bytes: int, dial_bytes: int) -> DoesNotFitError:
        device, needed = self.device, _rounded_up(least_bytes)
        if dial_bytes > device.free_bytes:
            return DoesNotFitError(
                f"--memory {size_text(dial_bytes)} is more than {device.name} has: {size_text(device.free_bytes)} of "
                f"its {size_text(device.total_bytes)} are free; give less, or leave it out"
            )
        parts = f"weights {size_text(self.weights_bytes)}, context {size_text(self.context.bytes)}, steps and a short "
        parts += f"conversation {size_text(least_bytes - self.fixed_bytes)}"
        parts += f", graphs {size_text(_sum(self.graphs))}" if self.graphs else ""
        way = self._smaller_scheme(dial_bytes)
        pins = f", or smaller sizes than {' and '.join(self.pins)}" if self.pins else ""
        cpu = "" if device.kind == "cpu" else ", or --device cpu with as much of the host's memory"
        return DoesNotFitError(
            f"the model does not fit: it needs at least {needed} ({parts}), and memphi may take "
            f"{size_text(dial_bytes)} of {device.name}; what would work: --memory {needed.replace(' ', '')} or more, "
            f"on a device that has it{way}{pins}{cpu}"
        )

    def _smaller_scheme(self, dial_bytes: int) -> str:
        """The first scheme under which it would fit, where another was asked for."""
        others = AUTO_SCHEMES if self.scheme_reason == ASKED else ()
        for scheme in others:
            config, where = replace(self.config, scheme=scheme), _placements(self.device, self.engine, scheme)[-1]
            form = _adapter_form(self.device, self.engine, where)
            other = _Planner(config, self.device, self.engine, self.dtype_bytes, form, "", where, self.cache_format)
            if other._least_bytes() <= dial_bytes:
                return f", or --scheme {scheme}"
        return ""

    # --- the pool ------------------------------------------------------------------------------------------------

    @property
    def _kept_bytes(self) -> int:
        """A unit is a page and its media embeddings; without a cache, one token's media embeddings."""
        return self.unit_bytes if self.engine.kv_cache else self.token_media_bytes

    @property
    def _least_units(self) -> int:
        tokens = min(TYPICAL_TOKENS, self.most_tokens)
        return -(-tokens // self.page_tokens) if self.engine.kv_cache else tokens

    @property
    def _most_units(self) -> int:
        if not self.engine.kv_cache:
            return self.most_tokens
        if self.device.kind == "cuda" or self.engine.memory_bytes is not None:
            return max(min(MOST_PAGES, self.largest.rows * -(-self.most_tokens // self.page_tokens)), self._least_units)
        return max(min(HOST_POOL_TOKENS, self.most_tokens) // self.page_tokens, self._least_units)

    def _context_tokens(self, units: int) -> int:
        return min(units * self.page_tokens if self.engine.kv_cache else units, self.most_tokens)

    def _units(self, left_bytes: int) -> int:
        """As many as leave the work space its share."""

        def fits(units: int) -> bool:
            return units * self._kept_bytes + self._workspace_bytes(left_bytes, units) <= left_bytes

        return _last(fits, self._least_units, self._most_units)

    # --- the work space ------------------------------------------------------------------------------------------

    def _workspace_bytes(self, left_bytes: int, units: int) -> int:
        share_bytes = min(left_bytes // WORK_SHARE, self._need_bytes(self.largest, units))
        return max(share_bytes, self._need_bytes(self.smallest, units))

    def _need_bytes(self, sizes: _Sizes, units: int) -> int:
        return _sum(self._transients(sizes, units)[-2:])

    def _transients(self, sizes: _Sizes, units: int) -> tuple[Cost, ...]:
        """What each kind of step takes, then the largest of them and what the allocator adds to it."""
        keys, all_keys = self._context_tokens(units), units * self.page_tokens
        tokens, rows, size = sizes.step_tokens, sizes.rows, self.dtype_bytes
        if not self.engine.kv_cache:
            tokens = keys if self.engine.step_tokens is None else tokens
        kept = (self.adapters, all_keys, self.cache_format)
        kinds = [
            costs.vision_pass(self.config, sizes.crops, size),
            costs.audio_pass(self.config, sizes.windows, size, self.preprocessing == "device"),
            costs.prefill_chunk(self.config, tokens, keys, size, rows, self.device.kind != "cuda", *kept),
            costs.logits(self.config, rows, tokens, size),
        ]
        if self.engine.kv_cache:
            kinds.insert(3, costs.decode_step(self.config, rows, keys, size, *kept))
        if self.graphs:  # Where kernels are wanted; whether there are any turns out later.
            pasts = costs.Pasts(keys, rows, keys, min(rows * keys, all_keys), keys, rows, 2 * rows)
            kinds.append(costs.kernel_step(self.config, tokens, pasts, size, self.adapters, self.cache_format))
        if self.preprocessing == "device":
            kinds.insert(1, costs.cropping(self.config, sizes.crops, size))
        if self.adapters == "merged":
            kinds.append(costs.merging(self.config, size))
        if self.config.scheme != "bf16":
            kinds.append(costs.quantising(self.config, size))
        kinds = [self._as_learned(cost) for cost in kinds]
        peak = max(kinds, key=lambda cost: cost.bytes)
        largest = Cost("largest step", peak.bytes, f"the {peak.name}; steps come one after the other")
        return (*kinds, largest, costs.allocator_rounding(self.device.kind, peak.bytes))

    def _as_learned(self, cost: Cost) -> Cost:
        """A step's cost, corrected by what was seen on this device."""
        kinds = (ENCODER_PASSES[cost.name],) if cost.name in ENCODER_PASSES else DECODER_STEPS
        corrected = max(self.device.learned.price(kind, cost.bytes) for kind in kinds)
        if corrected == cost.bytes:
            return cost
        excess = size_text(corrected - cost.bytes)
        return Cost(cost.name, corrected, f"{cost.formula}, and {excess} that it took beyond this on this device")

    # --- what a step does ----------------------------------------------------------------------------------------

    def _make_ladders(self) -> dict[str, Sequence[int]]:
        """The sizes that each thing may have, largest first; a pin is its only one."""
        engine = self.engine
        pins = {
            "rows": engine.rows,
            "step_tokens": engine.step_tokens,
            "crops": engine.crops_per_pass,
            "windows": engine.windows_per_pass,
        }
        self.pins = [f"{name} = {pin}" for name, pin in pins.items() if pin is not None]
        ladders: dict[str, Sequence[int]] = {
            "rows": ROWS if engine.kv_cache else (1,),
            "step_tokens": STEP_TOKENS,
            "crops": range(self.config.vision.max_crops + 1, 0, -1),
            "windows": range(MOST_WINDOWS, 0, -1),
        }
        if self.device.kind != "cuda":
            ladders |= {name: [n for n in ladders[name] if n <= most] for name, most in HOST_LARGEST.items()}
        return {name: ladder if (pin := pins[name]) is None else (pin,) for name, ladder in ladders.items()}

    def _pick(self, choose: Callable[[Sequence[int]], int]) -> _Sizes:
        return _Sizes(**{name: choose(ladder) for name, ladder in self.ladders.items()})

    def _sizes(self, workspace_bytes: int, units: int) -> _Sizes:
        """The largest of each that the work space holds; steps come one after the other, so each is chosen alone."""
        sizes = self.smallest
        for name, ladder in self.ladders.items():
            if name == "rows":
                ladder = self._rows_that_fit(ladder, units)
            if name == "step_tokens" and not self.engine.kv_cache:
                ladder = (self.engine.step_tokens or units,)
            larger = (replace(sizes, **{name: n}) for n in ladder)
            sizes = next(s for s in larger if self._need_bytes(s, units) <= workspace_bytes)
        return sizes

    def _rows_that_fit(self, ladder: Sequence[int], units: int) -> Sequence[int]:
        """Those that have room for a typical row each."""
        if len(ladder) == 1:
            return ladder
        return [n for n in ladder if n * self._least_units <= units]

    # --- why -----------------------------------------------------------------------------------------------------

    def _reasons(self, plan: MemoryPlan, dial_bytes: int, dial_reason: str) -> dict[str, str]:
        transients = {cost.name: cost for cost in plan.costs}
        largest = transients["largest step"]
        if plan.budget_bytes < dial_bytes:
            dial_reason = f"more would bring nothing; {dial_reason}"
        reasons = {
            "budget_bytes": dial_reason,
            "context_bytes": self.context.formula,
            "weights_bytes": f"{_numbers(self.config, plan.adapters):,} parameters {self._stored_words()}"
            + (f", the {self.engine.merge} adapter merged into them" if self.engine.merge else "")
            + (", some of them on the host" if self.placement != "resident" else "")
            + (", and the allocator's rounding" if self.device.kind == "cuda" else ""),
            "graphs_bytes": self.graphs[0].formula if self.graphs else "none",
            "graph_rows": f"as many as may run at once, and as 1/{GRAPHS_SHARE} of what is left beyond the least has "
            "room for",
            "adapters": self._reason_of_adapters(),
            "preprocessing": self._reason_of_preprocessing(),
            "scheme": self.scheme_reason,
            "placement": "",  # Told by who chose it.
            "workspace_bytes": f"{size_text(largest.bytes)} for {largest.formula}; the rest is the "
            "allocator's rounding and slack",
            "pool_bytes": f"{plan.pages} pages of {plan.page_tokens} tokens: what is left",
            "media_bytes": "embeddings of pictures and sound, for as many tokens as the pool holds",
            "page_bytes": self.page.formula,
            "page_tokens": "at full size the keys and values of so many are what CUDA maps at once",
            "cache_format": self._reason_of_format(),
            "pages": f"{size_text(plan.pool_bytes)} in pages of {size_text(plan.page_bytes)}",
            "context_tokens": "the model's own limit"
            if plan.context_tokens == self.most_tokens
            else f"{plan.pages} pages x {plan.page_tokens} tokens, shared by all rows",
            "shared_step_tokens": "so that answers in progress keep flowing while a prompt is computed",
        }
        for field, cost, ladder in (
            ("step_tokens", "prefill chunk", "step_tokens"),
            ("rows", "logits", "rows"),
            ("crops_per_pass", "vision pass", "crops"),
            ("windows_per_pass", "audio pass", "windows"),
        ):
            reasons[field] = self._reason_of_size(getattr(plan, field), transients[cost], self.ladders[ladder])
        rows = self._rows_that_fit(self.ladders["rows"], plan.pages)
        if plan.rows == rows[0] < self.ladders["rows"][0]:
            reasons["rows"] = f"the pool has room for so many of {min(TYPICAL_TOKENS, self.most_tokens)} tokens each"
        if not self.engine.kv_cache:
            reasons |= {
                "pool_bytes": "no cache (kv_cache=False): every step computes its rows anew",
                "pages": "no cache",
                "context_tokens": "the longest sequence that a step can compute whole",
                "step_tokens": "a step computes a whole sequence" if self.engine.step_tokens is None else "as pinned",
                "shared_step_tokens": "as step_tokens",
            }
        return reasons

    def _stored_words(self) -> str:
        if self.config.scheme == "bf16":
            return f"of {self.dtype_bytes} bytes"
        other = (
            "" if self.config.scheme == self.config.other_scheme else f", other linears in {self.config.other_scheme}"
        )
        return f"in {self.config.scheme}{other}, what is no matrix in {self.dtype_bytes} bytes"

    def _reason_of_adapters(self) -> str:
        reasons = {
            "plain": "weights by themselves, which only the requests that use them pay for",
            "packed": "beside the weights they adapt, so that one product computes both; the bytes are the same",
            "merged": f"{self.engine.merge} is part of the weights and costs nothing; requests without it are refused",
        }
        return reasons[self.adapters]

    def _reason_of_preprocessing(self) -> str:
        if self.preprocessing == "host":
            return "crops and log-mel frames are made ahead of need by the host's threads"
        return (
            "pictures and sound are decoded on the host; crops and log-mel frames are made of them here, just in time"
        )

    def _reason_of_format(self) -> str:
        if self.engine.cache_format != "auto":
            return "as pinned"
        if self.cache_format == "plain":
            return "keys and values as the model computes them"
        return f"in the model's own format there would be room for fewer than {enough_tokens(self.config)} tokens"

    def _reason_of_size(self, chosen: int, cost: Cost, ladder: Sequence[int]) -> str:
        takes = f"the {cost.name} takes {size_text(cost.bytes)}"
        if len(ladder) == 1:
            return f"as pinned; {takes}"
        more = "the most that is worth having" if chosen == ladder[0] else "more would not fit the work space"
        return f"{more}; {takes}"


def _last(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from low to high that fits; low does, and what fits, fits below it too."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rounded_up(n_bytes: int) -> str:
    """In GiB with one decimal, never less than it is; below 1 GiB in whole MiB."""
    if n_bytes < GIB:
        return f"{-(-n_bytes // MIB)} MiB"
    return f"{-(-10 * n_bytes // GIB) / 10:.1f} GiB"


def _sum(items: Iterable[Cost]) -> int:
    return sum(cost.bytes for cost in items)


def _numbers(config: ModelConfig, form: AdapterForm) -> int:
    return sum(size * count for tensors in costs.weight_tensors(config, form).values() for size, count in tensors)
