"""Random weights for a model of any size, made on the device in seconds.

They mean nothing, but they behave: activations stay finite in bf16 through all layers, both adapters change the answer,
and the best logit stands out from the next. For trying the engine, for measuring speed and memory, and for tests.
"""

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from memphi.checkpoint.names import adapted
from memphi.checkpoint.reader import Progress
from memphi.config import AdapterName, ModelConfig, Placement, Scheme
from memphi.model.adapters import merge_adapter
from memphi.model.attention import Attention
from memphi.model.meta import on_meta
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.swap import pieces, quantised_weights, store

TOWER_BRANCH = 0.12
"""How much each branch of a tower's layers adds, about 1 / sqrt(branches): at 1, 24 layers make all features alike."""

DRAWN_NUMBERS = 64 * 2**20
"""Numbers of a tensor that are drawn at once; of the official sizes only the embedding has more."""


def random_model(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    attention: Attention | None = None,
    progress: Progress | None = None,
    packed: bool = False,
    merge: AdapterName | None = None,
    scheme: Scheme = "bf16",
    placement: Placement = "resident",
) -> Phi4MM:
    """A model with random weights, in eval mode and without gradients.

    Each tensor depends on seed, name, shape, dtype and kind of device only, not on the tensors beside it, nor on how
    adapters are kept; under a scheme it is what that makes of the same numbers. All are drawn on the device, those too
    that a placement has on the host.
    Device memory: the model, and where adapters are packed or merged, for a while the largest of its tensors, of which
    those of more than DRAWN_NUMBERS are drawn in parts.
    """
    with on_meta():
        model = Phi4MM(config, attention).to(dtype)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.quantise(scheme)
    model.keep_adapters(packed, merge)
    model.take_memory(device, placement)
    model.eval().requires_grad_(False)
    tensors, quantised = model.state_dict(), quantised_weights(model)
    kept = {name: shape for name, shape in shapes.items() if name in tensors or name in quantised}
    adapters = {weight: (a, b) for weight, a, b in adapted(shapes, merge)} if merge else {}
    done, total = 0, sum(shape.numel() for shape in kept.values()) * dtype.itemsize
    for name, shape in kept.items():
        adapter = [_draw(_empty(model, shapes[part]), seed, part) for part in adapters.get(name, ())]
        for first, last in pieces(shape[0], math.prod(shape[1:]), DRAWN_NUMBERS):
            place = tensors[name][first:last] if name in tensors else None
            is_here = place is not None and place.device == model.device
            rows = place if place is not None and is_here else _empty(model, (last - first, *shape[1:]))
            _draw(rows, seed, name, first)
            if place is not None and not is_here:
                place.copy_(rows)
            if merge and adapter:
                _merge(rows, adapter[0], adapter[1][first:last], config.adapter(merge).scale)
            if name in quantised:
                store(quantised[name], name, first, rows)
            done += rows.numel() * dtype.itemsize
            if progress:
                progress(done, total)
    return model


def _empty(model: Phi4MM, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    merge_adapter(weight, a, scale, lambda first, last: (weight[first:last], b[first:last]))


def _draw(tensor: Tensor, seed: int, name: str, first: int = 0) -> Tensor:
    """Fill a tensor, or its rows from `first` on, and return it; a view gets what it would get by itself."""
    part = f"{name}[{first}]" if first else name
    generator = torch.Generator(tensor.device).manual_seed(_tensor_seed(seed, part))
    whole = tensor if tensor.is_contiguous() else tensor.contiguous()
    whole.normal_(*_distribution(name, tensor), generator=generator)
    return tensor if whole is tensor else tensor.copy_(whole)


def _tensor_seed(seed: int, name: str) -> int:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


def _distribution(name: str, tensor: Tensor) -> tuple[float, float]:
    """Mean and deviation of a tensor's numbers."""
    keeps_scale = 1 / math.sqrt(tensor[0].numel())  # outputs as large as inputs; 0.018 for the decoder
    if name.startswith(("vision.layers.", "audio.layers.")) and name.endswith(("out.weight", "down.weight")):
        return 0.0, TOWER_BRANCH * keeps_scale
    rules = (
        ("audio.mean", 10.0, 0.7),  # what log-mel values are like
        ("audio.inverse_deviation", 0.32, 0.02),
        ("norm.weight", 1.0, 0.1),
        ("separator", 0.0, 1.0),
        ("bias", 0.0, 0.02),
        ("relative_bias.weight", 0.0, 0.5),
        ("position_embedding.weight", 0.0, 0.3),
        ("language.embedding.weight", 0.0, 3 * keeps_scale),  # spreads the logits, which it makes too
        ("adapters.vision.b", 0.0, 0.25 * keeps_scale),
        ("adapters.speech.b", 0.0, 0.25 * keeps_scale),
    )
    return next(((mean, deviation) for end, mean, deviation in rules if name.endswith(end)), (0.0, keeps_scale))
