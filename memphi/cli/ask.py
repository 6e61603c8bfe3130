"""`memphi ask`: one question about any number of pictures and recordings."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memphi.cli import options
from memphi.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.request import Media, Request, Result


def ask(
    question: Annotated[str, typer.Argument(help="What to ask; may be left out if a recording asks it.")] = "",
    attach: options.Attachments = [],  # noqa: B006
    each: Annotated[bool, typer.Option("--each", help="Ask about each attachment alone, one after the other.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    attention: options.AttentionBackend = "auto",
    system: options.System = None,
    max_tokens: options.MaxTokens = options.DEFAULT_MAX_TOKENS,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = None,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    ignore_eos: options.IgnoreEos = False,
    stop: options.Stop = [],  # noqa: B006
) -> None:
    """Ask about pictures and recordings, or just ask. The answer alone goes to stdout."""
    from memphi.request import Request, SamplingParams

    if not question and not attach:
        raise typer.BadParameter("give a question, an attachment (-a), or both")
    if each and not attach:
        raise typer.BadParameter("--each needs attachments (-a)")
    sampling = SamplingParams(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, ignore_eos, tuple(stop)
    )
    media = open_attachments(attach)
    groups = [(item,) for item in media] if each else [media]
    requests = [Request.ask(question, group, system, sampling) for group in groups]
    engine = load_engine(model, device, dtype, attention)
    if as_json:
        results = [engine.generate(request) for request in requests]
        documents = [_document(request, result) for request, result in zip(requests, results, strict=True)]
        print(json.dumps(documents if each else documents[0], ensure_ascii=False, indent=2))
        return
    for request in requests:
        if each:
            print(f"{request.media[0].name}: ", end="")
        stream_answer(engine, request)


def open_attachments(sources: list[str]) -> "tuple[Media, ...]":
    """Open paths and URLs, and stdin for `-`."""
    from memphi.inputs.media import open_media

    if sources.count("-") > 1:
        raise typer.BadParameter("stdin (-) can be attached once")
    return tuple(
        open_media(sys.stdin.buffer.read(), name="stdin") if source == "-" else open_media(source) for source in sources
    )


def load_engine(model: str, device: str, dtype: Any, attention: Any) -> "Engine":  # noqa: ANN401
    """Load a model, telling on stderr that this takes a while."""
    from rich.console import Console

    with Console(stderr=True).status(f"loading {model}"):
        from memphi.engine.engine import load

        return load(model, device, dtype, attention)


def stream_answer(engine: "Engine", request: "Request") -> str:
    """Write an answer to stdout as it comes, and return it."""
    pieces = []
    for delta in engine.stream(request):
        pieces.append(delta.text)
        print(delta.text, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def _document(request: "Request", result: "Result") -> dict[str, Any]:
    footprint = result.footprint
    return {
        "answer": result.text,
        "finish_reason": result.finish_reason.value,
        "mode": footprint.mode.name.lower(),
        "attachments": [media.name for media in request.media],
        "tokens": {
            "text": footprint.text_tokens,
            "images": [image.tokens for image in footprint.images],
            "audio": [clip.tokens for clip in footprint.clips],
            "prompt": footprint.prompt_tokens,
            "answer": len(result.ids),
        },
        "seconds": round(result.seconds, 3),
        "first_token_seconds": round(result.first_token_seconds, 3),
        "peak_memory_bytes": result.peak_memory_bytes,
    }
