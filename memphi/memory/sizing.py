"""Every size under one scheme, placement and cache format: how a dial is shared out.

    dial = context + weights + graphs + work space + pool + media

The work space is a share of what weights, context and graphs leave, capped by what the largest steps could use, and
never below what the smallest steps need; the pool gets the rest. A larger dial therefore never makes a smaller pool.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from memphi.config import AdapterForm, CacheFormat, EngineConfig, ModelConfig, Placement
from memphi.errors import DoesNotFitError
from memphi.memory import costs
from memphi.memory.choices import ASKED, AUTO_SCHEMES, adapter_form, placements_of, preprocessing_place
from memphi.memory.costs import GIB, MIB, Cost, size_text
from memphi.memory.devices import DeviceFacts
from memphi.memory.placement import place_groups
from memphi.memory.plan import MemoryPlan

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
WORK_SHARE = 3
"""The work space gets no more than one part in so many of what weights and context leave, unless steps need it."""
RESERVE_SHARE, RESERVE_BYTES = 20, 512 * MIB
GRAPHS_SHARE = 8
"""Graphs are for one row at least; for more, one part in so many of what is left beyond the least may go."""
PREFILLS_SHARE = 16
"""Graphs of prompts get one part in so many of what is left beyond the least, once that is enough for the smallest;
until then every byte beyond the rest, so that a larger dial never leaves less for the pool."""
ENCODER_PASSES = {"vision pass": "vision pass", "cropping": "vision pass", "audio pass": "audio pass"}
"""The kinds of encoder passes by their costs, of which one pass may have several."""
DECODER_STEPS = ("prefill chunk", "decode step", "mixed step")
"""The kinds of steps that a plan leaves room for as they were observed; a decoder step's scores are in each. Of graphs,
whose tensors have their places, observations are only told."""
HOST_SHARE = 0.8
HOST_POOL_TOKENS = 32768
HOST_LARGEST = {"step_tokens": 2048, "rows": 64, "crops": 8}
"""A CPU gains nothing from larger steps, and they make it slow to answer."""


@dataclass(frozen=True)
class Sizes:
    """What one step does at most."""

    step_tokens: int
    rows: int
    crops: int
    windows: int


def reserve_bytes(total_bytes: int) -> int:
    """What a card's memory is left to the screen and others where no dial says otherwise."""
    return max(total_bytes // RESERVE_SHARE, RESERVE_BYTES)


class Sizing:
    """One plan in the making: `plan` makes it, `reasons` tells why."""

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
        self.preprocessing = preprocessing_place(device, engine)
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
        self.graph_tokens = 0

    @property
    def fixed_bytes(self) -> int:
        return self.context.bytes + self.weights_bytes + _sum(self.graphs)

    def plan(self) -> tuple[MemoryPlan, str]:
        """The plan, which gives no reasons yet, and why its dial is what it is. Raises DoesNotFitError."""
        dial_bytes, dial_reason = self._dial()
        least_bytes = self._least_bytes()
        if dial_bytes > self.device.free_bytes or least_bytes > dial_bytes:
            raise self._does_not_fit(least_bytes, dial_bytes)
        self._enlarge_graphs(dial_bytes - least_bytes)
        self._add_prefills(dial_bytes - least_bytes)
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
            graph_tokens=min(self.graph_tokens, sizes.step_tokens),
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
        if result.budget_bytes < dial_bytes:
            dial_reason = f"more would bring nothing; {dial_reason}"
        return result, dial_reason

    def _shared_step_tokens(self, sizes: "Sizes") -> int:
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

    def _add_prefills(self, spare_bytes: int) -> None:
        """Give graphs of prompts their share of what a dial leaves beyond the least, for as many tokens as it holds."""

        def price(steps: int) -> Cost:
            tokens = steps * costs.LEAST_PREFILL_TOKENS
            return costs.prefill_graphs(self.config, tokens, self.dtype_bytes, self.adapters, self.cache_format)

        most = costs.most_graph_tokens(self.config.scheme, self.device.capability)
        most = min(self.largest.step_tokens, most) // costs.LEAST_PREFILL_TOKENS
        if not (self.graphs and most):
            return
        beyond_bytes = spare_bytes - (PREFILLS_SHARE - 1) * price(1).bytes
        share_bytes = max(min(spare_bytes // PREFILLS_SHARE, beyond_bytes), 0)
        if not share_bytes:
            return
        steps = _last(lambda steps: not steps or price(steps).bytes <= share_bytes, 0, most)
        self.graph_tokens = steps * costs.LEAST_PREFILL_TOKENS
        found = price(max(steps, 1))
        self.graphs = (*self.graphs, Cost(found.name, min(share_bytes, price(most).bytes), found.formula))

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
            config, where = replace(self.config, scheme=scheme), placements_of(self.device, self.engine, scheme)[-1]
            form = adapter_form(self.device, self.engine, where)
            other = Sizing(config, self.device, self.engine, self.dtype_bytes, form, "", where, self.cache_format)
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

    def _need_bytes(self, sizes: Sizes, units: int) -> int:
        return _sum(self._transients(sizes, units)[-2:])

    def _transients(self, sizes: Sizes, units: int) -> tuple[Cost, ...]:
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

    def _pick(self, choose: Callable[[Sequence[int]], int]) -> Sizes:
        return Sizes(**{name: choose(ladder) for name, ladder in self.ladders.items()})

    def _sizes(self, workspace_bytes: int, units: int) -> Sizes:
        """The largest of each that the work space holds; steps come one after the other, so each is chosen alone."""
        sizes = self.smallest
        for name, ladder in self.ladders.items():
            if name == "rows":
                ladder = self.rows_that_fit(ladder, units)
            if name == "step_tokens" and not self.engine.kv_cache:
                ladder = (self.engine.step_tokens or units,)
            larger = (replace(sizes, **{name: n}) for n in ladder)
            sizes = next(s for s in larger if self._need_bytes(s, units) <= workspace_bytes)
        return sizes

    def rows_that_fit(self, ladder: Sequence[int], units: int) -> Sequence[int]:
        """Those that have room for a typical row each."""
        if len(ladder) == 1:
            return ladder
        return [n for n in ladder if n * self._least_units <= units]


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
