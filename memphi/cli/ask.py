"""`memphi ask`: one question about any number of pictures and recordings."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memphi.cli import options
from memphi.cli.terminal import (
    attachment_name,
    failures_recorded,
    load_engine,
    open_attachments,
    stream_answer,
    tell,
    telling,
)
from memphi.config import DEFAULT_MODEL
from memphi.errors import MediaError, MemphiError

if TYPE_CHECKING:
    from memphi.engine.engine import Engine
    from memphi.request import Request, Result

    Named = tuple[str, Request | MediaError]
    """An attachment's name, and what is asked about it or why it cannot be opened."""


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

    def request(sources: list[str]) -> Request:
        media = options.with_detail(open_attachments(sources), detail)
        return Request.ask(question, media, system, sampling, on_pressure)

    # Attachments are opened first: a wrong name should not have to wait for the model.
    requests: list[Named] = _request_each(request, attach) if each else [("", request(attach))]
    engine = None
    if any(isinstance(asked, Request) for _, asked in requests):
        engine = load_engine(model, device, dtype, attention, config, allocator, debug_cuda)
    answer = _answer_as_json if as_json else _answer_as_text
    if (failed := answer(engine, requests, each)) is not None:
        raise typer.Exit(failed)


def _request_each(request: "Callable[[list[str]], Request]", sources: list[str]) -> "list[Named]":
    """A request about each attachment alone, or why it cannot be opened."""
    requests: list[Named] = []
    for source in sources:
        try:
            requests.append((attachment_name(source), request([source])))
        except MediaError as error:
            requests.append((attachment_name(source), error))
    return requests


def _opened(engine: "Engine | None", request: "Request | MediaError") -> "tuple[Engine, Request]":
    """Both as they are; raises the error where the attachment could not be opened."""
    if isinstance(request, MediaError):
        raise request
    assert engine is not None, "an engine is loaded where there is a request"
    return engine, request


def _answer_as_text(engine: "Engine | None", requests: "list[Named]", each: bool) -> int | None:
    """Stream the answers; with `each`, a request that fails is told and the rest go on.

    Returns the exit code of the first that failed, None if none did.
    """
    failed = None
    for name, request in requests:
        try:
            stream_answer(*_opened(engine, request), f"{name}: " if each else "")
        except MemphiError as error:
            if not each:
                raise
            tell(str(error) if isinstance(error, MediaError) else f"{name}: {error}")
            failed = failed or error.exit_code
    return failed


def _answer_as_json(engine: "Engine | None", requests: "list[Named]", each: bool) -> int | None:
    """Print one document, or with `each` a list, in which a request that fails has its error for an answer."""
    documents, failed = list[dict[str, Any]](), None
    with telling("answering") as show:
        for number, (name, asked) in enumerate(requests, 1):
            show(f"answering {number} of {len(requests)}")
            try:
                loaded, request = _opened(engine, asked)
                with failures_recorded():
                    documents.append(_document(request, loaded.generate(request)))
            except MemphiError as error:
                if not each:
                    raise
                documents.append({"attachments": [name], "error": str(error)})
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
