"""A model folder into a Phi4MM on its device.

Knows the order of things: build the modules without memory, compare every name and shape, and only then allocate and
read. The engine, fine-tuning and the tests call it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from memphi.checkpoint.filling import Filling
from memphi.checkpoint.headers import StoredTensor
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.names import official_name
from memphi.checkpoint.reader import Progress, kinds_for
from memphi.config import AdapterName, ModelConfig, Placement, Scheme
from memphi.errors import CheckpointError
from memphi.model.attention import Attention
from memphi.model.meta import on_meta
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.swap import quantised_weights


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: Attention | None = None,
    progress: Progress | None = None,
    packed: bool = False,
    merge: AdapterName | None = None,
    scheme: Scheme | None = None,
    placement: Placement = "resident",
    examples: Sequence[list[int]] = (),
) -> Phi4MM:
    """Load a folder of either layout for inference: eval mode, and no parameter requires a gradient.

    packed: adapters beside the weights they adapt, for inference only; merge: this one in the weights, and none beside;
    scheme: quantise weights of 16 bits while they are read, None: keep them as they are stored; placement: what of them
    lies on the host; examples: rows of ids that codes of int4 made here are fitted to; without, they are chosen by the
    weights alone. Where a quantised folder has matrices in 16 bits that are in few now, as adapters of those that were
    written earlier are, these are quantised as well.
    Device memory: the model, and nothing beside it but the pieces of `merge_adapter` or of `fill`, and what a layer
    makes of the examples. Host memory: a buffer (see `fill_tensors`), and the model where the device is the host.
    Raises CheckpointError before either is taken if a file is damaged, if a tensor is missing, unknown or of the wrong
    shape (spec 2), or if a quantised folder is to have another scheme or an adapter merged; and for a number that
    cannot be quantised, or that a model makes of the examples.
    """
    config = read_config(folder)
    stored = find_tensors(folder, config)
    with on_meta():
        model = empty_model(config, dtype, attention)
    check_tensors(folder, stored, as_stored(model, stored))
    if config.scheme != "bf16":
        _refuse_changes(folder, config.scheme, merge, scheme)
    elif scheme is not None:
        with on_meta():
            model.quantise(scheme)
    model.keep_adapters(packed, merge)
    device = torch.device(device)
    model.take_memory(device, placement)
    model.eval().requires_grad_(False)
    Filling(model, stored, device, progress, examples).run()
    return model


def empty_model(config: ModelConfig, dtype: torch.dtype, attention: Attention | None = None) -> Phi4MM:
    """The modules for what a folder holds, with nothing in them."""
    model = Phi4MM(config, attention).to(dtype)
    model.quantise(config.scheme)
    return model


def as_stored(model: Phi4MM, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """What the files should hold: the model's tensors, and matrices in 16 bits for those that are stored so."""
    expected = model.state_dict()
    late = {name: weight for name, weight in quantised_weights(model).items() if name in stored}
    if late:
        with on_meta():
            whole = Phi4MM(replace(model.config, scheme="bf16")).to(model.dtype).state_dict()
    for name, weight in late.items():
        for part, _ in weight.named_buffers():
            del expected[f"{name}.{part}"]
        expected[name] = whole[name]
    return expected


def _refuse_changes(folder: Path, stored: Scheme, merge: AdapterName | None, scheme: Scheme | None) -> None:
    """What is quantised stays as it is."""
    source = "give the folder that it was made from"
    if scheme not in (None, stored):
        raise CheckpointError(f"{folder} holds weights in {stored}, which cannot be made {scheme}; {source}")
    if merge is not None:
        raise CheckpointError(f"{folder} holds weights in {stored}, into which no adapter can be merged; {source}")


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
        kinds = kinds_for(expected[ours].dtype)
        if tensor.kind not in kinds:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is stored as {tensor.kind}; expected {', '.join(kinds)}"
            )
    missing = [ours for ours in expected if ours not in stored]
    if missing:
        raise CheckpointError(_describe_missing(folder, missing))


def _describe_missing(folder: Path, missing: list[str]) -> str:
    more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
    name = official_name(missing[0])
    return f"{folder}: no *.safetensors file holds {name!r} (called so in the official layout){more}"
