"""How far memphi's bf16 is from exact at full size, and how far transformers' own bf16 is.

Random weights of the official sizes, all four input modes. The reference is memphi in fp32 on the same weights, which
must equal transformers in fp32. Usage: python -m benchmarks.parity --out FILE
"""

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.document import write_document
from memphi import official
from memphi.checkpoint.random import random_model
from memphi.config import ModelConfig
from memphi.inputs.prompt import prepare
from memphi.inputs.tokenizer import Tokenizer
from memphi.oracle import (
    build_oracle,
    fill_oracle,
    import_transformers,
    merge_adapter,
    model_weights,
    transformers_name,
)
from memphi.request import Media, MediaKind, Prompt, Request, Samples
from memphi.verify import trace_memphi, trace_oracle

LARGEST_ERROR = 2e-2
"""What memphi's bf16 may be off from its fp32."""
LARGEST_RATIO = 1.1
"""How much larger than transformers' bf16 error memphi's may be."""
LARGEST_REFERENCE_ERROR = 1e-4
"""What the two fp32 runs may differ by."""


class LiveAdapter(nn.Module):
    """A linear of transformers' with an adapter beside it, as PEFT computes it."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x, self.a), self.b) * self.scale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    # fp32 must be fp32: convolutions would otherwise round their inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = official.folder()
    figures = measure(ModelConfig.from_folder(folder), Tokenizer.from_folder(folder), device)
    write_document(arguments.out, device, arguments.commit, figures)
    return 0 if figures["holds"] else 1


def measure(config: ModelConfig, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """Run everything, the fp32 and the bf16 models one after the other, and put the figures together."""
    started = time.perf_counter()
    prompts = [prepare(request, config, tokenizer) for request in sample_requests(config)]
    weights, runs = _run_memphi(config, prompts, device)
    placeholders: dict[MediaKind, int] = {"image": tokenizer.image_id, "audio": tokenizer.audio_id}
    for dtype in (torch.bfloat16, torch.float32):
        _free_memory()
        oracle = build_oracle(config, placeholders, device, dtype)
        fill_oracle(oracle, config, weights)
        runs |= _run_oracle(oracle, config, weights, prompts, dtype)
        del oracle
    modes = {
        prompt.mode.name.lower(): compare({name: logits[i] for name, logits in runs.items()}, len(prompt.ids))
        for i, prompt in enumerate(prompts)
    }
    return {
        "transformers": import_transformers().__version__,
        "limits": {
            "memphi bf16 error": LARGEST_ERROR,
            "ratio to transformers": LARGEST_RATIO,
            "fp32 difference": LARGEST_REFERENCE_ERROR,
        },
        "holds": all(mode["holds"] for mode in modes.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "modes": modes,
    }


def sample_requests(config: ModelConfig) -> list[Request]:
    """One request in each mode: 2 x 2 crops without padding, 15 s of sound (one clip), some hundred tokens of text."""
    random = np.random.default_rng(0)
    side = 2 * config.vision.crop_size
    picture = Media("image", "noise", random.integers(0, 256, (side, side, 3), dtype=np.uint8), "image")
    samples = Samples(0.1 * random.standard_normal(15 * 16000).astype(np.float32), 16000)
    sound = Media("audio", "noise", samples, "audio")
    text = " ".join(f"{number} and {number * number} are numbers." for number in range(40))
    return [Request.ask(text), *(Request.ask("", media) for media in ([picture], [sound], [picture, sound]))]


def compare(runs: Mapping[str, Tensor], prompt_tokens: int) -> dict[str, Any]:
    """One mode's figures, all errors relative to memphi in fp32."""
    reference = runs["memphi fp32"]
    errors = {name: float((run - reference).norm() / reference.norm()) for name, run in runs.items()}
    best = reference.argmax(-1)
    top1 = {name: float((run.argmax(-1) == best).float().mean()) for name, run in runs.items()}
    ratio = errors["memphi bf16"] / errors["transformers bf16"]
    return {
        "prompt_tokens": prompt_tokens,
        "compared_tokens": reference.shape[0],
        "relative_error": errors,
        "top1_agreement": top1,
        "ratio": ratio,
        "holds": errors["memphi bf16"] <= LARGEST_ERROR
        and ratio <= LARGEST_RATIO
        and errors["transformers fp32"] <= LARGEST_REFERENCE_ERROR,
    }


def _run_memphi(
    config: ModelConfig, prompts: Sequence[Prompt], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """The bf16 weights, and the logits of every prompt in bf16 and, on the same weights, in fp32."""
    model = random_model(config, device, torch.bfloat16)
    weights = model_weights(model)
    runs = {"memphi bf16": [trace_memphi(model, prompt, 0).logits for prompt in prompts]}
    model = model.float()
    runs["memphi fp32"] = [trace_memphi(model, prompt, 0).logits for prompt in prompts]
    return weights, runs


def _run_oracle(
    oracle: Any,  # noqa: ANN401
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    dtype: torch.dtype,
) -> dict[str, list[Tensor]]:
    """transformers' logits of every prompt: in bf16 with merged adapters, then in either dtype with live ones."""
    runs: dict[str, list[Tensor]] = {}
    if dtype == torch.bfloat16:
        runs["transformers bf16 merged"] = merged = []
        for prompt in prompts:
            merge_adapter(oracle, config, weights, prompt.mode.adapter)
            merged.append(trace_oracle(oracle, prompt, 0).logits)
        merge_adapter(oracle, config, weights, None)
    runs[f"transformers {'bf16' if dtype == torch.bfloat16 else 'fp32'}"] = live = []
    for prompt in prompts:
        originals = _attach(oracle, config, weights, prompt.mode.adapter)
        live.append(trace_oracle(oracle, prompt, 0).logits)
        for name, module in originals.items():
            oracle.set_submodule(name, module)
    return runs


def _attach(
    oracle: Any,  # noqa: ANN401
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    adapter: str | None,
) -> dict[str, nn.Module]:
    """Put a live adapter beside every linear that has one; returns the modules replaced, by name."""
    originals: dict[str, nn.Module] = {}
    for official_name in weights if adapter else ():
        linear, base, _ = official_name.partition(".base_layer.weight")
        if base:
            name = transformers_name(official_name).removesuffix(".weight")
            originals[name] = oracle.get_submodule(name)
            a, b = (weights[f"{linear}.lora_{part}.{adapter}.weight"].to(oracle.dtype) for part in "AB")
            oracle.set_submodule(name, LiveAdapter(originals[name], a, b, config.adapter(str(adapter)).scale))
    return originals


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
