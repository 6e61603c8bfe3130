"""Whether one dial holds: mixed requests, 64 at once, under a given memory, watched from outside.

Each dial gets a process of its own with a model of random weights; the parent reads what the whole device has in use
all the while. Dials that --out holds for the same commit are kept. Before the dials, --calibrate runs single steps of
each kind and holds what they take against what was predicted.
Usage: python -m benchmarks.dials --dial 16GiB --dial 24GiB --seconds 120 --calibrate 60 --out FILE
"""

import argparse
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memphi.checkpoint.layout import read_config
from memphi.checkpoint.locate import locate
from memphi.config import EngineConfig, ModelConfig
from memphi.errors import DoesNotFitError, WorkerError
from memphi.inputs.media import audio_media, image_media
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory import costs
from memphi.memory.costs import GIB, MIB, size_text
from memphi.memory.monitor import Monitor
from memphi.memory.planner import MemoryPlan
from memphi.request import Footprint, InputMode, Media, Prompt, Request, SamplingParams

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.engine.step import EncodeSlice, PlannedRow, StepPlan

IN_FLIGHT = 64
SAMPLE_SECONDS = 0.02
GRACE_SECONDS = 20.0
"""How long after its time a process may still end by itself."""
BUILDERS = 4
NEW_TOKENS = (16, 64)
CROSSING_WORDS = 4070
"""A text about so long goes over to the long rope factors while it is answered."""
MOST_SENTENCES = 200
WORDS = ("time", "water", "house", "light", "three", "people", "under", "green", "letter", "music", "river", "number")


# --- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The largest of everything that a request may hold."""

    words: int = 20_000
    images: int = 12
    side: int = 3508
    """The longer side of a picture: A4 at 300 dpi."""
    seconds: float = 600.0


SMALL = Sizes(40, 2, 300, 2.0)
"""For trying the benchmark itself."""


def make_request(index: int, seed: int, sizes: Sizes) -> Request:
    """Request number `index` of a mix: the first five are the extremes, the others of all modes in turn, any size."""
    random = np.random.default_rng((seed, index))
    words, images, seconds = _extreme(index, sizes) or _random_sizes(index, random, sizes)
    sides = [sizes.side if index < 5 else _log_uniform(random, sizes.side // 20, sizes.side) for _ in range(images)]
    media = [_picture(random, side, f"picture {i}") for i, side in enumerate(sides)]
    media += [_sound(random, seconds)] if seconds else []
    most = NEW_TOKENS[1] if index < 5 else int(random.integers(NEW_TOKENS[0], NEW_TOKENS[1] + 1))
    return Request.ask(_text(random, words), media, sampling=SamplingParams(max_tokens=most, ignore_eos=True))


def _extreme(index: int, sizes: Sizes) -> tuple[int, int, float] | None:
    """(words, images, seconds of sound) of the longest text, the most pictures, the longest sound, all, and a text
    that crosses over to the long factors."""
    extremes = (
        (sizes.words, 0, 0.0),
        (8, sizes.images, 0.0),
        (8, 0, sizes.seconds),
        (sizes.words // 10, max(sizes.images // 4, 1), sizes.seconds / 5),
        (min(CROSSING_WORDS, sizes.words), 0, 0.0),
    )
    return extremes[index] if index < len(extremes) else None


def _random_sizes(index: int, random: np.random.Generator, sizes: Sizes) -> tuple[int, int, float]:
    mode = InputMode(index % 4)
    words = _log_uniform(random, 8, sizes.words if mode is InputMode.TEXT else max(sizes.words // 10, 8))
    images = _log_uniform(random, 1, sizes.images) if mode in (InputMode.VISION, InputMode.VISION_SPEECH) else 0
    tenths = _log_uniform(random, 5, int(10 * sizes.seconds))
    return words, images, tenths / 10 if mode.value >= InputMode.SPEECH.value else 0.0


def _log_uniform(random: np.random.Generator, low: int, high: int) -> int:
    return round(math.exp(random.uniform(math.log(low), math.log(high))))


def _text(random: np.random.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in random.integers(0, len(WORDS), words))


def _picture(random: np.random.Generator, side: int, name: str) -> Media:
    """Rectangles on a page of A4's shape, upright or lying."""
    short = max(round(side / math.sqrt(2)), 1)
    height, width = (side, short) if random.integers(2) else (short, side)
    pixels = np.full((height, width, 3), random.integers(0, 256, 3), np.uint8)
    for _ in range(20):
        top, left = random.integers(0, height), random.integers(0, width)
        bottom, right = top + random.integers(1, height), left + random.integers(1, width)
        pixels[top:bottom, left:right] = random.integers(0, 256, 3)
    return image_media(pixels, name)


def _sound(random: np.random.Generator, seconds: float) -> Media:
    return audio_media(0.1 * random.standard_normal(int(16000 * seconds), np.float32), 16000, "sound")


# --- what the device has in use --------------------------------------------------------------------------------------


class Meter(Protocol):
    """Reads how much of the device's memory is in use, by whomever."""

    source: str

    def used_bytes(self) -> int: ...


class NvmlMeter:
    """What nvidia-smi shows, from the library that it reads itself."""

    source = "NVML, as nvidia-smi shows it: memory of the whole device in use, CUDA's contexts included"

    def __init__(self) -> None:
        """Raises ImportError, or what NVML raises, where there is none."""
        self._nvml: Any = import_module("pynvml")
        self._nvml.nvmlInit()
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        by_index, by_uuid = self._nvml.nvmlDeviceGetHandleByIndex, self._nvml.nvmlDeviceGetHandleByUUID
        self._device = by_index(int(first)) if first.isdigit() else by_uuid(first.encode())

    def used_bytes(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)


class TorchMeter:
    """What CUDA says is not free; the reader's own context counts too, but was there before."""

    source = "torch.cuda.mem_get_info: memory of the whole device in use, CUDA's contexts included"

    def __init__(self) -> None:
        self._torch: Any = import_module("torch")
        self.used_bytes()

    def used_bytes(self) -> int:
        free_bytes, total_bytes = self._torch.cuda.mem_get_info()
        return int(total_bytes - free_bytes)


def find_meter(device: str) -> Meter | None:
    """The best meter for a device by name; None where nothing can be read."""
    if device == "cpu":
        return None
    try:
        return NvmlMeter()
    except Exception as reason:  # no library, no driver, or a driver that does not answer
        _say(f"NVML is not there ({reason})")
    return TorchMeter() if import_module("torch").cuda.is_available() else None


@dataclass
class Seen:
    """What a meter read while a process ran."""

    source: str | None
    base_bytes: int = 0
    """In use without the process: before it began, or after it ended, whichever is less."""
    peak_bytes: int = 0
    """The most beyond that."""
    samples: int = 0
    longest_gap_seconds: float = 0.0


@contextmanager
def sampled(meter: Meter | None) -> Iterator[Seen]:
    """Read the meter every 20 ms while the block runs."""
    if meter is None:
        yield Seen(None)
        return
    seen, used, done = Seen(meter.source, meter.used_bytes()), [0], threading.Event()

    def sample() -> None:
        last = time.monotonic()
        while not done.wait(SAMPLE_SECONDS):
            used.append(meter.used_bytes())
            now = time.monotonic()
            seen.longest_gap_seconds, last = max(seen.longest_gap_seconds, round(now - last, 3)), now

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.samples, seen.base_bytes = len(used) - 1, min(seen.base_bytes, meter.used_bytes())
        seen.peak_bytes = max(used) - seen.base_bytes


# --- the parent ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.child:
        {"dial": work_dial, "calibrate": work_calibrate}[options.child](options)
        return 0
    figures = _earlier(options.out)
    meter = find_meter(options.device)
    if options.calibrate:
        figures["calibration"] = run_calibration(options, meter)
        _write(options, figures)
    for dial_bytes in options.dial:
        name = _name(dial_bytes)
        if _is_finished(figures["dials"].get(name), options.commit):
            _say(f"{name}: finished before, kept")
            continue
        figures["dials"][name] = run_dial(options, meter, dial_bytes)
        _write(options, figures)
    return 0 if not options.dial or _all_hold(figures) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dial", type=_size, action="append", default=[], metavar="SIZE", help="as in 16GiB; repeats")
    parser.add_argument("--requests", type=int, default=60, help="requests a dial")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of one dial, loading included")
    parser.add_argument("--calibrate", type=float, default=0.0, metavar="SECONDS", help="first run single steps")
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--model", default="random", help="random, demo or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="tiny requests, to try the benchmark itself")
    parser.add_argument("--child", choices=("dial", "calibrate"), help=argparse.SUPPRESS)  # what each process does
    options = parser.parse_args(arguments)
    if not options.child and not options.out:
        parser.error("--out is needed")
    return options


def _size(text: str) -> int:
    """Bytes from 16GiB, 512MiB or a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|MiB|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 16GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * {"GiB": GIB, "MiB": MIB, "": 1}[match[2]])


def _name(n_bytes: int) -> str:
    return f"{n_bytes / GIB:g}GiB" if n_bytes >= GIB else f"{n_bytes / MIB:g}MiB"


def _earlier(out: Path) -> dict[str, Any]:
    """What an earlier run found, to go on from."""
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    kept = {"calibration": document["calibration"]} if "calibration" in document else {}
    return {**kept, "dials": document.get("dials", {})}


def _is_finished(dial: Mapping[str, Any] | None, commit: str | None) -> bool:
    return dial is not None and dial["complete"] and dial["commit"] == commit


def _write(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write what is known so far."""
    import torch

    from benchmarks.document import write_document

    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    write_document(
        options.out, torch.device("cuda" if on_gpu else "cpu"), options.commit, {"holds": _all_hold(figures), **figures}
    )


def _all_hold(figures: Mapping[str, Any]) -> bool:
    dials = figures["dials"].values()
    return bool(dials) and all(dial["holds"] and dial["complete"] for dial in dials)


def run_dial(options: argparse.Namespace, meter: Meter | None, dial_bytes: int) -> dict[str, Any]:
    """All about one dial, from a process of its own."""
    child = _run_child(options, "dial", meter, options.seconds, dial_bytes)
    return {"commit": options.commit, **summarize_dial(dial_bytes, options.requests, child)}


def run_calibration(options: argparse.Namespace, meter: Meter | None) -> dict[str, Any]:
    """Predicted and observed of single steps, and how large CUDA's context really is, from a process of its own."""
    # The whole device, so that the largest steps are among them.
    child = _run_child(options, "calibrate", meter, options.calibrate, options.dial[0] if options.small else None)
    stages = {e["stage"]: e for e in child.events if e["event"] == "stage"}
    return {
        "commit": options.commit,
        **child.facts(),
        **child.last("plan"),
        "context": _context(stages, child),
        "cases": [_without_event(event) for event in child.events if event["event"] == "case"],
    }


def _context(stages: Mapping[str, Mapping[str, int]], child: "Child") -> dict[str, Any] | None:
    """What the device had in use beyond torch's tensors and the pool, stage by stage."""
    if not stages or child.seen.source is None:
        return None
    measured = {name: s["used_bytes"] - child.seen.base_bytes - s["held_bytes"] for name, s in stages.items()}
    return {
        "assumed_bytes": child.last("plan").get("plan", {}).get("context_bytes"),
        "measured_bytes": max(measured.values()),
        "measured_by_stage_bytes": measured,
        "free_by_stage_bytes": {name: stage["free_bytes"] for name, stage in stages.items()},
    }


@dataclass
class Child:
    """A process that has ended, and what it said."""

    events: list[dict[str, Any]]
    exit_code: int
    seconds: float
    seen: Seen

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of a kind, without its name; empty where there was none."""
        return next((_without_event(event) for event in reversed(self.events) if event["event"] == kind), {})

    @property
    def lived(self) -> bool:
        """Whether it ended by itself, as it should."""
        return self.exit_code == 0 and bool(self.last("end") or self.last("no plan"))

    def facts(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 1), "exit_code": self.exit_code, "seen_from_outside": asdict(self.seen)}


def _run_child(
    options: argparse.Namespace, work: str, meter: Meter | None, seconds: float, dial_bytes: int | None
) -> Child:
    """Run a fresh process for so long, and a little longer at most, while the meter is read."""
    passed = ("requests", "model", "device", "dtype", "seed")
    command = [sys.executable, "-m", "benchmarks.dials", "--child", work, "--seconds", str(seconds)]
    command += [f"--{name}={getattr(options, name)}" for name in passed]
    command += [f"--dial={dial_bytes}"] if dial_bytes else []
    command += ["--small"] if options.small else []
    started = time.monotonic()
    with sampled(meter) as seen:
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
        killer = threading.Timer(seconds + GRACE_SECONDS, process.kill)
        killer.start()
        # torch takes seconds to import, and the parent needs it only once the process has ended.
        threading.Thread(target=import_module, args=("benchmarks.document",), daemon=True).start()
        assert process.stdout is not None
        events = [event for line in process.stdout if (event := _event(line))]
        exit_code = process.wait()
        killer.cancel()
    return Child(events, exit_code, time.monotonic() - started, seen)


def _event(line: str) -> dict[str, Any] | None:
    """What a process said in one line; what libraries print is passed on."""
    if line.startswith('{"event"'):
        event: dict[str, Any] = json.loads(line)
        return event
    print(line, end="", file=sys.stderr)
    return None


def _without_event(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "event"}


def summarize_dial(dial_bytes: int, requests: int, child: Child) -> dict[str, Any]:
    """One dial's figures and which requirements hold; a request that was not reached is listed as not run."""
    ended = {event["index"]: _without_event(event) for event in child.events if event["event"] == "request"}
    records = [ended.get(i, {"index": i, "outcome": "not run"}) for i in range(requests)]
    end, refused_dial = child.last("end"), child.last("no plan")
    if refused_dial:
        holds = _has_numbers(refused_dial["sentence"]) and child.exit_code == 0
        return {"dial_bytes": dial_bytes, **child.facts(), **refused_dial, "complete": True, "holds": holds}
    checks = judge(dial_bytes, records, end, child)
    outcomes = [record["outcome"] for record in records]
    return {
        "dial_bytes": dial_bytes,
        "complete": "not run" not in outcomes,
        "holds": all(held is not False for held in checks.values()),
        "checks": checks,
        "outcomes": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
        **child.facts(),
        "margin_bytes": dial_bytes - child.seen.peak_bytes if child.seen.source else None,
        "context_at_end_bytes": _context_at_end(end, child),
        **child.last("plan"),
        **end,
        "refused": [record for record in records if record["outcome"] == "refused"],
        "failed": [record for record in records if record["outcome"] == "failed"],
        "not_run": [record["index"] for record in records if record["outcome"] == "not run"],
        "requests": records,
    }


def _context_at_end(end: Mapping[str, Any], child: Child) -> int | None:
    if not end.get("used_bytes") or child.seen.source is None:
        return None
    return int(end["used_bytes"] - child.seen.base_bytes - end["held_bytes"])


def judge(
    dial_bytes: int, records: Sequence[Mapping[str, Any]], end: Mapping[str, Any], child: Child
) -> dict[str, bool | None]:
    """The requirements, and whether each holds; None where nothing could be read."""
    ran = [record for record in records if record["outcome"] != "not run"]
    kinds = end.get("kinds", {}).values()
    return {
        "every request that alone fits is answered": all(
            record["outcome"] == "answered" for record in ran if record.get("fits") is not False
        ),
        "every other request is refused with numbers": all(
            record["outcome"] == "refused" and _has_numbers(record["sentence"])
            for record in ran
            if record.get("fits") is False
        ),
        "no out-of-memory error escapes": not any(record.get("out_of_memory") for record in ran),
        "the process lives": child.lived,
        "the dial is never exceeded": child.seen.peak_bytes <= dial_bytes if child.seen.samples else None,
        "no step takes more than predicted": not any(kind["above"] for kind in kinds) if kinds else None,
        "no prediction is far above": not any(kind["below"] for kind in kinds) if kinds else None,
    }


def _has_numbers(sentence: str) -> bool:
    return re.search(r"\d", sentence) is not None


def _say(text: str) -> None:
    sys.stderr.write(f"dials: {text}\n")


# --- a process with a model ------------------------------------------------------------------------------------------


@dataclass
class Notes(Monitor):
    """A monitor that keeps every step: (kind, predicted bytes, observed bytes)."""

    noted: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def note(self, kind: str, predicted_bytes: int, observed_bytes: int) -> str | None:
        self.noted.append((kind, predicted_bytes, observed_bytes))
        return super().note(kind, predicted_bytes, observed_bytes)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Each kind's record, with the steps whose predictions were furthest below and above the truth."""
        return {kind: asdict(record) | self._extremes(kind) for kind, record in self.records().items()}

    def _extremes(self, kind: str) -> dict[str, Any]:
        steps = sorted((p - o, p, o) for noted, p, o in self.noted if noted == kind)
        names = ("predicted_bytes", "observed_bytes")
        ends = {"most_below": steps[0], "most_above": steps[-1]}
        return {name: dict(zip(names, step[1:], strict=True)) for name, step in ends.items()}


class Sentences(logging.Handler):
    """Keeps what is logged, each sentence once."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if sentence in self.kept or len(self.kept) < MOST_SENTENCES:
            self.kept[sentence] = self.kept.get(sentence, 0) + 1


def work_dial(options: argparse.Namespace) -> None:
    """Answer a mix of requests under one dial until all have ended or time is up; tells each by a line."""
    deadline = time.monotonic() + options.seconds
    sizes, dial_bytes = SMALL if options.small else Sizes(), options.dial[0]
    import_module("memphi.engine.engine")  # Torch is imported much faster while no other thread needs Python's lock.
    builders = ThreadPoolExecutor(BUILDERS)
    requests = [builders.submit(make_request, i, options.seed, sizes) for i in range(options.requests)]
    try:
        engine, notes = _load(options, EngineConfig(memory_bytes=dial_bytes, speculation=False))
    except DoesNotFitError as refusal:
        _tell("no plan", sentence=str(refusal))
        return
    sentences = Sentences()
    logging.getLogger("memphi").addHandler(sentences)
    logging.getLogger("memphi").setLevel(logging.INFO)
    _Mix(engine, _name(dial_bytes), deadline).run(requests)
    builders.shutdown(wait=False, cancel_futures=True)
    _tell(
        "end",
        stats=vars(engine.stats),
        kinds=notes.kinds(),
        log=sentences.kept,
        **_held(engine, find_meter(options.device)),
    )


def _load(options: argparse.Namespace, config: EngineConfig) -> tuple["Engine", Notes]:
    from memphi.engine.engine import load

    started = time.monotonic()
    engine = load(options.model, options.device, options.dtype, config=config)
    notes = Notes()
    engine.loop.runner.gauge.monitor = notes
    seconds = time.monotonic() - started
    plan = {name: value for name, value in asdict(engine.plan).items() if name not in ("reasons", "costs")}
    _tell("plan", load_seconds=round(seconds, 2), card=_card(engine), plan=plan)
    _say(f"{options.model} is loaded after {seconds:.1f} s; {size_text(engine.plan.budget_bytes)}")
    return engine, notes


def _card(engine: "Engine") -> str:
    import torch

    device = engine.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _held(engine: "Engine", meter: Meter | None) -> dict[str, Any]:
    """What is in use at the end, by the meter and by torch and the pool, and the most that these two held."""
    import torch

    if engine.model.device.type != "cuda":
        return {"peak_bytes": engine.loop.runner.gauge.peak_bytes()}
    torch.cuda.synchronize()
    pool = engine.loop.runner.pool
    return {
        "peak_bytes": engine.loop.runner.gauge.peak_bytes(),
        "used_bytes": meter.used_bytes() if meter else None,
        "held_bytes": torch.cuda.memory_reserved() + (pool.mapped_bytes if pool else 0),
        "free_bytes": torch.cuda.mem_get_info()[0],
    }


def _tell(event: str, **facts: Any) -> None:  # noqa: ANN401
    """Tell the parent, in one line, which one write keeps whole among those of other threads."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


class _Mix:
    """Requests on their way through one engine."""

    def __init__(self, engine: "Engine", name: str, deadline: float) -> None:
        self._engine, self._name, self._deadline = engine, name, deadline
        self._over = threading.Event()
        self._ended = 0
        self._started = time.monotonic()

    def run(self, requests: Sequence[Future[Request]]) -> None:
        """Send all, 64 at a time; what has not ended when time is up is cancelled."""
        senders = ThreadPoolExecutor(IN_FLIGHT)
        sent = [senders.submit(self._send, index, request) for index, request in enumerate(requests)]
        wait(sent, max(self._deadline - time.monotonic(), 0.0))
        self._over.set()
        for request in requests:
            request.cancel()
        self._engine.close()
        senders.shutdown(cancel_futures=True)

    def _send(self, index: int, request: Future[Request]) -> None:
        if request.cancelled() or self._over.is_set():
            return
        record = self._answer(request.result())
        if record["outcome"] != "not run":
            self._ended += 1
            _say(f"{self._name}: {self._ended} ended after {time.monotonic() - self._started:.1f} s")
        _tell("request", index=index, **record)

    def _answer(self, request: Request) -> dict[str, Any]:
        """How a request ended, and whether it should have."""
        record: dict[str, Any] = {"mode": request.mode.name.lower(), "new_tokens": request.sampling.max_tokens}
        try:
            footprint = self._engine.measure(request)
        except DoesNotFitError as refusal:  # beyond the model's own context
            return record | {"fits": False, "outcome": "refused", "sentence": str(refusal)}
        record |= _describe(footprint) | {"fits": fits_alone(request, footprint, self._engine.plan, self._config)}
        return record | self._outcome(request)

    @property
    def _config(self) -> ModelConfig:
        return self._engine.model.config

    def _outcome(self, request: Request) -> dict[str, Any]:
        from memphi.engine.recovery import is_out_of_memory

        try:
            result = self._engine.generate(request)
        except DoesNotFitError as refusal:
            return {"outcome": "refused", "sentence": str(refusal)}
        except Exception as error:  # whatever escapes is what this is about
            if isinstance(error, WorkerError) and self._over.is_set():
                return {"outcome": "not run"}
            said = f"{type(error).__name__}: {error}"
            return {"outcome": "failed", "sentence": said, "out_of_memory": is_out_of_memory(error)}
        if result.finish_reason.value == "cancelled":
            return {"outcome": "not run", "tokens_so_far": len(result.ids)}
        whole = len(result.ids) == request.sampling.max_tokens
        return {
            "outcome": "answered" if whole else "failed",
            "sentence": None if whole else f"it ended after {len(result.ids)} tokens",
            "seconds": round(result.seconds, 2),
            "first_token_seconds": round(result.first_token_seconds, 2),
            "degraded": list(result.degraded),
        }


def _describe(footprint: Footprint) -> dict[str, Any]:
    return {
        "prompt_tokens": footprint.prompt_tokens,
        "images": len(footprint.images),
        "crops": footprint.crops,
        "seconds_of_sound": round(sum(clip.seconds for clip in footprint.clips), 1),
    }


def fits_alone(request: Request, footprint: Footprint, plan: MemoryPlan, config: ModelConfig) -> bool:
    """Whether a request's price fits a plan if nothing else runs; the last token's keys and values are never needed."""
    answer_tokens = (request.sampling.max_tokens or 1) - 1
    within = footprint.prompt_tokens + answer_tokens <= config.language.max_tokens
    price = costs.price_request(footprint, config, answer_tokens, cache_format=plan.cache_format)
    return within and price.pages <= plan.pages


# --- single steps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowCase:
    """A step of rows: (tokens, past) of each, all of one mode."""

    name: str
    rows: tuple[tuple[int, int], ...]
    mode: InputMode = InputMode.VISION


@dataclass(frozen=True)
class SliceCase:
    """An encoder pass over so many units of the one picture or clip that there is."""

    name: str
    kind: str
    units: int


DECODING = (1, 999)
ROW_CASES = (
    *(RowCase(f"prefill {tokens}", ((tokens, 0),)) for tokens in (512, 2048, 8192)),
    RowCase("prefill 2048, no adapter", ((2048, 0),), InputMode.TEXT),
    RowCase("prefill 2048, speech", ((2048, 0),), InputMode.SPEECH),
    RowCase("prefill 4 x 2048", ((2048, 0),) * 4),
    *(RowCase(f"prefill {tokens} after 8192", ((tokens, 8192),)) for tokens in (512, 2048, 8192)),
    *(RowCase(f"decode {rows} x 1000", (DECODING,) * rows) for rows in (1, 16, 64)),
    RowCase("decode 64 x 1000, no adapter", (DECODING,) * 64, InputMode.TEXT),
    RowCase("decode 16 x 1000 beside prefill 512", (*(DECODING,) * 16, (512, 0))),
    RowCase("decode 16 x 1000 beside prefill 496 after 8192", (*(DECODING,) * 16, (496, 8192))),
    RowCase("prefill 2048 after 65536", ((2048, 65536),)),
    RowCase("decode 1 x 65536", ((1, 65535),)),
)
CROPS, WINDOWS = (1, 8, 37), (1, 8)
PASSES = {"image": "crops_per_pass", "audio": "windows_per_pass"}
"""The plan's limit of a kind's units."""


def work_calibrate(options: argparse.Namespace) -> None:
    """Measure CUDA's context, load, and run every case twice until time is up; tells each by a line."""
    deadline = time.monotonic() + options.seconds
    meter = find_meter(options.device)
    with ThreadPoolExecutor(1) as preparing:
        prepared = preparing.submit(_prepare_media, options.model)
        _measure_context(options, meter)
        dial_bytes = options.dial[0] if options.dial else None
        engine, notes = _load(options, EngineConfig(memory_bytes=dial_bytes, speculation=False))
        engine.close()  # What runs from here on runs in this thread; the loop has nothing to do.
        steps = _Steps(engine, notes, prepared.result())
    for case in steps.cases():
        late = time.monotonic() > deadline
        _tell("case", case=case.name, **({"skipped": "no time left"} if late else steps.run(case)))
    if engine.model.device.type == "cuda":
        _tell("stage", stage="after all steps", **_held(engine, meter))
    _tell("end")


def _prepare_media(model: str) -> Prompt:
    """A picture of the most crops and a clip of the most windows, on the host."""
    folder = locate(model).folder
    config = read_config(folder)
    size, most = config.vision.crop_size, config.vision.max_crops
    rows = next(n for n in range(math.isqrt(most), 0, -1) if most % n == 0)
    pixels = np.random.default_rng(0).integers(0, 256, (rows * size, most // rows * size, 3), np.uint8)
    frames = max(WINDOWS) * config.audio.window_tokens * config.audio.compression
    media = [image_media(pixels, "picture"), _sound(np.random.default_rng(0), frames / 100 + 0.015)]
    # Far beyond a tiny model's context, which does not matter here.
    roomy = replace(config, language=replace(config.language, max_tokens=1 << 20))
    return prepare(Request.ask("", media), roomy, Tokenizer.from_folder(folder))


def _measure_context(options: argparse.Namespace, meter: Meter | None) -> None:
    """Tell what the device has in use once CUDA has started, and after each library's first use."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    if options.device == "cpu" or not torch.cuda.is_available() or meter is None:
        return
    gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    stages: dict[str, Callable[[], Any]] = {
        "after the first tensor": lambda: torch.zeros(1, **gpu),
        "after cuBLAS": lambda: torch.ones(2048, 3072, **gpu) @ torch.ones(3072, 5120, **gpu),
        "after cuDNN": lambda: F.conv2d(torch.ones(1, 64, 128, 80, **gpu), torch.ones(64, 64, 3, 3, **gpu)),
        "after attention": lambda: F.scaled_dot_product_attention(*(torch.ones(1, 8, 512, 128, **gpu),) * 3),
    }
    for name, work in stages.items():
        work()
        torch.cuda.synchronize()
        facts = {"held_bytes": torch.cuda.memory_reserved(), "free_bytes": torch.cuda.mem_get_info()[0]}
        _tell("stage", stage=name, used_bytes=meter.used_bytes(), **facts)
    torch.cuda.empty_cache()


class _Steps:
    """Runs single steps through an engine's runner."""

    def __init__(self, engine: "Engine", notes: Notes, prompt: Prompt) -> None:
        self._engine, self._notes, self._prompt = engine, notes, prompt
        self._runner, self._plan, self._config = engine.loop.runner, engine.plan, engine.model.config
        self._numbers = count()

    def cases(self) -> list[RowCase | SliceCase]:
        crops = [min(n, self._config.vision.max_crops + 1) for n in CROPS]
        vision = [SliceCase(f"vision pass {n}", "image", n) for n in dict.fromkeys(crops)]
        audio = [SliceCase(f"audio pass {n}", "audio", n) for n in WINDOWS]
        return [*vision, *audio, *ROW_CASES]

    def run(self, case: RowCase | SliceCase) -> dict[str, Any]:
        """What one step takes, the first time and again, against its price; or why it was skipped."""
        obstacle = self._obstacle(case)
        if obstacle:
            return {"skipped": obstacle}
        plan = self._step(case)
        kind, predicted_bytes = self._price(plan)
        runs = [self._measure(plan) for _ in range(2)]
        facts = {"kind": kind, "predicted_bytes": predicted_bytes, "runs": runs}
        observed = [run["observed_bytes"] for run in runs if run.get("observed_bytes") is not None]
        facts |= weigh(predicted_bytes, max(observed)) if observed else {}
        _say(f"{case.name}: {json.dumps(facts)}")
        return facts

    def _obstacle(self, case: RowCase | SliceCase) -> str | None:
        """The limit of the plan that a case is beyond."""
        plan = self._plan
        if isinstance(case, SliceCase):
            asked = {f"{case.kind} units": (case.units, getattr(plan, PASSES[case.kind]))}
        else:
            pages = sum(_pages(row, plan.page_tokens) for row in case.rows)
            asked = {
                "tokens": (sum(tokens for tokens, _ in case.rows), plan.step_tokens),
                "rows": (len(case.rows), plan.rows),
                "pages": (pages, plan.pages),
                "keys": (max(map(sum, case.rows)), plan.context_tokens),
            }
        return next((f"{n} {name}, the plan allows {most}" for name, (n, most) in asked.items() if n > most), None)

    def _measure(self, plan: "StepPlan") -> dict[str, Any]:
        """Run a step once; the allocator's growth counts from a state without unused blocks."""
        import torch

        on_gpu = self._engine.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            before_bytes = torch.cuda.memory_reserved()
        noted, started = len(self._notes.noted), time.monotonic()
        try:
            self._runner.run(plan)
        except Exception as error:  # a step that fails tells as much as one that does not
            return {"failed": f"{type(error).__name__}: {error}"}
        if not on_gpu:
            return {"seconds": round(time.monotonic() - started, 4)}
        torch.cuda.synchronize()
        return {
            "seconds": round(time.monotonic() - started, 4),
            "observed_bytes": self._notes.noted[noted][2],
            "allocator_growth_bytes": torch.cuda.max_memory_reserved() - before_bytes,
        }

    def _price(self, plan: "StepPlan") -> tuple[str, int]:
        from memphi.engine.prices import price_rows, price_slices

        size, masked = self._engine.model.dtype.itemsize, self._engine.model.device.type != "cuda"
        if plan.slices:
            return price_slices(plan.slices, self._config, size)
        return price_rows(plan, self._config, size, masked)

    def _step(self, case: RowCase | SliceCase) -> "StepPlan":
        from memphi.engine.step import StepPlan

        if isinstance(case, SliceCase):
            return StepPlan((), (self._slice(case),))
        pages, rows = 0, []
        for row in case.rows:
            rows.append(self._row(row, case.mode, pages))
            pages += _pages(row, self._plan.page_tokens)
        self._map(pages)
        return StepPlan(tuple(rows))

    def _map(self, pages: int) -> None:
        """Put memory behind all pages: those of a row's past would have been written to before."""
        if self._runner.pool is not None:
            self._runner.gauge.make_room(self._runner.pool.missing_bytes(range(pages)))
            self._runner.pool.ensure(range(pages))
            self._runner.gauge.cap()

    def _row(self, row: tuple[int, int], mode: InputMode, first_page: int) -> "PlannedRow":
        from memphi.engine.sequence import Sequence as Running
        from memphi.engine.step import PlannedRow

        (tokens, past), language = row, self._config.language
        number = next(self._numbers)
        ids = np.random.default_rng(number).integers(0, language.vocab_size // 2, tokens + past).tolist()
        footprint = Footprint(mode, len(ids), (), ())
        sequence = Running(number, Request.ask(""), footprint, language, 1, ids=ids)
        sequence.prompt = Prompt(tuple(ids), (), (), (), footprint)
        sequence.long = language.is_long(len(ids))
        pages = range(first_page, first_page + _pages(row, self._plan.page_tokens))
        return PlannedRow(sequence, past, tokens, tuple(pages))

    def _slice(self, case: SliceCase) -> "EncodeSlice":
        from memphi.cache.media import MediaEntry, MediaKey
        from memphi.engine.sequence import Sequence as Running
        from memphi.engine.step import EncodeSlice

        prompt, language = self._prompt, self._config.language
        sequence = Running(next(self._numbers), Request.ask(""), prompt.footprint, language, 1, prompt=prompt)
        span = next(span for span in prompt.spans if span.kind == case.kind)
        n_bytes = span.tokens * language.hidden_size * self._engine.model.dtype.itemsize
        key = MediaKey(case.name, "auto", 0, "", "")
        entry: MediaEntry[Any] = MediaEntry(key, span.tokens, n_bytes, case.units)
        return EncodeSlice(sequence, entry, span.kind, 0, 0, case.units)


def _pages(row: tuple[int, int], page_tokens: int) -> int:
    return -(-sum(row) // page_tokens)


def weigh(predicted_bytes: int, observed_bytes: int) -> dict[str, Any]:
    """One step's prediction against the truth, by the monitor's own measure."""
    monitor = Monitor()
    sentence = monitor.note("it", predicted_bytes, observed_bytes)
    record = monitor.records()["it"]
    verdict = "below the truth" if record.above else "far above the truth" if record.below else "good"
    return {"ratio": round(record.highest_ratio, 4), "verdict": verdict, "sentence": sentence}


if __name__ == "__main__":
    sys.exit(main())
