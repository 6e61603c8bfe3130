"""The same work by others: transformers' own model as it comes, and with the settings that people pass around.

Each peer has a process of its own, begun when memphi's memory is free again, because the settings are read when CUDA
starts. Its clock starts with crops or mel frames in the host's memory: the host's preprocessing is left out. What
takes longer than there is time for is extrapolated from what was done, and its record says from what. Weights are
random, which does not change how long anything takes. Run as a program it is that process.
"""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import torch

from memphi.bench.card import wait_for
from memphi.bench.document import sentence
from memphi.bench.workloads import UNITS, WORKLOADS, Draft, PeerName, Timing, Words, Workload, draw
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.engine.device import DtypeName, find_device, find_dtype
from memphi.engine.settings import ALLOCATOR_VARIABLES, AllocatorName, use_allocator, wait_for_launches
from memphi.errors import MemphiError
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.oracle import build_oracle, import_transformers, oracle_inputs
from memphi.request import MediaKind

WORK_SECONDS, GRACE_SECONDS = 10.0, 30.0
"""The most that one workload may take, and how long after its time a process may still end by itself."""
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Peer:
    """How transformers is used."""

    says: str
    dtype: DtypeName | None = None
    """None: memphi's."""
    kv_cache: bool = True
    allocator: AllocatorName = "default"
    waits_for_launches: bool = False
    one_at_a_time: bool = False
    """One picture or one text, and memory tidied around each."""


PEERS: dict[PeerName, Peer] = {
    "transformers": Peer("transformers' model with its cache, texts as one batch, no adapter"),
    "recipe": Peer(
        "transformers' model in fp16 without its cache, CUDA_LAUNCH_BLOCKING=1, the allocator split128, one picture "
        "or text at a time, no adapter",
        "fp16",
        kv_cache=False,
        allocator="split128",
        waits_for_launches=True,
        one_at_a_time=True,
    ),
}


@dataclass(frozen=True)
class Order:
    """What a process is to measure."""

    peer: PeerName
    model: str
    device: str
    dtype: DtypeName
    workloads: tuple[str, ...]
    scale: float
    seed: int
    seconds: float


def measure_peer(order: Order, tell: Callable[[str], None]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The records of a peer, and why others of the workloads have none.

    Raises MemphiError where transformers is missing.
    """
    import_transformers()
    command = [sys.executable, "-m", "memphi.bench.peers", json.dumps(asdict(order))]
    others = {name: v for name, v in os.environ.items() if name not in (*ALLOCATOR_VARIABLES, "CUDA_LAUNCH_BLOCKING")}
    records, not_run, said = list[dict[str, Any]](), dict[str, str](), ""
    tell(f"{order.peer}: starting")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=others) as process:
        killer = threading.Timer(order.seconds + GRACE_SECONDS, process.kill)
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                said = line.strip() or said
                continue
            record = json.loads(line)
            tell(f"{order.peer}: {record['workload']}")
            if "reason" in record:
                not_run[record["workload"]] = record["reason"]
            else:
                records.append(record)
        killer.cancel()
    done = {*not_run, *(record["workload"] for record in records)}
    missing = "there was no time left" if process.returncode == 0 else f"its process failed: {said}"
    return records, not_run | {name: missing for name in order.workloads if name not in done}


# --- the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what the first argument orders; a line of JSON for each workload."""
    fields = json.loads(sys.argv[1])
    order = Order(**{**fields, "workloads": tuple(fields["workloads"])})
    deadline, peer = time.perf_counter() + order.seconds, PEERS[order.peer]
    use_allocator(peer.allocator)
    if peer.waits_for_launches:
        wait_for_launches()
    rival = Rival(peer, order)
    for name in order.workloads:
        if time.perf_counter() >= deadline:
            return
        try:
            told = rival.measure(WORKLOADS[name].scaled(order.scale), deadline)
        except Exception as error:  # What one workload breaks leaves the others to be measured.
            told = {"reason": sentence(error)}
        print(json.dumps({"workload": name, "peer": order.peer, **told}), flush=True)


@dataclass(frozen=True)
class Taken:
    """How long one batch took, as far as it came."""

    first_seconds: float
    seconds: float
    tokens: int

    def whole(self, tokens: int) -> Timing:
        """The same with this many tokens, at the pace that was seen."""
        pace = (self.seconds - self.first_seconds) / max(self.tokens - 1, 1)
        return Timing(self.first_seconds, self.first_seconds + pace * (tokens - 1))


class Rival:
    """transformers' model, used as a peer says."""

    def __init__(self, peer: Peer, order: Order) -> None:
        folder = locate(order.model).folder
        self._peer, self._order = peer, order
        self._device, self._dtype = find_device(order.device), find_dtype(peer.dtype or order.dtype)
        self._config, self._tokenizer = read_config(folder), Tokenizer.from_folder(folder)
        self._words = Words(self._tokenizer, self._config.language.vocab_size)
        placeholders: dict[MediaKind, int] = {"image": self._tokenizer.image_id, "audio": self._tokenizer.audio_id}
        self._placeholders = list(placeholders.values())
        self._model = build_oracle(self._config, placeholders, self._device, self._dtype)
        _fill(self._model)

    def measure(self, workload: Workload, deadline: float) -> dict[str, Any]:
        """One workload's record, extrapolated where time is short; raises MemphiError for what it cannot do."""
        if len(set(workload.adapters)) > 1:
            raise MemphiError("transformers' model has no adapters to choose for each request")
        batches = self._batches(draw(workload, self._words, self._order.seed))
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._answer(next(self._inputs(batches[:1])), min(WARM_UP_TOKENS, workload.answer_tokens), deadline)
        taken = self._take(batches, workload, min(time.perf_counter() + WORK_SECONDS, deadline))
        told = extrapolate(taken, len(batches), workload.answer_tokens)
        part = {
            "batches": f"{len(taken)} of {len(batches)}",
            "tokens": f"{taken[-1].tokens} of {workload.answer_tokens}",
        }
        is_whole = len(taken) == len(batches) and taken[-1].tokens == workload.answer_tokens
        return {
            "transformers": import_transformers().__version__,
            "figure": workload.figure(told),
            "unit": UNITS[workload.metric],
            "extrapolated_from": None if is_whole else part,
            **asdict(told),
            "peak_memory_bytes": torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None,
        }

    def _batches(self, drafts: Sequence[Draft]) -> list[list[Draft]]:
        """What is computed as one: texts together, pictures as they were sent; or one picture or text at a time."""
        if self._peer.one_at_a_time:
            return [[each] for draft in drafts for each in _one_by_one(draft)]
        return [list(drafts)] if drafts[0].mode is not None else [[draft] for draft in drafts]

    def _take(self, batches: Sequence[list[Draft]], workload: Workload, end: float) -> list[Taken]:
        taken = list[Taken]()
        for inputs in self._inputs(batches):
            if taken and time.perf_counter() >= end:
                break
            taken.append(self._answer(inputs, workload.answer_tokens, end))
        return taken

    def _inputs(self, batches: Sequence[list[Draft]]) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs on the device, each batch's when it is wanted."""
        for batch in batches:
            prompts = [prepare(draft.request(), self._config, self._tokenizer) for draft in batch]
            each = [oracle_inputs(prompt, self._device) for prompt in prompts]
            yield {name: torch.cat([inputs[name] for inputs in each]) for name in each[0]}

    @torch.inference_mode()
    def _answer(self, inputs: dict[str, torch.Tensor], tokens: int, end: float) -> Taken:
        """Generate until the tokens are there or time is up; two tokens at least, to know the pace."""
        if self._peer.one_at_a_time:
            _tidy(self._device)
        clock = _Clock(self._device, end)
        wait_for(self._device)
        started = time.perf_counter()
        self._model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            use_cache=self._peer.kv_cache,
            suppress_tokens=self._placeholders,  # Random weights may say one, and the model fails at it.
            stopping_criteria=import_transformers().StoppingCriteriaList([clock]),
        )
        if self._peer.one_at_a_time:
            _tidy(self._device)
        return Taken(clock.times[0] - started, clock.times[-1] - started, len(clock.times))


class _Clock:
    """A stopping criterion that notes when each token was there, and ends the answer when time is up."""

    def __init__(self, device: torch.device, end: float) -> None:
        self.times = list[float]()
        self._device, self._end = device, end

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Takes ids [batch, tokens]; returns for each of the batch whether it is to end."""
        wait_for(self._device)
        self.times.append(time.perf_counter())
        # The pace takes two tokens.
        ends = len(self.times) > 1 and self.times[-1] >= self._end
        return torch.full((ids.shape[0],), ends, device=ids.device)


def extrapolate(taken: Sequence[Taken], batches: int, tokens: int) -> Timing:
    """All batches one after another, with this many tokens each, as the ones that were measured."""
    wholes = [each.whole(tokens) for each in taken]
    first, seconds = (sum(times) / len(wholes) for times in zip(*map(astuple, wholes), strict=True))
    return Timing((batches - 1) * seconds + first, batches * seconds)


def _one_by_one(draft: Draft) -> list[Draft]:
    if len(draft.pictures) < 2:
        return [draft]
    return [replace(draft, pictures=(picture,)) for picture in draft.pictures]


def _fill(model: Any) -> None:  # noqa: ANN401
    """Small random weights, and norms that keep the scale."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 0.02)
        else:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        if "global_" in name:  # The audio encoder's mean and deviation: what build_oracle leaves unset.
            buffer.fill_(1.0)


def _tidy(device: torch.device) -> None:
    """What the recipes do around every image."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
