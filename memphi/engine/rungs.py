"""The rungs of the ladder: ways to need less memory, cheapest first. None of them changes an answer."""

from collections.abc import Callable
from dataclasses import replace

import torch

from memphi.cache.pool import PagePool
from memphi.engine.graphs import Graphs
from memphi.engine.recovery import Rung
from memphi.engine.scheduler import Scheduler, StepLimits
from memphi.engine.step import StepPlan

LEAST_CHUNK_TOKENS = 16


def make_rungs(
    scheduler: Scheduler, pool: PagePool | None, device: torch.device, graphs: Graphs | None = None
) -> list[Rung]:
    """All rungs of an engine, in the order in which they are tried.

    Without pages rows are whole, and there is no chunk to be made smaller.
    """
    chunk = [Halve("halve the prefill chunk", scheduler, _prefills, _halve_chunk)] if scheduler.paged else []
    return [
        ReturnCachedBlocks(device),
        DropIdleMedia(scheduler),
        DropIdlePages(scheduler, pool),
        Halve("make no drafts", scheduler, _drafts, _leave_drafts),
        Halve("halve the encoders' slice", scheduler, _sliced, _halve_slice),
        *chunk,
        *([LeaveGraphs(graphs)] if graphs else []),
        PauseNewest(scheduler),
    ]


class ReturnCachedBlocks:
    """Give the allocator's free blocks back to the device, where they can join; then once more, on any device.

    Others may have given memory back meanwhile, and Python's garbage is collected: one failure alone ends nothing.
    """

    name = "return cached blocks"
    repeats = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def take(self, plan: StepPlan) -> bool:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def undo(self) -> None:
        """Nothing to undo: blocks are cached again as they come."""


class DropIdleMedia:
    """Forget embeddings that no running request needs."""

    name = "drop idle media embeddings"
    repeats = False

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def take(self, plan: StepPlan) -> bool:
        return self._scheduler.media.drop_idle() > 0

    def undo(self) -> None:
        """Nothing to undo: what is asked for again is encoded again."""


class DropIdlePages:
    """Forget the pages of requests that ended, and give back the memory of all free pages."""

    name = "drop idle pages"
    repeats = False

    def __init__(self, scheduler: Scheduler, pool: PagePool | None) -> None:
        self._scheduler = scheduler
        self._pool = pool

    def take(self, plan: StepPlan) -> bool:
        if self._pool is None:
            return False
        pages = self._scheduler.reservations.pages
        pages.drop_idle()
        return self._pool.trim(pages.kept()) > 0

    def undo(self) -> None:
        """Nothing to undo: what is asked for again is computed again."""


class Halve:
    """Do half as much in a step, or without what only makes it faster."""

    repeats = True

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        applies: Callable[[StepPlan], bool],
        halve: Callable[[StepLimits], StepLimits],
    ) -> None:
        self.name = name
        self._scheduler = scheduler
        self._applies = applies
        self._halve = halve
        self._before: list[StepLimits] = []

    def take(self, plan: StepPlan) -> bool:
        limits = self._scheduler.limits
        halved = self._halve(limits)
        if halved == limits or not self._applies(plan):
            return False
        self._before.append(limits)
        self._scheduler.limits = halved
        return True

    def undo(self) -> None:
        before = self._before.pop()
        limits = self._scheduler.limits
        # Only the numbers that this rung lowers go back: the other one may have moved meanwhile.
        changed = {
            name: getattr(before, name)
            for name in ("step_tokens", "shared_step_tokens", "crops", "windows", "draft_tokens")
            if getattr(self._halve(before), name) != getattr(before, name)
        }
        self._scheduler.limits = replace(limits, **changed)


class LeaveGraphs:
    """Launch decode steps kernel by kernel, and give back what the graphs hold."""

    name = "eager instead of graphs"
    repeats = True

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs

    def take(self, plan: StepPlan) -> bool:
        graphs = self._graphs
        if not graphs.allowed or not (graphs.are_held or _decodes(plan)):
            return False
        graphs.allowed = False
        graphs.drop()
        return True

    def undo(self) -> None:
        self._graphs.allowed = True


class PauseNewest:
    """Let the newest request wait while older ones go on."""

    name = "pause the newest request"
    repeats = True

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._before: list[int] = []

    def take(self, plan: StepPlan) -> bool:
        active = self._scheduler.active
        if len(active) < 2:
            return False
        self._scheduler.pause(active[-1])
        self._before.append(self._scheduler.limits.rows)
        self._scheduler.limits = replace(self._scheduler.limits, rows=len(active) - 1)
        return True

    def undo(self) -> None:
        self._scheduler.limits = replace(self._scheduler.limits, rows=self._before.pop())


def _sliced(plan: StepPlan) -> bool:
    return bool(plan.slices)


def _prefills(plan: StepPlan) -> bool:
    return any(row.tokens > 1 + len(row.drafts) for row in plan.rows)


def _decodes(plan: StepPlan) -> bool:
    return all(row.tokens == 1 for row in plan.rows)


def _drafts(plan: StepPlan) -> bool:
    return any(row.drafts for row in plan.rows)


def _leave_drafts(limits: StepLimits) -> StepLimits:
    return replace(limits, draft_tokens=0)


def _halve_slice(limits: StepLimits) -> StepLimits:
    return replace(limits, crops=-(-limits.crops // 2), windows=-(-limits.windows // 2))


def _halve_chunk(limits: StepLimits) -> StepLimits:
    tokens = max(limits.step_tokens // 2, LEAST_CHUNK_TOKENS)
    if tokens >= limits.step_tokens:
        return limits
    return replace(limits, step_tokens=tokens, shared_step_tokens=min(limits.shared_step_tokens, tokens))
