"""Does memphi compute what transformers' own Phi-4-multimodal computes from the same files?

Runs the two one after the other, mode by mode, on inputs where they agree by design (one clip, crops without padding)
and compares logits. Reads the oracle's weights with the safetensors library and renames them by a list of its own, so
that a mistake in memphi's reader or table of names shows too. Called by the CLI; the tests use its parts.
"""

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from memphi.cache.contiguous import ContiguousCache
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
from memphi.checkpoint.names import official_name
from memphi.checkpoint.random import random_model
from memphi.config import ModelConfig
from memphi.errors import CheckpointError, MemphiError
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.phi4mm import Phi4MM
from memphi.model.rows import Row
from memphi.request import InputMode, Media, Prompt, Request, Samples

Progress = Callable[[str], None]
"""Called with what is being done, in a few words."""

COMPARED_TOKENS = 64
"""About how many of a prompt's positions have their logits kept; all of them would take gigabytes."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""The largest relative error that counts as agreement; transformers' merged adapters round once more than ours."""

_INSTALL = 'comparing needs transformers with Phi-4-multimodal; install it with: pip install "memphi[verify]"'
_UNUSED = re.compile(r"(.*\.img_processor\.(head|post_layernorm)\..*|lm_head\.weight)")
_RENAMES = (
    (r"\.base_layer\.", "."),
    (r"\.(feed_forward_\w+)\.net\.0\.linear\.", r".\1.gate_up_proj."),
    (r"\.(feed_forward_\w+)\.net\.2\.", r".\1.down_proj."),
    (r"\.self_attn\.linear_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.img_projection\.0\.", ".img_projection_up."),
    (r"\.img_projection\.2\.", ".img_projection_down."),
    (r"\.glb_GN$", ".global_img_feature_extensor"),
    (r"\.sub_GN$", ".sub_img_feature_extensor"),
    (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
    (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
    (r"\.audio_projection\.vision\.0\.", ".up_proj_for_vision_speech."),
    (r"\.audio_projection\.vision\.2\.", ".down_proj_for_vision_speech."),
)


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

    model is a folder, a hub name or `random`; oracle another one that transformers runs instead, to see what differs.
    Device memory: one model at a time. Raises CheckpointError, and MemphiError where transformers is missing.
    """
    import_transformers()
    say = progress or (lambda _: None)
    here = locate(model)
    there = here if oracle is None else locate(oracle)
    config = read_config(here.folder)
    tokenizer = Tokenizer.from_folder(here.folder)
    prompts = [prepare(request, config, tokenizer) for request in sample_requests(config, seed)]
    say("memphi: loading")
    network = random_model(config, device, dtype) if here.random else load_model(here.folder, device, dtype)
    ours = [_named(say, "memphi", prompt, trace_memphi(network, prompt, new_tokens)) for prompt in prompts]
    weights = model_weights(network) if there.random else StoredWeights(there.folder)
    del network
    _free_memory()
    say("transformers: loading")
    theirs = list(_trace_transformers(config, weights, tokenizer, prompts, new_tokens, device, dtype, say))
    return [compare(p, a, b, TOLERANCES[dtype]) for p, a, b in zip(prompts, ours, theirs, strict=True)]
