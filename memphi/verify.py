"""Does memphi compute what transformers' own Phi-4-multimodal computes from the same files?

Runs the two one after the other, mode by mode, on inputs where they agree by design (one clip, crops without padding),
and compares logits. For people who have the weights; called by the CLI.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from memphi.cache.pool import make_pool
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import Location, locate
from memphi.checkpoint.random import random_model
from memphi.config import ModelConfig
from memphi.errors import CheckpointError
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.memory.costs import PAGE_TOKENS
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.oracle import (
    StoredWeights,
    build_oracle,
    fill_oracle,
    import_transformers,
    merge_adapter,
    model_weights,
    oracle_inputs,
)
from memphi.request import InputMode, Media, MediaKind, Prompt, Request, Samples

Progress = Callable[[str], None]
"""Called with what is being done, in a few words."""

COMPARED_TOKENS = 64
"""About how many of a prompt's positions have their logits kept; all of them would take gigabytes."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The largest relative error that counts as agreement."""


@dataclass(frozen=True)
class ModeReport:
    """How far the two are apart in one input mode."""

    mode: InputMode
    prompt_tokens: int
    compared_tokens: int
    largest: float
    """The largest difference of a logit."""
    mean: float
    """The mean difference of the logits."""
    relative: float
    """|ours - theirs| / |theirs|, over all logits compared."""
    top1: float
    """The share of positions at which both prefer the same token."""
    tolerance: float
    ours: tuple[int, ...]
    """The greedy answer's first ids; where two logits nearly tie, rounding alone can part the answers."""
    theirs: tuple[int, ...]

    @property
    def agrees(self) -> bool:
        """Whether the relative error is within the dtype's tolerance; never where a logit is not a number."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Trace:
    """What one of the two computed for one prompt."""

    logits: Tensor  # [compared_tokens, vocab_size] fp32 on the host
    answer: tuple[int, ...]


@dataclass(frozen=True)
class _Task:
    """What both have to do."""

    config: ModelConfig
    placeholders: Mapping[MediaKind, int]
    prompts: tuple[Prompt, ...]
    new_tokens: int
    device: torch.device
    dtype: torch.dtype
    say: Progress


def verify(
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    oracle: str | None = None,
    new_tokens: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[ModeReport]:
    """Compare memphi with transformers on the weights of `model`, in all four input modes.

    model is a folder, a hub name or `random`; oracle is another one for transformers to run, to see what differs.
    Device memory: one model at a time, for `random` two. Raises CheckpointError, and MemphiError where transformers is
    missing.
    """
    import_transformers()
    location = locate(model)
    config = read_config(location.folder)
    if config.scheme != "bf16":
        raise CheckpointError(
            f"{model} holds weights in {config.scheme}, which transformers cannot read; verify the folder that it was "
            "made from"
        )
    tokenizer = Tokenizer.from_folder(location.folder)
    prompts = tuple(prepare(request, config, tokenizer) for request in sample_requests(config, seed))
    placeholders: dict[MediaKind, int] = {"image": tokenizer.image_id, "audio": tokenizer.audio_id}
    task = _Task(config, placeholders, prompts, new_tokens, device, dtype, progress or (lambda _: None))
    ours = _run_memphi(location, task)
    _free_memory(device)
    theirs = _run_transformers(location if oracle is None else locate(oracle), task)
    return [compare(*traces, TOLERANCES[dtype]) for traces in zip(prompts, ours, theirs, strict=True)]


def sample_requests(config: ModelConfig, seed: int) -> list[Request]:
    """One request in each mode, whose picture fills its two crops and whose sound lasts 2 s."""
    random = np.random.default_rng(seed)
    side = config.vision.crop_size
    pixels = random.integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
    samples = Samples(0.1 * random.standard_normal(32000).astype(np.float32), 16000)
    picture, sound = Media("image", "noise", pixels, "image"), Media("audio", "noise", samples, "audio")
    return [
        Request.ask("Name three rivers and the seas they reach."),
        Request.ask("Describe the image in detail.", [picture]),
        Request.ask("Transcribe the audio clip into text.", [sound]),
        Request.ask("", [picture, sound]),
    ]


def compare(prompt: Prompt, ours: Trace, theirs: Trace, tolerance: float) -> ModeReport:
    """The figures of one mode."""
    difference = ours.logits - theirs.logits
    return ModeReport(
        mode=prompt.mode,
        prompt_tokens=len(prompt.ids),
        compared_tokens=difference.shape[0],
        largest=float(difference.abs().max()),
        mean=float(difference.abs().mean()),
        relative=float(difference.norm() / theirs.logits.norm()),
        top1=float((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).float().mean()),
        tolerance=tolerance,
        ours=ours.answer,
        theirs=theirs.answer,
    )


def compared_positions(tokens: int) -> list[int]:
    """About COMPARED_TOKENS positions of a prompt, evenly spread, and its last."""
    return sorted({*range(0, tokens, max(tokens // COMPARED_TOKENS, 1)), tokens - 1})


@torch.inference_mode()
def trace_memphi(model: Phi4MM, prompt: Prompt, new_tokens: int) -> Trace:
    """A prompt's logits and greedy answer, from a prefill and single-token steps; starts over in the long regime."""
    media = model.encode_media(prompt)
    ids, past = list(prompt.ids), 0
    long = model.config.language.is_long(len(ids))
    pages = tuple(range(-(-(len(ids) + new_tokens) // PAGE_TOKENS)))
    pool = make_pool(model.config.language, len(pages), model.dtype, model.device)
    pool.ensure(pages)

    def advance(at: Sequence[int] | None) -> Tensor:
        row = Row(len(ids) - past, past, prompt.mode.adapter, long, pages)
        new_ids = torch.tensor(ids[past:], device=model.device)
        return cast(Tensor, model(new_ids, [row], () if past else media, pool, at))

    logits = advance(compared_positions(len(ids)))
    last = logits[-1]
    for step in range(new_tokens):
        past = len(ids) - 1
        if step > 0:
            if model.config.language.is_long(len(ids)) != long:
                long, past = True, 0
            last = advance(None)[0]
        ids.append(int(last.argmax()))
    return Trace(logits.float().cpu(), tuple(ids[len(prompt.ids) :]))


@torch.inference_mode()
def trace_oracle(oracle: Any, prompt: Prompt, new_tokens: int) -> Trace:  # noqa: ANN401
    """As `trace_memphi`, by transformers' model.

    It generates without a cache, because with one it goes wrong where an answer crosses into the long regime: there it
    drops the cache, but (5.24) still computes the newest token only.
    """
    inputs = oracle_inputs(prompt, oracle.device)
    positions = torch.tensor(compared_positions(len(prompt.ids)), device=oracle.device)
    logits = oracle(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    answer = (
        oracle.generate(**inputs, max_new_tokens=new_tokens, use_cache=False)[0, len(prompt.ids) :]
        if new_tokens
        else ()
    )
    return Trace(logits.float().cpu(), tuple(int(i) for i in answer))


def _run_memphi(location: Location, task: _Task) -> list[Trace]:
    task.say("memphi: loading")
    if location.random:
        model = random_model(task.config, task.device, task.dtype)
    else:
        model = load_model(location.folder, task.device, task.dtype)
    traces = []
    for prompt in task.prompts:
        task.say(f"memphi: {prompt.mode.name.lower()}")
        traces.append(trace_memphi(model, prompt, task.new_tokens))
    return traces


def _run_transformers(location: Location, task: _Task) -> list[Trace]:
    task.say("transformers: loading")
    weights: Mapping[str, Tensor]
    if location.random:
        weights = model_weights(random_model(task.config, task.device, task.dtype))
    else:
        weights = StoredWeights(location.folder)
    oracle = build_oracle(task.config, task.placeholders, task.device, task.dtype)
    fill_oracle(oracle, task.config, weights)
    traces = []
    for prompt in task.prompts:
        task.say(f"transformers: {prompt.mode.name.lower()}")
        merge_adapter(oracle, task.config, weights, prompt.mode.adapter)
        traces.append(trace_oracle(oracle, prompt, task.new_tokens))
    return traces


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
