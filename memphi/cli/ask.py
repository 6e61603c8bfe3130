"""`memphi ask`: one question about any number of pictures and recordings."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memphi.cli import options
from memphi.cli.terminal import failures_recorded, load_engine, open_attachments, stream_answer, telling
from memphi.config import DEFAULT_MODEL
from memphi.errors import MemphiError

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.request import Request, Result


def ask(
    question: Annotated[str, typer.Argument(help="What to ask; may be left out if a recording asks it.")] = "",
    attach: options.Attachments = [],  # noqa: B006
    each: Annotated[
        bool, typer.Option("--each", help="Ask about each attachment alone, in turn; one that fails is told.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the text.")] = False,
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    attention: options.AttentionBackend = "auto",
    memory: options.Memory = None,
    kv_cache: options.KvCache = "on",
    cache_format: options.CacheFormat = "auto",
    speculation: options.Speculation = True,
    pin: options.Pins = [],  # noqa: B006
    merge: options.Merge = None,
    kernels: options.Kernels = "auto",
    scheme: options.Scheme = "auto",
    allocator: options.Allocator = "default",
    debug_cuda: options.DebugCuda = False,
    detail: options.Detail = "auto",
    on_pressure: options.OnPressure = "wait",
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
    schema: options.Schema = None,
    regex: options.Regex = None,
) -> None:
    """Ask about pictures and recordings, or just ask. The answer alone goes to stdout."""
    from memphi.request import Request, SamplingParams

    if not question and not attach:
        raise typer.BadParameter("give a question, an attachment (-a), or both")
    if each and not attach:
        raise typer.BadParameter("--each needs attachments (-a)")
    config = options.engine_config(memory, kv_cache, pin, merge, speculation, kernels, scheme, cache_format)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        grammar=options.answer_grammar(schema, regex),
        seed=seed,
        ignore_eos=ignore_eos,
        stop=tuple(stop),
    )
    # Attachments are opened first: a wrong name should not have to wait for the model.
    media = options.with_detail(open_attachments(attach), detail)
    groups = [(item,) for item in media] if each else [media]
    requests = [Request.ask(question, group, system, sampling, on_pressure) for group in groups]
    engine = load_engine(model, device, dtype, attention, config, allocator, debug_cuda)
    answer = _answer_as_json if as_json else _answer_as_text
    if (failed := answer(engine, requests, each)) is not None:
        raise typer.Exit(failed)


def _answer_as_text(engine: "Engine", requests: "list[Request]", each: bool) -> int | None:
    """Stream the answers; with `each`, a request that fails is told and the rest go on.

    Returns the exit code of the first that failed, None if none did.
    """
    failed = None
    for request in requests:
        try:
            stream_answer(engine, request, f"{request.media[0].name}: " if each else "")
        except MemphiError as error:
            if not each:
                raise
            print(f"memphi: {error}", file=sys.stderr)
            failed = failed or error.exit_code
    return failed


def _answer_as_json(engine: "Engine", requests: "list[Request]", each: bool) -> int | None:
    """Print one document, or with `each` a list, in which a request that fails has its error for an answer."""
    documents, failed = list[dict[str, Any]](), None
    with telling("answering") as tell:
        for number, request in enumerate(requests, 1):
            tell(f"answering {number} of {len(requests)}")
            try:
                with failures_recorded():
                    documents.append(_document(request, engine.generate(request)))
            except MemphiError as error:
                if not each:
                    raise
                documents.append({"attachments": [media.name for media in request.media], "error": str(error)})
                failed = failed or error.exit_code
    print(json.dumps(documents if each else documents[0], ensure_ascii=False, indent=2))
    return failed


def _document(request: "Request", result: "Result") -> dict[str, Any]:
    footprint = result.footprint
    return {
        "answer": result.text,
        "finish_reason": result.finish_reason.value,
        "degraded": list(result.degraded),
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
