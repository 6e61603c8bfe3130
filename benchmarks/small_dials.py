"""What small cards are to be good for: a picture and a recording, or a page in full detail, answered under small dials.

Each dial is a fresh process with random weights, watched from outside as nvidia-smi sees it, and held against what the
plan's prices say of that request; scheme and placement are the plan's choice unless given. Exit code 1 where a dial was
exceeded, a request was not answered, or the prices were more than a tenth off.
Usage: python -m benchmarks.small_dials --out FILE
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.dials.meter import Meter, find_meter, sampled
from benchmarks.dials.requests import make_sound
from memphi.cli.options import parse_bytes
from memphi.inputs.media import image_media
from memphi.request import Footprint, Media, Request, SamplingParams

if TYPE_CHECKING:
    from memphi.engine.engine import Engine

DIALS = ("4GiB", "5GiB", "6GiB:page", "7GiB", "13GiB")
"""Dials, and after a colon the request that is not the usual one."""
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
    meter = find_meter(options.device)
    runs = [_watch(dial, options, meter) for dial in options.memory]
    for run in runs:
        print(_line(run), file=sys.stderr)
    if options.out:
        _write(options, runs)
    return 0 if all(not run["wrong"] for run in runs) else 1


def _read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--memory", nargs="+", default=DIALS, help="dials, as in 4GiB, or 6GiB:page for the page")
    parser.add_argument("--model", default="random", help="random is of the official sizes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scheme", default="auto")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    parser.add_argument("--scale", type=float, default=1.0, help="of picture and recording, for trying the benchmark")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--dial", help=argparse.SUPPRESS)  # what each fresh process does
    return parser.parse_args(arguments)


# --- in a process of its own ---------------------------------------------------------------------------------------


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """Load under a dial and answer twice, the second time with all that stays in its place; or say what was refused."""
    from memphi import load
    from memphi.config import EngineConfig
    from memphi.errors import MemphiError

    memory, _, kind = options.dial.partition(":")
    config = EngineConfig(parse_bytes(memory), scheme=options.scheme, placement=options.placement)
    started = time.perf_counter()
    try:
        engine = load(options.model, options.device, config=config)
        loaded = time.perf_counter() - started
        answers = [engine.generate(make_request(kind, options.tokens, options.scale, seed)) for seed in (1, 2)]
    except MemphiError as error:
        return {"refused": str(error)}
    plan, stats = engine.plan, engine.stats
    engine.close()
    return {
        "scheme": plan.scheme,
        "placement": plan.placement,
        "reasons": {name: plan.reasons[name] for name in ("scheme", "placement")},
        "planned_bytes": plan.budget_bytes,
        "predicted_bytes": _predicted_bytes(engine, answers[0].footprint, options.tokens),
        "accounts": {account: getattr(plan, f"{account}_bytes") for account in ACCOUNTS},
        "context_tokens": plan.context_tokens,
        "load_seconds": round(loaded, 2),
        "prompt_tokens": answers[0].footprint.prompt_tokens,
        "answers": [_figures(one) for one in answers],
        "rungs": dict(stats.rungs),
    }


def _predicted_bytes(engine: "Engine", footprint: Footprint, tokens: int) -> int:
    """What the device holds at most while this request alone is answered: what stays, its own, and its largest step."""
    from memphi.memory import costs

    plan, config, size = engine.plan, engine.model.config, engine.model.dtype.itemsize
    price = costs.price_request(footprint, config, tokens, dtype_bytes=size)
    step_tokens, on_cuda = min(footprint.prompt_tokens, plan.step_tokens), engine.model.device.type == "cuda"
    windows = min(price.windows, plan.windows_per_pass)
    steps = [
        costs.prefill_chunk(config, step_tokens, footprint.prompt_tokens, size, 1, not on_cuda, plan.adapters),
        costs.decode_step(config, 1, price.tokens, size, plan.adapters),
        costs.vision_pass(config, min(price.crops, plan.crops_per_pass), size),
        *([costs.audio_pass(config, windows, size, on_cuda)] if windows else []),
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


def make_request(kind: str, tokens: int, scale: float, seed: int) -> Request:
    """A picture and a recording, or an A4 page in full detail; of other noise for each seed."""
    random = np.random.default_rng(seed)
    width, height = (max(int(side * scale), 32) for side in (PAGE if kind == "page" else PICTURE))
    picture = image_media(random.integers(0, 256, (height, width, 3), np.uint8), "picture")
    media: list[Media] = [picture] if kind == "page" else [picture, make_sound(random, SECONDS * scale)]
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return Request.ask("What is shown here, and what is said?", media, sampling=sampling)


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
    if "answers" not in run:
        return f"{run['dial']}: {run.get('refused', 'the process died')}"
    peak = "not seen" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**30:.2f} GiB"
    times = ", ".join(f"{one['seconds']} s" for one in run["answers"])
    kept = f"{run['scheme']}, {run['placement']}"
    wrong = f"; {', '.join(run['wrong'])}" if run["wrong"] else ""
    return f"{run['dial']}: {kept}; peak {peak}, predicted {run['predicted_bytes'] / 2**30:.2f} GiB; {times}{wrong}"


def _write(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    from benchmarks.document import write_document
    from memphi.engine.device import find_device

    write_document(options.out, find_device(options.device), options.commit, {"dials": runs})


if __name__ == "__main__":
    sys.exit(main())
