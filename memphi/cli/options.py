"""The options that several commands share."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memphi.engine.settings import AllocatorName

if TYPE_CHECKING:
    from memphi.config import AdapterName, CacheChoice, EngineConfig, KernelChoice, SchemeChoice
    from memphi.request import Detail as DetailValue
    from memphi.request import Grammar, Media

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes from 8GiB, 8G (the same), 8GB (a little less), 512MiB or a plain number; raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMGT]?)(I?)(B?)", text.strip().upper())
    n_bytes = 0
    if match:
        number, unit, binary, byte = match.groups()
        base = 1000 if byte and unit and not binary else 1024
        n_bytes = int(float(number) * base ** _UNITS[unit])
    if n_bytes < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 8GiB, 8GB, 8G, 512MiB or a number of bytes")
    return n_bytes


def parse_devices(text: str) -> tuple[str, ...]:
    """One device as it is written, or GPUs with commas between; raises typer.BadParameter."""
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1:
        return (text,)
    indices = [re.fullmatch(r"cuda(?::(\d+))?", name) for name in names]
    wrong = next((name for name, match in zip(names, indices, strict=True) if match is None), None)
    if wrong is not None:
        raise typer.BadParameter(f"{wrong!r} stands in a list; several devices are GPUs, as in cuda:0,cuda:1")
    devices = [f"cuda:{int(match[1] or 0)}" for match in indices if match is not None]
    twice = next((device for place, device in enumerate(devices) if device in devices[:place]), None)
    if twice is not None:
        raise typer.BadParameter(f"{twice} is there twice; every GPU runs one engine")
    return tuple(devices)


def parse_detail(text: str) -> "DetailValue":
    """low, auto, high, or a number of crops; raises typer.BadParameter."""
    if text in ("low", "auto", "high"):
        return text  # type: ignore[return-value]
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"{text!r} is no detail; write low, auto, high, or the most crops besides the global view")


def check_attachments(sources: list[str]) -> list[str]:
    """The same; raises typer.BadParameter where stdin would be read twice."""
    if sources.count("-") > 1:
        raise typer.BadParameter("stdin (-) can be attached once")
    return sources


def engine_config(
    memory: int | None,
    kv_cache: str,
    pins: list[str],
    merge: "AdapterName | None" = None,
    speculation: bool = True,
    kernels: "KernelChoice" = "auto",
    scheme: "SchemeChoice" = "auto",
    cache_format: "CacheChoice" = "auto",
) -> "EngineConfig":
    """The dial, pins, and how things are computed; raises typer.BadParameter for a pin that means nothing."""
    from memphi.config import EngineConfig

    names = ("rows", "step_tokens", "crops_per_pass", "windows_per_pass")
    values: dict[str, Any] = {}
    for pin in pins:
        name, _, number = pin.partition("=")
        if name not in names or not (number.isascii() and number.isdigit() and int(number)):
            raise typer.BadParameter(
                f"{pin!r} pins nothing; write a number for one of {', '.join(names)}, as in rows=4"
            )
        values[name] = int(number)
    return EngineConfig(
        memory_bytes=memory,
        kv_cache=kv_cache == "on",
        merge=merge,
        speculation=speculation,
        kernels=kernels,
        scheme=scheme,
        cache_format=cache_format,
        **values,
    )


def answer_grammar(schema: Path | None, regex: str | None) -> "Grammar | None":
    """What the answer is held to; raises typer.BadParameter for two wishes at once and a file that holds no schema."""
    from memphi.request import Grammar

    if schema is None:
        return None if regex is None else Grammar("regex", regex)
    if regex is not None:
        raise typer.BadParameter("an answer is held to a --schema or to a --regex, not to both")
    try:
        source = schema.read_text(encoding="utf-8")
        if not isinstance(json.loads(source), dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as wrong:
        raise typer.BadParameter(f"{schema} holds no JSON schema: {wrong}") from None
    return Grammar("json_schema", source)


def with_detail(media: "tuple[Media, ...]", detail: "DetailValue") -> "tuple[Media, ...]":
    """The same attachments, every image to be seen in this detail."""
    return tuple(replace(item, detail=detail) if item.kind == "image" else item for item in media)


Model = Annotated[
    str, typer.Option("--model", "-m", help="A folder, a hub name, `demo` (a shipped toy) or `random` (full size).")
]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N, cpu, or mps (untested).")]
Devices = Annotated[
    Any,  # a tuple of names: typer takes no parser for one
    typer.Option(
        "--device",
        parser=parse_devices,
        metavar="DEVICE",
        help="auto (one GPU, else the CPU), cuda:N, cpu, or mps (untested); or an engine on each of several GPUs: "
        "cuda:0,cuda:1 or all.",
    ),
]
Dtype = Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Number format of the weights.")]
AttentionBackend = Annotated[
    Literal["auto", "eager", "sdpa"], typer.Option("--attention", help="Attention backend; auto picks the fastest.")
]
Allocator = Annotated[
    AllocatorName,
    typer.Option(
        help="How torch cuts up a GPU's memory: its own way, in segments that grow, or split below 128 MB only."
    ),
]
DebugCuda = Annotated[
    bool,
    typer.Option(
        "--debug-cuda",
        help="Find a fault, slowly: show where on the GPU it happens, stop at the first NaN, keep records of memory.",
    ),
]
Attachments = Annotated[
    list[str],
    typer.Option(
        "--attach",
        "-a",
        callback=check_attachments,
        help="An image or a recording: path, URL, or - for stdin. May be repeated.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes, metavar="SIZE", help="A device's memory for everything, as in 8GiB; all sizes follow."
    ),
]
KvCache = Annotated[
    Literal["on", "off"],
    typer.Option("--kv-cache", help="off: compute everything anew for every token; slow, and the last resort."),
]
CacheFormat = Annotated[
    Literal["auto", "plain", "int8", "fp8"],
    typer.Option(
        "--cache-format",
        help="How keys and values are kept: plain: as computed; int8, fp8: in 8 bits, twice as many in the same "
        "memory; auto: plain, and int8 where memory is short.",
    ),
]
Speculation = Annotated[
    bool,
    typer.Option(
        help="Guess tokens that repeat what was read or said, and check them many at once; no answer changes by it."
    ),
]
Pins = Annotated[
    list[str],
    typer.Option(
        "--pin",
        metavar="NAME=NUMBER",
        help="Fix what would follow from the memory: rows, step_tokens, crops_per_pass or windows_per_pass.",
    ),
]
Merge = Annotated[
    Literal["vision", "speech"] | None,
    typer.Option(
        help="Add this adapter into the weights: it costs nothing, and only requests that use it are answered."
    ),
]
Scheme = Annotated[
    Literal["auto", "bf16", "int8", "int4", "fp8"],
    typer.Option(
        help="How weights are kept: bf16 as --dtype says, or quantised while they are read; auto: as exact as fits."
    ),
]
Kernels = Annotated[
    Literal["auto", "plain"],
    typer.Option(help="auto: memphi's own kernels and CUDA graphs where the card has them; plain: PyTorch's."),
]
Detail = Annotated[
    Any,  # a request's Detail: typer takes no such union
    typer.Option(
        parser=parse_detail, metavar="DETAIL", help="How finely images are seen: low, auto, high, or the most crops."
    ),
]
OnPressure = Annotated[
    Literal["wait", "shrink-images", "one-by-one", "refuse"],
    typer.Option(
        "--on-pressure",
        help="If memory is short: wait for it; if it never suffices, shrink pictures or answer one by one; or refuse "
        "at once.",
    ),
]
System = Annotated[str | None, typer.Option(help="A system prompt.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="New tokens at most.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same answer.")]
Stop = Annotated[list[str], typer.Option(help="End the answer at this text. May be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens whatever the model says.")]
Schema = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A file with a JSON schema; the answer is JSON that keeps to it.")
]
Regex = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The answer matches this regular expression as a whole.")
]
DEFAULT_MAX_TOKENS = 1024
ALL_GPUS = "all"
"""What stands for every GPU that can be seen."""
