"""A model folder into a Phi4MM on its device.

Knows the order of things: build the modules without memory, compare every name and shape, and only then allocate and
read. The engine, fine-tuning and the tests call it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from memphi.checkpoint.headers import StoredTensor
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.names import adapted, official_name
from memphi.checkpoint.reader import DTYPES, Progress, fill_tensors
from memphi.config import AdapterName
from memphi.errors import CheckpointError
from memphi.model.adapters import merge_adapter
from memphi.model.attention import Attention
from memphi.model.phi4mm import Phi4MM


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: Attention | None = None,
    progress: Progress | None = None,
    packed: bool = False,
    merge: AdapterName | None = None,
) -> Phi4MM:
    """Load a folder of either layout for inference: eval mode, and no parameter requires a gradient.

    packed: adapters beside the weights they adapt, for inference only; merge: this one in the weights, and none beside.
    Device memory: the model, and nothing beside it but the pieces of `merge_adapter`. Host memory: a buffer (see
    `fill_tensors`), and the model where the device is the host. Raises CheckpointError before either is taken if a file
    is damaged or a tensor is missing, unknown or of the wrong shape (spec 2).
    """
    config = read_config(folder)
    stored = find_tensors(folder, config)
    with torch.device("meta"):
        model = Phi4MM(config, attention).to(dtype)
    check_tensors(folder, stored, model.state_dict())
    model.keep_adapters(packed, merge)
    device = torch.device(device)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    _fill(model, stored, device, progress)
    return model


def _fill(model: Phi4MM, stored: Mapping[str, StoredTensor], device: torch.device, progress: Progress | None) -> None:
    """Read what the model has a place for, and merge into it what it has to."""
    targets = model.state_dict()
    merged = {weight: (a, b) for weight, a, b in adapted(stored, model.merged)} if model.merged else {}
    scale = model.config.adapter(model.merged).scale if model.merged else 0.0
    whole = [(stored[ours], target) for ours, target in targets.items() if ours not in merged]
    parts = [stored[name] for weight, adapter in merged.items() for name in (weight, *adapter)]
    total = sum(tensor.end - tensor.start for tensor in (*parts, *(tensor for tensor, _ in whole)))
    tell = progress or (lambda done, total: None)
    fill_tensors(whole, device, lambda done, _: tell(done, total))
    done = total - sum(part.end - part.start for part in parts)
    for weight, (a, b) in merged.items():
        _read_merged(stored[weight], stored[a], stored[b], targets[weight], scale)
        done += sum(stored[name].end - stored[name].start for name in (weight, a, b))
        tell(done, total)


def _read_merged(weight: StoredTensor, a: StoredTensor, b: StoredTensor, target: Tensor, scale: float) -> None:
    """Read a weight with its adapter into one tensor; what is stored is rounded once."""

    def read(tensor: StoredTensor) -> Tensor:
        piece = torch.empty(tensor.shape, dtype=DTYPES[tensor.kind], device=target.device)
        fill_tensors([(tensor, piece)], target.device, None)
        return piece

    merge_adapter(
        target, read(a), scale, lambda first, last: (read(weight.rows(first, last)), read(b.rows(first, last)))
    )


def check_tensors(folder: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, Tensor]) -> None:
    """Compare what the files hold with what the model needs, by our names."""
    for ours, tensor in stored.items():
        if ours not in expected:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} belongs to no layer that {folder / 'config.json'} describes"
            )
        shape = tuple(expected[ours].shape)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
    missing = [ours for ours in expected if ours not in stored]
    if missing:
        raise CheckpointError(_describe_missing(folder, missing))


def _describe_missing(folder: Path, missing: list[str]) -> str:
    more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
    name = official_name(missing[0])
    return f"{folder}: no *.safetensors file holds {name!r} (called so in the official layout){more}"
