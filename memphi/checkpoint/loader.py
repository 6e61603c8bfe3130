"""A model folder into a Phi4MM on its device.

Knows the order of things: build the modules without memory, compare every name and shape, and only then allocate and
read. The engine, fine-tuning and the tests call it.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from memphi.checkpoint.headers import StoredTensor
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.names import adapted, official_name
from memphi.checkpoint.reader import DTYPES, Progress, fill_tensors, kinds_for, make_buffer
from memphi.config import AdapterName, ModelConfig, Placement, Scheme
from memphi.errors import CheckpointError
from memphi.model.adapters import merge_adapter
from memphi.model.attention import Attention
from memphi.model.meta import on_meta
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.swap import fill, quantised_weights


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
) -> Phi4MM:
    """Load a folder of either layout for inference: eval mode, and no parameter requires a gradient.

    packed: adapters beside the weights they adapt, for inference only; merge: this one in the weights, and none beside;
    scheme: quantise weights of 16 bits while they are read, None: keep them as they are stored; placement: what of them
    lies on the host. Where a quantised folder has matrices in 16 bits that are in few now, as adapters of those that
    were written earlier are, these are quantised as well.
    Device memory: the model, and nothing beside it but the pieces of `merge_adapter` or of `fill`. Host memory: a
    buffer (see `fill_tensors`), and the model where the device is the host. Raises CheckpointError before either is
    taken if a file is damaged, if a tensor is missing, unknown or of the wrong shape (spec 2), or if a quantised folder
    is to have another scheme or an adapter merged; and for a number that cannot be quantised.
    """
    config = read_config(folder)
    stored = find_tensors(folder, config)
    with on_meta():
        model = empty_model(config, dtype, attention)
    check_tensors(folder, stored, _as_stored(model, stored))
    if config.scheme != "bf16":
        _refuse_changes(folder, config.scheme, merge, scheme)
    elif scheme is not None:
        with on_meta():
            model.quantise(scheme)
    model.keep_adapters(packed, merge)
    device = torch.device(device)
    model.take_memory(device, placement)
    model.eval().requires_grad_(False)
    _Filling(model, stored, device, progress).run()
    return model


def empty_model(config: ModelConfig, dtype: torch.dtype, attention: Attention | None = None) -> Phi4MM:
    """The modules for what a folder holds, with nothing in them."""
    model = Phi4MM(config, attention).to(dtype)
    model.quantise(config.scheme)
    return model


def _as_stored(model: Phi4MM, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
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


class _Filling:
    """Reading what a model has a place for: as it is stored, merged, quantised, or merged and then quantised."""

    def __init__(
        self, model: Phi4MM, stored: Mapping[str, StoredTensor], device: torch.device, progress: Progress | None
    ) -> None:
        self._stored, self._device = stored, device
        self._targets = model.state_dict()
        self._quantised = {name: weight for name, weight in quantised_weights(model).items() if name in stored}
        self._merged = {weight: (a, b) for weight, a, b in adapted(stored, model.merged)} if model.merged else {}
        self._scale = model.config.adapter(model.merged).scale if model.merged else 0.0
        self._buffer = make_buffer(device)
        self._tell = progress or (lambda done, total: None)

    def run(self) -> None:
        """Fill all; progress counts the bytes that are stored."""
        made = sorted({*self._quantised, *self._merged}, key=lambda name: (self._stored[name].file, name))
        as_stored = [
            (self._stored[name], target)
            for name, target in self._targets.items()
            if name in self._stored and name not in self._merged
        ]
        sources = {name: [self._stored[part] for part in (name, *self._merged.get(name, ()))] for name in made}
        done, made_bytes = sum(map(_bytes, (s for s, _ in as_stored))), sum(map(_bytes, chain(*sources.values())))
        total = done + made_bytes
        fill_tensors(as_stored, self._device, lambda done, _: self._tell(done, total), self._buffer)
        for name in made:
            self._make(name)
            done += sum(map(_bytes, sources[name]))
            self._tell(done, total)

    def _make(self, name: str) -> None:
        """Merge or quantise one weight, or first the one and then the other, which rounds once more."""
        stored = self._stored[name]
        a = self._read(self._stored[self._merged[name][0]]) if name in self._merged else None
        weight = self._quantised.get(name)
        if weight is None:
            assert a is not None
            self._merge(name, a, self._targets[name], 0)
            return

        def read_rows(first: int, last: int) -> Tensor:
            if a is None:
                return self._read(stored.rows(first, last))
            rows = torch.empty((last - first, *stored.shape[1:]), dtype=DTYPES[stored.kind], device=self._device)
            self._merge(name, a, rows, first)
            return rows

        fill(weight, f"{stored.file}: tensor {stored.name!r}", read_rows)

    def _merge(self, name: str, a: Tensor, rows: Tensor, start: int) -> None:
        """Fill outputs of a weight, those from `start` on, with what is stored and its adapter, rounded once."""
        weight, b = self._stored[name], self._stored[self._merged[name][1]]

        def read(first: int, last: int) -> tuple[Tensor, Tensor]:
            part = start + first, start + last
            return self._read(weight.rows(*part)), self._read(b.rows(*part))

        merge_adapter(rows, a, self._scale, read)

    def _read(self, tensor: StoredTensor) -> Tensor:
        piece = torch.empty(tensor.shape, dtype=DTYPES[tensor.kind], device=self._device)
        fill_tensors([(tensor, piece)], self._device, None, self._buffer)
        return piece


def _bytes(tensor: StoredTensor) -> int:
    return tensor.end - tensor.start


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
