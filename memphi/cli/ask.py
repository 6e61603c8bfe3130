"""`memphi ask`: one question about any number of pictures and recordings."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memphi.cli import options
from memphi.cli.terminal import load_engine, open_attachments, stream_answer, telling
from memphi.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.request import Request, Result


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
    # Attachments are opened first: a wrong name should not have to wait for the model.
    media = open_attachments(attach)
    groups = [(item,) for item in media] if each else [media]
    requests = [Request.ask(question, group, system, sampling) for group in groups]
    engine = load_engine(model, device, dtype, attention)
    if as_json:
        documents = _answer_all(engine, requests)
        print(json.dumps(documents if each else documents[0], ensure_ascii=False, indent=2))
        return
    for request in requests:
        if each:
            print(f"{request.media[0].name}: ", end="")
        stream_answer(engine, request)


def _answer_all(engine: "Engine", requests: "list[Request]") -> list[dict[str, Any]]:
    documents = []
    with telling("answering") as tell:
        for number, request in enumerate(requests, 1):
            tell(f"answering {number} of {len(requests)}")
            documents.append(_document(request, engine.generate(request)))
    return documents


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
