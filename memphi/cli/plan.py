"""`memphi plan`: what fits, and why, before anything is loaded."""

import json
import shutil
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memphi.cli import options
from memphi.cli.terminal import open_attachments
from memphi.config import DEFAULT_MODEL
from memphi.errors import CheckpointError, DeviceError, DoesNotFitError

if TYPE_CHECKING:
    from memphi.config import EngineConfig, ModelConfig
    from memphi.engine.admission import Refuse
    from memphi.inputs.tokenizer import Tokenizer
    from memphi.memory.costs import RequestPrice
    from memphi.memory.devices import DeviceFacts
    from memphi.memory.plan import MemoryPlan
    from memphi.request import Footprint, Request

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
EXAMPLE_PICTURES = {"pictures of 1024 x 768": (1024, 768), "A4 pages at 300 dpi": (2480, 3508)}
QUESTION_TOKENS = 64
"""What the examples leave for a question, besides the first stretch of the answer."""
LARGEST_DEVICE_BYTES = 1 << 50


def plan(
    question: Annotated[str, typer.Argument(help="Price this question too, with its attachments.")] = "",
    attach: options.Attachments = [],  # noqa: B006
    memory: options.Memory = None,
    kv_cache: options.KvCache = "on",
    cache_format: options.CacheFormat = "auto",
    pin: options.Pins = [],  # noqa: B006
    merge: options.Merge = None,
    kernels: options.Kernels = "auto",
    scheme: options.Scheme = "auto",
    gpu: Annotated[str | None, typer.Option(help="Plan for this card, as in `RTX 4060`; none need be here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    detail: options.Detail = "auto",
    system: options.System = None,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
) -> None:
    """Say what fits into a device's memory, and why, without loading anything.

    The device is --gpu's card, the NVIDIA card that is here, a card with --memory, or else this machine's CPU. With a
    question or attachments, that very request is priced too; the exit code is 3 where it does not fit.
    """
    from memphi.checkpoint.layout import read_config
    from memphi.inputs.tokenizer import Tokenizer
    from memphi.memory.planner import make_plan

    request = _request(question, attach, detail, system, max_tokens) if question or attach else None
    folder = _config_folder(model)
    config, facts, engine = (
        read_config(folder),
        _facts(device, gpu, memory),
        options.engine_config(memory, kv_cache, pin, merge, kernels=kernels, scheme=scheme, cache_format=cache_format),
    )
    made = make_plan(config, facts, engine, DTYPE_BYTES[dtype])
    document = _document(model, dtype, facts, made, config)
    verdict = None
    if request is not None:
        from memphi.engine.pressure import check_mode

        verdict = _Verdict(request, config, Tokenizer.from_folder(folder), made, facts, engine, DTYPE_BYTES[dtype])
        check_mode(verdict.footprint.mode, merge)
        document["request"] = verdict.document()
    print(json.dumps(document, ensure_ascii=False, indent=2) if as_json else _text(document))
    if verdict is not None and not verdict.fits:
        raise DoesNotFitError(verdict.refusal())


# --- what is planned for -------------------------------------------------------------------------------------------


def _config_folder(model: str) -> Path:
    """Where a model's config and tokenizer are; nothing is downloaded. Raises CheckpointError."""
    from memphi import official
    from memphi.checkpoint.locate import locate

    if model in ("demo", "random") or Path(model).expanduser().exists():
        return locate(model).folder
    if model == DEFAULT_MODEL:
        return official.folder()
    raise CheckpointError(
        f"{model!r} is no folder here, and plan downloads nothing; give a folder, {DEFAULT_MODEL}, demo or random"
    )


def _facts(device: str, gpu: str | None, memory_bytes: int | None) -> "DeviceFacts":
    """The device to plan for; raises DeviceError where there is none of that kind."""
    from memphi.memory.devices import DeviceFacts, find_card, present_card, this_machine

    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda", "cpu", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise DeviceError(f"{device!r} is no device; use auto, cuda, cuda:0, cpu or mps")
    if gpu is not None and kind in ("cpu", "mps"):
        raise DeviceError(f"--device {device} is no card, and --gpu names a card; leave --device out, or --gpu")
    if kind == "cpu":
        return this_machine()
    if kind == "mps":
        return replace(this_machine(), kind="mps", name="this machine's GPU")
    if gpu is not None:
        return find_card(gpu)
    if (card := present_card(int(number or 0))) is not None:
        return card
    if memory_bytes is not None:
        return DeviceFacts("cuda", "a GPU", memory_bytes, memory_bytes)
    if kind == "cuda":
        which = f"no {device}" if number else "no card"
        raise DeviceError(f"nvidia-smi shows {which} here; name one with --gpu, or give --memory")
    return this_machine()


def _request(question: str, attach: list[str], detail: Any, system: str | None, max_tokens: int) -> "Request":  # noqa: ANN401
    from memphi.request import Request, SamplingParams

    media = options.with_detail(open_attachments(attach), detail)
    return Request.ask(question, media, system, SamplingParams(max_tokens))


# --- what a request costs ------------------------------------------------------------------------------------------


class _Verdict:
    """One request's price, whether it fits, and what would make it fit."""

    def __init__(
        self,
        request: "Request",
        config: "ModelConfig",
        tokenizer: "Tokenizer",
        made: "MemoryPlan",
        facts: "DeviceFacts",
        engine: "EngineConfig",
        dtype_bytes: int,
    ) -> None:
        from memphi.engine.pressure import bounds_of

        self.request, self.config, self.tokenizer = request, config, tokenizer
        self.made, self.facts, self.engine, self.dtype_bytes = made, facts, engine, dtype_bytes
        self.bounds = bounds_of(made, engine, config)
        self.footprint = self._measure(request)
        self.price = self._price(self.footprint)

    @property
    def fits(self) -> bool:
        return self._refuse(self.footprint) is None

    @property
    def answer_tokens(self) -> int:
        """What may be answered."""
        return min(self.request.sampling.max_tokens or sys.maxsize, self.bounds.answer_tokens(self.footprint))

    def document(self) -> dict[str, Any]:
        footprint, price = self.footprint, self.price
        return {
            "fits": self.fits,
            "mode": footprint.mode.name.lower(),
            "tokens": {
                "text": footprint.text_tokens,
                "images": [image.tokens for image in footprint.images],
                "audio": [clip.tokens for clip in footprint.clips],
                "prompt": footprint.prompt_tokens,
                "answer": self.answer_tokens if self.fits else 0,
            },
            "attachments": [media.name for media in self.request.media],
            "kinds": [media.kind for media in self.request.media],
            "crops": [image.crops for image in footprint.images],
            "seconds_of_sound": [clip.seconds for clip in footprint.clips],
            "pages": price.pages,
            "vision_passes": price.vision_passes,
            "audio_passes": price.audio_passes,
            "costs": [asdict(cost) for cost in price.costs],
        }

    def refusal(self) -> str:
        """One sentence: what is needed, what there is, what would work."""
        refused = self._refuse(self.footprint)
        assert refused is not None, "it fits"
        needed = refused.needed_tokens
        ways = [
            self._with_less_answer(),
            self._in_low_detail(),
            *self._with_less(needed),
            self._with_more_memory(needed),
        ]
        advice = ", or ".join(way for way in ways if way)
        return (
            f"this request does not fit: with its answer it needs {needed} tokens and there is room for "
            f"{refused.available_tokens}; " + (f"what would work: {advice}" if advice else "shorten the text")
        )

    def _refuse(self, footprint: "Footprint") -> "Refuse | None":
        return self.bounds.refuse(footprint, self.request.sampling)

    def _with_less_answer(self) -> str | None:
        rest = self.bounds.answer_tokens(self.footprint)
        return f"--max-tokens {rest}" if rest >= 1 else None

    def _in_low_detail(self) -> str | None:
        coarse = tuple(
            replace(part, detail="low") if not isinstance(part, str) else part
            for part in self.request.messages[-1].content
        )
        messages = (*self.request.messages[:-1], replace(self.request.messages[-1], content=coarse))
        least = self._measure(replace(self.request, messages=messages))
        return f"--detail low ({least.prompt_tokens} tokens)" if self._refuse(least) is None else None

    def _with_less(self, needed: int) -> list[str]:
        """How many of the attachments, or how much of a lone recording, would fit."""
        footprint = self.footprint
        room = self.bounds.tokens - (needed - footprint.image_tokens - footprint.audio_tokens)
        sizes = sorted([image.tokens for image in footprint.images] + [clip.tokens for clip in footprint.clips])
        if len(sizes) > 1:
            count = sum(1 for i in range(len(sizes)) if sum(sizes[: i + 1]) <= room)
            return [f"the {count} smallest of the {len(sizes)} attachments at a time"] if count else []
        if footprint.clips and room > 0:
            return [f"a recording of at most {_duration(room * self.config.audio.compression / 100)}"]
        return []

    def _with_more_memory(self, needed: int) -> str | None:
        """The smallest dial under which it fits, in tenths of a GiB."""
        from memphi.engine.pressure import bounds_of
        from memphi.memory.planner import make_plan

        endless = replace(self.facts, total_bytes=LARGEST_DEVICE_BYTES, free_bytes=LARGEST_DEVICE_BYTES)
        tenth = (1 << 30) // 10 + 1

        def fits(tenths: int) -> bool:
            engine = replace(self.engine, memory_bytes=tenths * tenth, scheme=self.made.scheme)
            plan = make_plan(self.config, endless, engine, self.dtype_bytes)
            return bounds_of(plan, engine, self.config).tokens >= needed

        low = self.made.budget_bytes // tenth + 1
        high = low + 1
        while not fits(high):
            high += high - low
            if high * tenth > LARGEST_DEVICE_BYTES // 2:
                return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        where = "" if low * tenth <= self.facts.free_bytes else " on a device that has it"
        # With more, auto would choose weights that leave less.
        keeping = "" if self.made.scheme == "bf16" or self.engine.scheme != "auto" else f" --scheme {self.made.scheme}"
        return f"--memory {low / 10:.1f}GiB{keeping}{where}"

    def _measure(self, request: "Request") -> "Footprint":
        from memphi.inputs.prompt import measure

        return measure(request, self.config, self.tokenizer)

    def _price(self, footprint: "Footprint") -> "RequestPrice":
        from memphi.memory.costs import price_request

        made = self.made
        answer = max(self.answer_tokens, 0)
        return price_request(
            footprint,
            self.config,
            answer,
            made.crops_per_pass,
            made.windows_per_pass,
            self.dtype_bytes,
            made.preprocessing,
            made.cache_format,
        )


# --- what is printed -----------------------------------------------------------------------------------------------


def _document(
    model: str, dtype: str, facts: "DeviceFacts", made: "MemoryPlan", config: "ModelConfig"
) -> dict[str, Any]:
    plan = asdict(made)
    reasons, costs = plan.pop("reasons"), plan.pop("costs")
    return {
        "model": model,
        "dtype": dtype,
        "device": asdict(facts),
        "plan": plan,
        "reasons": reasons,
        "fits": _examples(made, config),
        "costs": costs,
    }


def _examples(made: "MemoryPlan", config: "ModelConfig") -> list[dict[str, Any]]:
    """What one prompt may hold: so many pictures of a size, and the longest recording."""
    from memphi.inputs.image import footprint
    from memphi.inputs.media import DEFAULT_LIMITS
    from memphi.memory.costs import FIRST_ANSWER_TOKENS

    room = max(made.context_tokens - QUESTION_TOKENS - FIRST_ANSWER_TOKENS, 0)
    examples: list[dict[str, Any]] = []
    for name, (width, height) in EXAMPLE_PICTURES.items():
        picture = footprint(width, height, config.vision)
        most = room // picture.tokens
        examples.append({"name": name, "most": most, "tokens_each": picture.tokens, "crops_each": picture.crops})
    seconds = min(room * config.audio.compression / 100, DEFAULT_LIMITS.seconds)
    limited = seconds == DEFAULT_LIMITS.seconds
    return [*examples, {"name": "one recording", "most_seconds": seconds, "limited_by_length": limited}]


def _text(document: dict[str, Any]) -> str:
    device, plan = document["device"], document["plan"]
    kept = document["dtype"] if plan["scheme"] == "bf16" else f"{plan['scheme']} and {document['dtype']}"
    lines = [f"{document['model']} in {kept} on {device['name']}", "", "memory"]
    lines += _rows(_memory_rows(plan, document["reasons"]))
    if plan["placement"] != "resident":
        lines += ["", "where the weights lie", *_rows(_group_rows(plan))]
    lines += ["", "what a step does, and what fits into one prompt"]
    lines += _rows([*_size_rows(plan, document["reasons"]), *map(_example_row, document["fits"])])
    lines += ["", "what each thing takes"]
    lines += _rows([(cost["name"], _size(cost["bytes"]), cost["formula"]) for cost in document["costs"]])
    if "request" in document:
        lines += ["", "this request", *_rows(_request_rows(document["request"]))]
    if (capability := device["capability"]) and capability[0] < 8 and document["dtype"] == "bf16":
        lines += ["", f"{device['name']} has no units for bf16: --dtype fp16 is faster there"]
    return "\n".join(lines)


def _rows(rows: list[tuple[str, str, str]]) -> list[str]:
    """Three columns; the last is wrapped to the width of the terminal."""
    wide, number = (max(len(row[i]) for row in rows) for i in (0, 1))
    indent = " " * (wide + number + 6)
    width = max(shutil.get_terminal_size((120, 0)).columns, len(indent) + 40)
    lines: list[str] = []
    for name, value, why in rows:
        start = f"  {name:<{wide}}  {value:>{number}}  "
        lines += textwrap.wrap(why, width, initial_indent=start, subsequent_indent=indent) or [start.rstrip()]
    return lines


def _memory_rows(plan: dict[str, Any], reasons: dict[str, str]) -> list[tuple[str, str, str]]:
    names = {
        "context_bytes": "context",
        "weights_bytes": "weights",
        "workspace_bytes": "work space",
        "pool_bytes": "keys and values",
        "media_bytes": "media embeddings",
        "graphs_bytes": "graphs",
        "budget_bytes": "in all",
    }
    shown = {field: name for field, name in names.items() if plan[field] or field != "graphs_bytes"}
    return [(name, _size(plan[field]), reasons[field]) for field, name in shown.items()]


def _size_rows(plan: dict[str, Any], reasons: dict[str, str]) -> list[tuple[str, str, str]]:
    names = {
        "context_tokens": "tokens of context",
        "rows": "rows at once",
        "step_tokens": "tokens a step",
        "shared_step_tokens": "… beside answers",
        "crops_per_pass": "crops a pass",
        "windows_per_pass": "windows of sound a pass",
        "cache_format": "cache format",
        "adapters": "adapters",
        "preprocessing": "crops, mel frames on",
        "scheme": "scheme of the weights",
        "placement": "placement of the weights",
    }
    values = {"host": "the host", "device": "the device"}
    return [(name, values.get(plan[field], str(plan[field])), reasons[field]) for field, name in names.items()]


def _group_rows(plan: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The map: each group of the weights, its size, and where it lies."""
    return [
        (group["name"], _size(group["bytes"]), f"on the {group['where']}: {group['reason']}")
        for group in plan["groups"]
    ]


def _example_row(example: dict[str, Any]) -> tuple[str, str, str]:
    if "most" in example:
        why = f"{example['tokens_each']} tokens and {example['crops_each']} crops each"
        return example["name"], str(example["most"]), why
    why = "the longest that memphi takes" if example["limited_by_length"] else "12.5 tokens a second"
    return example["name"], _duration(example["most_seconds"]), why


def _request_rows(request: dict[str, Any]) -> list[tuple[str, str, str]]:
    tokens = request["tokens"]
    rows = [("text", f"{tokens['text']} tokens", "")]
    parts = {
        "image": iter([(t, f"{c} crops") for t, c in zip(tokens["images"], request["crops"], strict=True)]),
        "audio": iter([(t, _duration(s)) for t, s in zip(tokens["audio"], request["seconds_of_sound"], strict=True)]),
    }
    for name, kind in zip(request["attachments"], request["kinds"], strict=True):
        count, what = next(parts[kind])
        rows.append((name, f"{count} tokens", what))
    rows.append(("prompt", f"{tokens['prompt']} tokens", f"and {tokens['answer']} of an answer"))
    rows += [(cost["name"], _size(cost["bytes"]), cost["formula"]) for cost in request["costs"]]
    if request["vision_passes"]:
        rows.append(("vision passes", str(request["vision_passes"]), f"for {sum(request['crops'])} crops"))
    if request["audio_passes"]:
        rows.append(("audio passes", str(request["audio_passes"]), "through the encoder"))
    rows.append(("fits", "yes" if request["fits"] else "no", ""))
    return rows


def _size(n_bytes: int) -> str:
    from memphi.memory.costs import size_text

    return size_text(n_bytes)


def _duration(seconds: float) -> str:
    """Rounded down to whole seconds: 40 s, 12 min 5 s, 1 h 46 min."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
