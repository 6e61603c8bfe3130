"""A model folder into another whose weights are quantised, tensor by tensor; `memphi quantize` and the tests call it.

Knows the order of things and what makes a run resumable: a shard for each layer, each written under another name until
it is whole, all in a folder that takes its name in the end. What schemes do is `model.quant`'s, what layers make of
example texts `calibration`'s.
"""

import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from memphi.checkpoint.calibration import Calibration, example_rows
from memphi.checkpoint.headers import INDEX_NAME, StoredTensor, read_header
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.loader import check_tensors, empty_model
from memphi.checkpoint.names import LAYERS, official_name
from memphi.checkpoint.reader import DTYPES, Progress, fill_tensors, make_buffer
from memphi.checkpoint.writer import copy_tokenizer, header_bytes, new_folder, synced, write_configs, write_json
from memphi.config import ModelConfig, Scheme
from memphi.errors import CheckpointError
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.meta import on_meta
from memphi.model.quant.swap import checked, pieces, quantised_weights
from memphi.model.quant.weights import QuantisedWeight

if sys.platform != "win32":
    import fcntl

REPORT_NAME = "quantisation.json"
BUFFER_BYTES = 128 * 2**20
"""Host memory that a run takes at most beyond torch, whatever the size of a layer: what files are read through, and a
piece of a weight as it is quantised. What calibration takes beside it lies on the device (`costs.calibrating`)."""
CALIBRATED: tuple[Scheme, ...] = ("int4", "fp8")
"""Schemes under which the decoder's codes are fitted to example texts; int8 loses too little to need it."""
_PROGRESS_NAME = "progress.json"
_COPIED_BYTES = 4 * 2**20


@dataclass(frozen=True)
class WeightError:
    """How far one weight is from what it was."""

    name: str
    """Ours."""
    scheme: Scheme
    squared_error: float
    squared_norm: float

    @property
    def relative(self) -> float:
        """|stored - original| / |original|, over all its numbers."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def quantise_folder(
    source: Path,
    folder: Path,
    scheme: Scheme,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[WeightError]:
    """Write a folder in the official layout with the weights of another, of either layout, under a scheme.

    In int4 and fp8 the decoder's linears are calibrated on memphi's example texts, layer by layer, on the device; all
    else is rounded by itself. Memory: BUFFER_BYTES of the host, and where layers are calibrated `costs.calibrating` of
    the device. All of it is written under another name (`.<folder>.partial`) and renamed in the end, so that a kill, a
    full disk or a bad tensor never leaves a folder that looks finished; the same call again goes on after the last
    whole shard, unless the source has changed. Returns the errors made, which the folder's quantisation.json has too.
    Raises CheckpointError for a source that cannot be used, is quantised already, holds a number that is infinite or
    none at all or makes one of the texts, for a folder that exists and is not empty, on which a disk is mounted or that
    another run is writing, and if writing fails.
    """
    folder = new_folder(folder)
    run = _Run(source, scheme, torch.device(device), progress or (lambda done, total: None))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _alone_in(partial):
            _begin(partial, run.identity)
            run.check_room(partial)
            errors = run.write(partial)
            partial.replace(folder)
        (folder / _PROGRESS_NAME).unlink()
    except OSError as wrong:
        raise CheckpointError(
            f"{folder} cannot be written: {wrong.strerror or wrong}; what is done lies in {partial}, and the same "
            "command goes on from there"
        ) from wrong
    return errors


@contextmanager
def _alone_in(partial: Path) -> Iterator[None]:
    """Make the folder to write into, and keep others out; raises CheckpointError where one is at it."""
    partial.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another run is writing {partial}; wait until it ends, or end it") from None
        except OSError:  # Some disks know no locks.
            pass
        yield
    finally:
        os.close(handle)


def _begin(partial: Path, identity: Mapping[str, object]) -> None:
    """What an earlier run left is kept if it was about the same."""
    progress = partial / _PROGRESS_NAME
    try:
        if json.loads(progress.read_text()) == identity:
            return
    except (OSError, ValueError):
        pass
    for file in partial.iterdir():
        file.unlink()
    write_json(progress, identity)


class _Run:
    """One folder becoming another."""

    def __init__(self, source: Path, scheme: Scheme, device: torch.device, tell: Progress) -> None:
        self._source, self._scheme, self._device, self._tell = source, scheme, device, tell
        self._config = read_config(source)
        if self._config.scheme != "bf16":
            raise CheckpointError(
                f"{source} holds weights in {self._config.scheme} already; give the folder that it was made from"
            )
        self._stored = find_tensors(source, self._config)
        with on_meta():
            model = empty_model(self._config, torch.bfloat16)
            check_tensors(source, self._stored, model.state_dict())
            model.quantise(scheme)
        self._weights = quantised_weights(model)
        self._made: ModelConfig = model.config
        self._shards = [list(names) for _, names in groupby(sorted(self._stored, key=_unit), key=_unit)]
        self._buffer = make_buffer(device)
        self._rows = example_rows(Tokenizer.from_folder(source), self._config) if scheme in CALIBRATED else []
        self._calibration: Calibration | None = None
        self._done, self._total = 0, sum(tensor.end - tensor.start for tensor in self._stored.values())

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to go on where another ended."""
        files = sorted({tensor.file for tensor in self._stored.values()})
        stats = [(str(file.absolute()), file.stat()) for file in files]
        return {
            "scheme": self._scheme,
            "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
            "shards": len(self._shards),
            "examples": zlib.crc32(json.dumps(self._rows).encode()),
        }

    def check_room(self, partial: Path) -> None:
        """Raise CheckpointError for a disk that has too little room for what is still to be written."""
        for unfinished in partial.glob("*.unfinished"):
            unfinished.unlink()
        written = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
        needed = sum(tensor.nbytes for names in self._shards for tensor in self._planned(names).values()) - written
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise CheckpointError(f"{partial.parent} has {free} bytes free, and the folder takes {needed} more")

    def write(self, partial: Path) -> list[WeightError]:
        """Write all shards that are not there yet, then what makes a folder of them."""
        if self._rows:
            self._calibration = Calibration(
                self._config, self._scheme, self._stored, self._rows, self._device, self._buffer
            )
        errors: list[WeightError] = []
        owners: dict[str, str] = {}
        total_bytes = 0
        for number, names in enumerate(self._shards, 1):
            file = partial / f"model-{number:05}-of-{len(self._shards):05}.safetensors"
            planned = self._planned(names)
            errors += self._write_shard(file, names, planned)
            owners |= dict.fromkeys(planned, file.name)
            total_bytes += sum(tensor.nbytes for tensor in planned.values())
        write_json(partial / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": owners})
        kind = self._stored["language.norm.weight"].kind
        write_configs(self._made, DTYPES[kind], partial)
        copy_tokenizer(self._source, partial)
        write_json(partial / REPORT_NAME, report(self._made, errors))
        for file in partial.glob("*.errors"):
            file.unlink()
        return errors

    def _planned(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What a shard of these weights holds, by official names: tensors on the meta device, wide numbers first."""
        planned: dict[str, Tensor] = {}
        for name in names:
            stored, weight = self._stored[name], self._weights.get(name)
            if weight is None:
                planned[official_name(name)] = torch.empty(stored.shape, dtype=DTYPES[stored.kind], device="meta")
            else:
                planned |= {official_name(f"{name}.{part}"): buffer for part, buffer in weight.named_buffers()}
        return dict(sorted(planned.items(), key=lambda item: -item[1].itemsize))

    def _write_shard(self, file: Path, names: Sequence[str], planned: Mapping[str, Tensor]) -> list[WeightError]:
        """Write a shard, and beside it the errors made, unless both are there."""
        errors_file = file.with_suffix(".errors")
        calibration = self._calibration if _unit(names[0])[0] == LAYERS else None
        if (known := _read_errors(file, errors_file)) is not None:
            if calibration:
                calibration.skip(file)
            self._advance(sum(self._stored[name].end - self._stored[name].start for name in names))
            return known
        unfinished = file.with_suffix(".unfinished")
        head = header_bytes(list(planned.items()))
        places, at = {}, len(head)
        for name, tensor in planned.items():
            places[name], at = at, at + tensor.nbytes
        with synced(unfinished) as stream:
            stream.write(head)
            errors = self._write_calibrated(stream, calibration, names, places) if calibration else []
            written = {error.name for error in errors}
            rest = [name for name in names if name not in written]
            errors += [error for name in rest if (error := self._write_tensor(stream, name, places))]
            stream.truncate(at)
        write_json(errors_file, {"errors": [asdict(error) for error in errors]})
        unfinished.replace(file)
        return errors

    def _write_tensor(self, stream: BinaryIO, name: str, places: Mapping[str, int]) -> WeightError | None:
        """Put one weight where it belongs: as it is, or quantised."""
        weight = self._weights.get(name)
        if weight is not None:
            return self._quantise(stream, name, weight, places)
        stored = self._stored[name]
        with _opened(stored) as source:
            stream.seek(places[official_name(name)])
            for size in _sizes(stored.end - stored.start):
                data = source.read(size)
                if len(data) < size:
                    raise CheckpointError(f"{stored.file} ends within tensor {stored.name!r}")
                stream.write(data)
                self._advance(size)
        return None

    @torch.no_grad()
    def _quantise(self, stream: BinaryIO, name: str, weight: QuantisedWeight, places: Mapping[str, int]) -> WeightError:
        """Quantise a weight piece by piece; every part of it has its rows in order, so a piece of it has its place."""
        stored = self._stored[name]
        squared_error = squared_norm = 0.0
        for first, last in pieces(weight.out_features, weight.in_features):
            part = stored.rows(first, last)
            rows = torch.empty(part.shape, dtype=DTYPES[part.kind], device=self._device)
            fill_tensors([(part, rows)], self._device, None, self._buffer)
            rows = rows.flatten(1)
            with torch.device(self._device):
                piece = type(weight)(last - first, weight.in_features)
            piece.store(0, checked(rows, f"{stored.file}: tensor {stored.name!r}"))
            for kind, buffer in piece.named_buffers():
                _write_rows(stream, buffer, places[official_name(f"{name}.{kind}")], first)
            squared_error += float((piece.dequantise(0, last - first, torch.float32) - rows).square_().sum())
            squared_norm += float(rows.float().square_().sum())
            self._advance(part.end - part.start)
        in_decoder = name.startswith(LAYERS) and ".adapters." not in name
        scheme = self._made.scheme if in_decoder else self._made.other_scheme
        return WeightError(name, scheme, squared_error, squared_norm)

    @torch.no_grad()
    def _write_calibrated(
        self, stream: BinaryIO, calibration: Calibration, names: Sequence[str], places: Mapping[str, int]
    ) -> list[WeightError]:
        """Quantise a layer's linears on what they see of the example texts, and put each where it belongs."""
        _, number = _unit(names[0])
        errors = []
        for linear in calibration.quantise(number):
            name, original, weight = f"{LAYERS}.{number}.{linear.name}.weight", linear.original, linear.weight
            squared_error = squared_norm = 0.0
            for first, last in pieces(*original.shape):
                rows = original[first:last].float()
                for kind, buffer in weight.named_buffers():
                    _write_rows(stream, buffer[first:last], places[official_name(f"{name}.{kind}")], first)
                squared_error += float((weight.dequantise(first, last, torch.float32) - rows).square_().sum())
                squared_norm += float(rows.square_().sum())
            self._advance(self._stored[name].end - self._stored[name].start)
            errors.append(WeightError(name, self._made.scheme, squared_error, squared_norm))
        return errors

    def _advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._tell(self._done, self._total)


def _write_rows(stream: BinaryIO, rows: Tensor, place: int, first: int) -> None:
    """Write rows from `first` on of a tensor that begins at a place."""
    stream.seek(place + first * (rows.nbytes // len(rows)))
    stream.write(memoryview(rows.cpu().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _unit(name: str) -> tuple[str, int]:
    """What stands in one shard: a layer of the decoder, or one of the parts beside it."""
    parts = name.split(".")
    if name.startswith(f"{LAYERS}."):
        return (LAYERS, int(parts[2]))
    return (".".join(parts[:2]) if parts[0] == "language" else parts[0], 0)


def _sizes(n_bytes: int) -> Iterator[int]:
    for first in range(0, n_bytes, _COPIED_BYTES):
        yield min(_COPIED_BYTES, n_bytes - first)


@contextmanager
def _opened(stored: StoredTensor) -> Iterator[BinaryIO]:
    """A source file, at a tensor's first byte."""
    try:
        file = stored.file.open("rb")
    except OSError as wrong:
        raise CheckpointError(f"{stored.file} cannot be read: {wrong.strerror or wrong}") from None
    with file:
        file.seek(stored.start)
        yield file


def _read_errors(shard: Path, file: Path) -> list[WeightError] | None:
    """The errors of a shard that an earlier run finished; None where it did not."""
    try:
        read_header(shard)
        return [WeightError(**error) for error in json.loads(file.read_text())["errors"]]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None


def report(config: ModelConfig, errors: Sequence[WeightError]) -> dict[str, object]:
    """The errors made, layer by layer: each layer's, and those of its weights."""
    layers = [
        {
            "layer": layer,
            "relative_error": round(_joined(found), 6),
            "weights": {error.name.removeprefix(layer + "."): round(error.relative, 6) for error in found},
        }
        for layer, found in ((layer, list(group)) for layer, group in groupby(errors, key=_layer))
    ]
    return {"scheme": config.scheme, "other_scheme": config.other_scheme, "layers": layers}


def _layer(error: WeightError) -> str:
    """The layer that a weight is in; outside of layers, the module."""
    parts = error.name.split(".")
    end = parts.index("layers") + 2 if "layers" in parts else -2
    return ".".join(parts[:end])


def _joined(errors: Sequence[WeightError]) -> float:
    total = sum(error.squared_norm for error in errors)
    return math.sqrt(sum(error.squared_error for error in errors) / total) if total else 0.0


def summary(errors: Sequence[WeightError]) -> list[tuple[str, str, float, float]]:
    """Kinds of weights, each with its scheme, its relative error, and that of its worst: for a table.

    All of an adapter's matrices are of one kind.
    """

    def kind(error: WeightError) -> str:
        name = re.sub(r"\.[a-z_]+\.[a-z_]+\.adapters\.(\w+)\.[ab]$", r".adapters.\1", error.name)
        return ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))

    kinds: dict[str, list[WeightError]] = {}
    for error in errors:
        kinds.setdefault(kind(error), []).append(error)
    return [
        (name, found[0].scheme, _joined(found), max(error.relative for error in found)) for name, found in kinds.items()
    ]
