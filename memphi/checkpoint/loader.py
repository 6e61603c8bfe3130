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
from memphi.checkpoint.names import official_name
from memphi.checkpoint.reader import Progress, fill_tensors
from memphi.errors import CheckpointError
from memphi.model.attention import Attention
from memphi.model.phi4mm import Phi4MM


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: Attention | None = None,
    progress: Progress | None = None,
) -> Phi4MM:
    """Load a folder of either layout for inference: eval mode, and no parameter requires a gradient.

    Device memory: the model, and nothing beside it. Host memory: a buffer (see `fill_tensors`), and the model where the
    device is the host. Raises CheckpointError before either is taken if a file is damaged or a tensor is missing,
    unknown or of the wrong shape (spec 2).
    """
    config = read_config(folder)
    stored = find_tensors(folder, config)
    with torch.device("meta"):
        model = Phi4MM(config, attention)
    check_tensors(folder, stored, model.state_dict())
    device = torch.device(device)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    targets = model.state_dict()
    fill_tensors([(tensor, targets[ours]) for ours, tensor in stored.items()], device, progress)
    return model


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
