"""The engine: requests in, answers out. Plans the memory, loads a model, and runs the loop in a thread of its own."""

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from memphi.cache.media import MediaCache
from memphi.cache.pages import Pages
from memphi.cache.pool import PagePool, make_pool
from memphi.checkpoint.filling import loading_examples
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
from memphi.checkpoint.random import random_model
from memphi.checkpoint.reader import Progress
from memphi.config import DEFAULT_MODEL, EngineConfig
from memphi.engine.device import DtypeName, capping_allocator, current, device_facts, find_device, find_dtype
from memphi.engine.elastic import Elastic
from memphi.engine.facade import DeviceEngine, EngineState, Facade
from memphi.engine.gauge import Gauge
from memphi.engine.graphs import Graphs
from memphi.engine.loop import Loop
from memphi.engine.messages import Loading
from memphi.engine.preparation import Preparation, prepare_sequence
from memphi.engine.pressure import bounds_of
from memphi.engine.prices import draft_step_tokens
from memphi.engine.recovery import LOADING_ADVICE, told_plainly
from memphi.engine.reservations import Reservations
from memphi.engine.runner import Runner
from memphi.engine.scheduler import Naming, Scheduler, StepLimits
from memphi.engine.settings import AllocatorName, use_allocator
from memphi.engine.spread import SpreadEngine, start
from memphi.engine.stats import Stats
from memphi.engine.worker import ThreadWorker, wake
from memphi.inputs.prompt import PREPROCESSING_VERSION
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.budget import Budget
from memphi.memory.costs import host_media
from memphi.memory.devices import this_machine
from memphi.memory.plan import MemoryPlan
from memphi.memory.planner import make_plan
from memphi.model.attention import AttentionName, select_attention
from memphi.model.kernels.codes import why_not_kept
from memphi.model.kernels.launch import why_not_available
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.host import use_host_products
from memphi.sampling.grammar import Grammars

HOST_MEDIA_SHARE = 4
"""Decoded attachments of all engines may take one part in so many of the host's free memory."""


class Engine(Facade):
    """A loaded model that answers requests of any input modes, many at once, within its plan's memory."""

    def __init__(
        self, model: Phi4MM, tokenizer: Tokenizer, config: EngineConfig | None = None, plan: MemoryPlan | None = None
    ) -> None:
        """Without a plan one is made for the device that the model is on, as `load` does before it loads.

        Whether an adapter is merged, the scheme and the placement the model knows, whatever config says.
        """
        self.model = model
        self.config = config = replace(config or EngineConfig(), merge=model.merged, scheme=model.config.scheme)
        self.plan = plan or make_plan(
            model.config, device_facts(model.device), config, model.dtype.itemsize, model.adapter_form, model.placement
        )
        inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.loop = make_loop(model, tokenizer, self.plan, config, wake(inbox))
        worker = ThreadWorker(self.loop, inbox, bounds_of(self.plan, config, model.config))
        super().__init__(worker, model.config, tokenizer)

    @property
    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self.loop.stats

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def state(self) -> EngineState:
        return "ready"

    @property
    def engines(self) -> tuple[DeviceEngine]:
        """The one there is, for who watches it."""
        return (self,)


def make_loop(
    model: Phi4MM,
    tokenizer: Tokenizer,
    plan: MemoryPlan,
    config: EngineConfig,
    on_ready: Callable[[], None],
    engines: int = 1,
) -> Loop:
    """The loop of a model under a plan; on_ready is called from other threads when `step` has something new to do.

    engines is how many share the host's memory, this one among them.
    """
    language = model.config.language
    # Reserved at its largest: page numbers never go beyond. Only what is in use takes memory.
    pool = (
        make_pool(language, plan.pages, model.dtype, model.device, plan.page_tokens, plan.cache_format)
        if config.kv_cache
        else None
    )
    forbidden = ~torch.from_numpy(tokenizer.known_ids(language.vocab_size)).to(model.device)
    graphs = make_graphs(model, pool, plan, config, forbidden)
    embedding_bytes = language.hidden_size * model.dtype.itemsize
    scheduler = Scheduler(
        model.config,
        step_limits(plan, config, model),
        _reservations(plan),
        MediaCache(plan.media_bytes),
        Naming(
            f"{plan.cache_format} of {model.dtype}",
            f"{model.dtype} {model.config.scheme}",
            PREPROCESSING_VERSION,
        ),
        embedding_bytes,
        config.kv_cache,
    )
    grammars = Grammars(tokenizer, model.config)
    preparation = Preparation(
        lambda sequence: prepare_sequence(sequence, model.config, tokenizer, grammars, plan.preprocessing),
        lambda sequence: host_media(sequence.footprint, model.config, plan.preprocessing).bytes,
        this_machine().free_bytes // HOST_MEDIA_SHARE // engines,
        on_ready,
    )
    learned = device_facts(model.device).learned
    gauge = Gauge(model.device, pool, plan.budget_bytes - plan.context_bytes, learned)
    gauge.cap()
    runner = Runner(model, pool, forbidden, gauge, graphs, scheduler.upcoming_pages)
    watches_others = model.device.type == "cuda" and config.memory_bytes is None
    free_memory = (lambda: torch.cuda.mem_get_info(model.device)) if watches_others else None
    workspace_bytes = plan.workspace_bytes + plan.graphs_bytes if watches_others else 0
    elastic = Elastic(scheduler, pool, gauge, config.idle_seconds, free_memory, graphs, workspace_bytes)
    return Loop(runner, scheduler, preparation, tokenizer, elastic)


def make_graphs(
    model: Phi4MM, pool: PagePool | None, plan: MemoryPlan, config: EngineConfig, forbidden: Tensor
) -> Graphs | None:
    """The graphs of steps where config wants kernels and the device has them; tells the model either way."""
    obstacle = why_not_available(model.device)
    if obstacle is None and pool is not None:
        obstacle = why_not_kept(pool.cache_format, model.device)
    model.use_kernels(config.kernels == "auto" and obstacle is None)
    if config.kernels == "plain" or pool is None:
        return None
    on_gpu = model.device.type == "cuda"
    if model.placement == "streamed":
        obstacle = "memphi's own, and graphs, find no layers that come and go"
    if obstacle is None:
        most_rows, tokens = min(plan.rows, plan.graph_rows), plan.graph_tokens
        return Graphs(model, pool, most_rows, plan.context_tokens, on_gpu, forbidden, tokens)
    if on_gpu:
        logging.getLogger(__name__).warning("PyTorch's kernels are used: %s", obstacle)
    return None


def step_limits(plan: MemoryPlan, config: EngineConfig, model: Phi4MM) -> StepLimits:
    """What one step does at most under a plan."""
    drafts = config.speculation and config.kv_cache
    return StepLimits(
        plan.rows,
        plan.step_tokens,
        plan.shared_step_tokens,
        plan.crops_per_pass,
        plan.windows_per_pass,
        draft_step_tokens(plan, model.config, model.dtype.itemsize, model.uses_kernels) if drafts else 0,
    )


def _reservations(plan: MemoryPlan) -> Reservations:
    """The ledger of a plan: all that is not for pages is charged at once."""
    budget = Budget(plan.budget_bytes)
    fixed = {
        "context": plan.context_bytes,
        "weights": plan.weights_bytes,
        **({"graphs": plan.graphs_bytes} if plan.graphs_bytes else {}),
        "work space": plan.workspace_bytes,
        "media embeddings": plan.media_bytes,
    }
    for account, n_bytes in fixed.items():
        budget.charge(account, n_bytes)
    return Reservations(Pages(plan.pages, plan.page_tokens), budget, plan.page_bytes)


@overload
def load(
    model: str = ...,
    device: str = ...,
    dtype: DtypeName = ...,
    attention: AttentionName = ...,
    config: EngineConfig | None = ...,
    allocator: AllocatorName = ...,
    progress: Progress | None = ...,
) -> Engine: ...
@overload
def load(
    model: str = ...,
    *,
    device: list[str] | tuple[str, ...],
    dtype: DtypeName = ...,
    attention: AttentionName = ...,
    config: EngineConfig | None = ...,
    allocator: AllocatorName = ...,
    progress: Progress | None = ...,
) -> SpreadEngine: ...
def load(
    model: str = DEFAULT_MODEL,
    device: str | list[str] | tuple[str, ...] = "auto",
    dtype: DtypeName = "bf16",
    attention: AttentionName = "auto",
    config: EngineConfig | None = None,
    allocator: AllocatorName = "default",
    progress: Progress | None = None,
) -> Engine | SpreadEngine:
    """Load a model and return the engine that runs it.

    model is a folder, a hub name, `demo` or `random`; device `auto` is the GPU where there is one, else the CPU;
    config holds the dial (memory_bytes), pins and an adapter to merge; allocator sets torch's for CUDA, before CUDA
    starts; progress is called with the bytes of weights done and in total.
    A list of devices gives an engine on each, in a process of its own, and requests are spread over them
    (`engine.spread.start`); the dial is each one's.
    Raises CheckpointError, DeviceError, or DoesNotFitError where the dial or the device is too small.
    """
    loading = Loading(model, "", dtype, attention, config or EngineConfig(), allocator)
    if not isinstance(device, str):
        return start([replace(loading, device=each) for each in device], progress)
    parts = load_parts(replace(loading, device=device), progress)
    return Engine(parts.model, parts.tokenizer, config, parts.plan)


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    model: Phi4MM
    tokenizer: Tokenizer
    plan: MemoryPlan


def load_parts(loading: Loading, progress: Progress | None = None) -> Parts:
    """Plan the memory and load a model; raises what `load` raises."""
    if (own := use_allocator(loading.allocator)) is not None:
        logging.getLogger(__name__).warning(own)
    where, number = find_device(loading.device), find_dtype(loading.dtype)
    location = locate(loading.model)
    backend = select_attention(loading.attention)
    config = read_config(location.folder)
    plan = make_plan(config, device_facts(where), loading.config, number.itemsize)
    tokenizer = Tokenizer.from_folder(location.folder)
    packed, merge, kept = plan.adapters == "packed", loading.config.merge, (plan.scheme, plan.placement)
    cap = capping_allocator(where, plan.budget_bytes - plan.context_bytes)
    with current(where), told_plainly("the model", where, LOADING_ADVICE), cap:
        if location.random:
            network = random_model(config, where, number, 0, backend, progress, packed, merge, *kept)
        else:
            examples = loading_examples(plan.scheme, tokenizer, config)
            network = load_model(location.folder, where, number, backend, progress, packed, merge, *kept, examples)
        if where.type == "cpu" and number is torch.bfloat16:
            use_host_products(network)
        network.place(plan.placement)
        return Parts(network, tokenizer, plan)
