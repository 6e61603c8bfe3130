"""One run of the benchmark: what was asked for, in its order and within its time, as one document.

A process' start is measured before anything is loaded, and peers after memphi's memory is free again.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from memphi.bench.card import measure_card
from memphi.bench.curves import measure_curve
from memphi.bench.document import SCHEMA, provenance, sentence
from memphi.bench.limits import Card
from memphi.bench.peers import PEERS, Order, measure_peer
from memphi.bench.run import Bench, NotRunError
from memphi.bench.start import measure_start
from memphi.bench.table import card_text
from memphi.bench.workloads import BENCHMARK, START, WORKLOADS, CurveName, PeerName, Wanted
from memphi.engine.device import find_device, find_dtype
from memphi.engine.engine import Engine
from memphi.engine.messages import Loading

SIZES = (
    "rows",
    "step_tokens",
    "shared_step_tokens",
    "crops_per_pass",
    "windows_per_pass",
    "pages",
    "scheme",
    "cache_format",
    "weights_bytes",
)
"""What a document tells of the plan."""


@dataclass
class Suite:
    """A run in progress."""

    wanted: Wanted
    loading: Loading
    load: Callable[[], Engine]
    tell: Callable[[str], None]
    """Hears what is being done."""
    keep: Callable[[dict[str, Any]], None] = lambda document: None
    """Is given the document as far as it is made, whenever something was measured: a run may end before its end."""
    records: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    """What was asked for and not measured, and why."""
    _card: Card | None = field(default=None, init=False)
    _plan: dict[str, Any] | None = field(default=None, init=False)

    def run(self) -> dict[str, Any]:
        """Measure and return the document; raises what loading raises."""
        self._deadline = time.perf_counter() + self.wanted.seconds
        device, dtype = find_device(self.loading.device), find_dtype(self.loading.dtype)
        if START in self.wanted.workloads:
            self._try(START, self._measure_start)
        self.tell("measuring the card")
        self._card = measure_card(device, dtype)
        self.tell(card_text(self._card))
        self._measure_engine(self._card)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for number, peer in enumerate(self.wanted.peers):
            self._try(peer, self._measure_peer, peer, len(self.wanted.peers) - number)
        return self._document()

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "benchmark": BENCHMARK,
            **provenance(find_device(self.loading.device), self.wanted.commit),
            "model": self.loading.model,
            "dtype": self.loading.dtype,
            "attention": self.loading.attention,
            "engine": asdict(self.loading.config),
            "plan": self._plan,
            "scale": self.wanted.scale,
            "wanted": asdict(self.wanted),
            "card": self._card and asdict(self._card),
            "workloads": [*self.records],
            "curves": [*self.curves],
            "peers": [*self.peers],
            "peers_are": {peer: PEERS[peer].says for peer in self.wanted.peers},
            "not_run": dict(self.not_run),
        }

    def _measure_engine(self, card: Card) -> None:
        """Workloads and curves; leaves nothing of the engine."""
        engine = self.load()
        self._plan = {name: getattr(engine.plan, name) for name in SIZES}
        bench = Bench(engine, card, self.wanted.repeats, self.wanted.seed, self._deadline, self.tell)
        for name in self.wanted.workloads:
            if name != START:
                self._try(name, self._measure, bench, name)
        for curve in self.wanted.curves:
            self._try(curve, self._measure_curve, bench, curve)
        engine.close()

    def _measure_start(self) -> None:
        self.records.append(measure_start(self.loading, self._deadline, self.tell))

    def _measure(self, bench: Bench, name: str) -> None:
        record = bench.measure(WORKLOADS[name].scaled(self.wanted.scale))
        self.records.append(record)
        self.tell(f"{name}: {record['figure']:.4g} {record['unit']}, {record['share']:.0%} of the limit")

    def _measure_curve(self, bench: Bench, name: CurveName) -> None:
        self.curves.append(measure_curve(bench, name, self.wanted.scale))
        self.not_run |= self.curves[-1].pop("not_run")

    def _measure_peer(self, peer: PeerName, share: int) -> None:
        """Let a peer do the workloads in one part in so many of the time that is left."""
        asked, loading = tuple(name for name in self.wanted.workloads if name != START), self.loading
        if (left_seconds := (self._deadline - time.perf_counter()) / share) <= 0:
            raise NotRunError("there was no time left")
        order = Order(
            peer, loading.model, loading.device, loading.dtype, asked, self.wanted.scale, self.wanted.seed, left_seconds
        )
        records, not_run = measure_peer(order, self.tell)
        self.peers += records
        self.not_run |= {f"{peer}: {name}": reason for name, reason in not_run.items()}

    def _try(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """What fails is told, and leaves the rest to be measured."""
        try:
            work(*arguments)
        except Exception as error:
            self.not_run[name] = sentence(error)
            self.tell(f"{name}: not run: {self.not_run[name]}")
        if self._card is not None:  # What is measured before says nothing without it.
            self.keep(self._document())
