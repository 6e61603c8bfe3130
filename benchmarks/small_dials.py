"""What small cards are to be good for: a picture and a recording, or a page in full detail, answered under small dials.

Each dial is a fresh process with random weights, watched from outside as nvidia-smi sees it, and held against what the
plan's prices say of that request; scheme and placement are the plan's choice unless given. Exit code 1 where a dial was
exceeded, a request was not answered, or the prices were more than a tenth off. With --dry nothing is loaded: what the
plan says for a card, which need not be here; exit code 1 where a request would not fit.
Usage: python -m benchmarks.small_dials --out FILE, or python -m benchmarks.small_dials --dry H100
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from benchmarks.dials.meter import Meter, find_meter, sampled
from benchmarks.dials.requests import make_sound
from memphi.cli.options import parse_bytes
from memphi.inputs.media import image_media
from memphi.request import Footprint, Media, Request, SamplingParams

if TYPE_CHECKING:
    from memphi.config import EngineConfig, ModelConfig
    from memphi.memory.plan import MemoryPlan

DIALS = ("4GiB", "5GiB:int4,resident", "6GiB:page", "7GiB:int8,resident", "13GiB:bf16,resident")
"""Dials, and after a colon what is not left to the plan, scheme and placement, and `page` where that is asked about."""
NEW_TOKENS, SECONDS = 250, 30.0
PICTURE, PAGE = (1024, 768), (2480, 3508)
"""Width and height of the usual request's picture, and of an A4 page at 300 dpi."""
OFF_SHARE = 0.1
"""How far the peak may be from what was predicted, as a share of it."""


def main(arguments: list[str] | None = None) -> int:
    options = _read_options(arguments)
    if options.dial:
        print(json.dumps(answer(options)))
        return 0
    meter = None if options.dry else find_meter(options.device)
    runs = list[dict[str, Any]]()
    for dial in options.memory:
        runs.append(plan_for(dial, options) if options.dry else _watch(dial, options, meter))
        print(_line(runs[-1]), file=sys.stderr)
        if options.out:  # After each: to answer under a small dial takes a minute.
            _write(options, runs)
    return 0 if all(not run["wrong"] for run in runs) else 1


def _read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--memory", nargs="+", default=DIALS, help="dials, as in 4GiB or 6GiB:int4,page")
    parser.add_argument("--model", default="random", help="random is of the official sizes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scheme", default="auto")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    parser.add_argument("--scale", type=float, default=1.0, help="of picture and recording, for trying the benchmark")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--dry", metavar="CARD", help="load nothing, and say what the plan is for a card, as in H100")
    parser.add_argument("--dial", help=argparse.SUPPRESS)  # what each fresh process does
    return parser.parse_args(arguments)


def _settings(dial: str, options: argparse.Namespace) -> tuple["EngineConfig", bool]:
    """What a dial leaves to the plan and what not, and whether it asks about a page."""
    from memphi.config import EngineConfig, Placement, Scheme

    memory, _, words = dial.partition(":")
    said = words.split(",") if words else []
    scheme = cast(Scheme, next((word for word in said if word in get_args(Scheme)), options.scheme))
    placement = cast(Placement, next((word for word in said if word in get_args(Placement)), options.placement))
    return EngineConfig(parse_bytes(memory), scheme=scheme, placement=placement), "page" in said


# --- in a process of its own ---------------------------------------------------------------------------------------


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Load under a dial and answer twice, the second time with all that stays in its place; or say what was refused."""
    from memphi import load
    from memphi.errors import MemphiError

    config, page = _settings(options.dial, options)
    started = time.perf_counter()
    try:
        engine = load(options.model, options.device, config=config)
        loaded = time.perf_counter() - started
        answers = [engine.generate(make_request(page, options.tokens, options.scale, seed)) for seed in (1, 2)]
    except MemphiError as error:
        return {"refused": str(error)}
    stats, footprint = engine.stats, answers[0].footprint
    engine.close()
    model = engine.model
    planned = _planned(engine.plan, model.config, footprint, options.tokens, model.dtype.itemsize, model.device.type)
    more = {"answers": [_figures(one) for one in answers], "rungs": dict(stats.rungs)}
    return planned | {"load_seconds": round(loaded, 2)} | more


def _planned(
    plan: "MemoryPlan", config: "ModelConfig", footprint: Footprint, tokens: int, dtype_bytes: int, device: str
) -> dict[str, Any]:
    """What the plan and its prices say of a request alone."""
    return {
        "scheme": plan.scheme,
        "placement": plan.placement,
        "cache_format": plan.cache_format,
        "reasons": {name: plan.reasons[name] for name in ("scheme", "placement")},
        "planned_bytes": plan.budget_bytes,
        "predicted_bytes": _predicted_bytes(plan, config, footprint, tokens, dtype_bytes, device == "cuda"),
        "accounts": {account: getattr(plan, f"{account}_bytes") for account in ACCOUNTS},
        "context_tokens": plan.context_tokens,
        "prompt_tokens": footprint.prompt_tokens,
    }


def _predicted_bytes(
    plan: "MemoryPlan", config: "ModelConfig", footprint: Footprint, tokens: int, size: int, on_cuda: bool
) -> int:
    """What the device holds at most while this request alone is answered: what stays, its own, and its largest step."""
    from memphi.memory import costs

    config = replace(config, scheme=plan.scheme)
    kept = plan.adapters, None, plan.cache_format
    price = costs.price_request(footprint, config, tokens, dtype_bytes=size, cache_format=plan.cache_format)
    step_tokens, windows = min(footprint.prompt_tokens, plan.step_tokens), min(price.windows, plan.windows_per_pass)
    keys = footprint.prompt_tokens if footprint.prompt_tokens > step_tokens else 0
    steps = [
        costs.prefill_chunk(config, step_tokens, keys, size, 1, not on_cuda, *kept),
        costs.decode_step(config, 1, price.tokens, size, *kept),
        costs.vision_pass(config, min(price.crops, plan.crops_per_pass), size),
        *([costs.audio_pass(config, windows, size, on_cuda)] if windows else []),
        *([costs.cropping(config, min(price.crops, plan.crops_per_pass), size)] if on_cuda else []),
    ]
    largest = max(step.bytes for step in steps)
    step_bytes = largest + costs.allocator_rounding("cuda" if on_cuda else "cpu", largest).bytes
    return plan.context_bytes + plan.weights_bytes + plan.graphs_bytes + price.device_bytes + step_bytes


ACCOUNTS = ("context", "weights", "graphs", "workspace", "pool", "media")


def _figures(result: Any) -> dict[str, Any]:  # noqa: ANN401
    decoding = result.seconds - result.first_token_seconds
    return {
        "tokens": len(result.ids),
        "seconds": round(result.seconds, 3),
        "first_token_seconds": round(result.first_token_seconds, 3),
        "tokens_a_second": round((len(result.ids) - 1) / decoding, 1) if decoding > 0 else None,
    }


def make_request(page: bool, tokens: int, scale: float, seed: int) -> Request:
    """A picture and a recording, or an A4 page in full detail; of other noise for each seed."""
    random = np.random.default_rng(seed)
    width, height = (max(int(side * scale), 32) for side in (PAGE if page else PICTURE))
    picture = image_media(random.integers(0, 256, (height, width, 3), np.uint8), "picture")
    media: list[Media] = [picture] if page else [picture, make_sound(random, SECONDS * scale)]
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Request.ask("What is shown here, and what is said?", media, sampling=sampling)


# --- beforehand ----------------------------------------------------------------------------------------------------


def plan_for(dial: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the plan says of a dial on a card, in bf16; or what is refused."""
    from memphi.checkpoint.layout import read_config
    from memphi.checkpoint.locate import locate
    from memphi.errors import DoesNotFitError
    from memphi.inputs.prompt import measure
    from memphi.inputs.tokenizer import Tokenizer
    from memphi.memory.costs import FIRST_ANSWER_TOKENS
    from memphi.memory.devices import find_card
    from memphi.memory.planner import make_plan

    folder = locate(options.model).folder
    config, (settings, page) = read_config(folder), _settings(dial, options)
    said: dict[str, Any] = {"dial": dial, "allowed_bytes": settings.memory_bytes, "wrong": []}
    try:
        plan = make_plan(config, find_card(options.dry), settings)
    except DoesNotFitError as error:
        return said | {"refused": str(error), "wrong": ["refused"]}
    request = make_request(page, options.tokens, options.scale, 1)
    footprint = measure(request, config, Tokenizer.from_folder(folder))
    if footprint.prompt_tokens + min(options.tokens, FIRST_ANSWER_TOKENS) > plan.context_tokens:
        refusal = f"{footprint.prompt_tokens} tokens and an answer's, and there is room for {plan.context_tokens}"
        return said | {"refused": refusal, "wrong": ["refused"]}
    return said | _planned(plan, config, footprint, options.tokens, 2, "cuda")


# --- from outside --------------------------------------------------------------------------------------------------


def _watch(dial: str, options: argparse.Namespace, meter: Meter | None) -> dict[str, Any]:
    names = ("model", "device", "scheme", "placement", "tokens", "scale")
    passed = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, "-m", "benchmarks.small_dials", "--dial", dial, *passed]
    with sampled(meter) as seen:
        finished = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    said = json.loads(finished.stdout.splitlines()[-1]) if finished.returncode == 0 else {}
    allowed_bytes, peak_bytes = parse_bytes(dial.partition(":")[0]), seen.peak_bytes if seen.source else None
    return {
        "dial": dial,
        "allowed_bytes": allowed_bytes,
        **said,
        "peak_bytes": peak_bytes,
        "seen_by": seen.source,
        "exit_code": finished.returncode,
        "wrong": _wrong(said, allowed_bytes, peak_bytes, options.tokens),
    }


def _wrong(said: dict[str, Any], allowed_bytes: int, peak_bytes: int | None, tokens: int) -> list[str]:
    """What a run did not keep."""
    if "refused" in said:
        return ["refused"]
    if not said:
        return ["the process died"]
    wrong = [] if all(one["tokens"] == tokens for one in said["answers"]) else ["not answered"]
    if peak_bytes is not None and peak_bytes > allowed_bytes:
        wrong.append("the dial was exceeded")
    if peak_bytes is not None and abs(peak_bytes - said["predicted_bytes"]) > OFF_SHARE * said["predicted_bytes"]:
        wrong.append(f"more than {OFF_SHARE:.0%} from what was predicted")
    return wrong


def _line(run: dict[str, Any]) -> str:
    if "predicted_bytes" not in run:
        return f"{run['dial']}: {run.get('refused', 'the process died')}"
    kept = f"{run['scheme']}, {run['placement']}, keys and values {run['cache_format']}"
    predicted = f"predicted {run['predicted_bytes'] / 2**30:.2f} GiB"
    if "answers" not in run:
        return f"{run['dial']}: {kept}; {run['context_tokens']} tokens of context; {predicted}"
    peak = "not seen" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**30:.2f} GiB"
    times = ", ".join(f"{one['seconds']} s" for one in run["answers"])
    wrong = f"; {', '.join(run['wrong'])}" if run["wrong"] else ""
    return f"{run['dial']}: {kept}; peak {peak}, {predicted}; {times}{wrong}"


def _write(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    from benchmarks.document import write_document
    from memphi.engine.device import find_device

    write_document(options.out, find_device(options.device), options.commit, {"dials": runs, "dry": options.dry})


if __name__ == "__main__":
    sys.exit(main())
