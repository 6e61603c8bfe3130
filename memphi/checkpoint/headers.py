"""What the safetensors files of a folder say they hold, checked before anything is read from them.

Knows the file format (a length, a JSON header, raw bytes) and the index beside the files; knows nothing of the model.
Imports no torch. The loader asks it what there is, the reader reads it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memphi.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
"""Bytes of one number, for each kind that is accepted; those of one byte are a scheme's codes."""

_MAX_JSON_BYTES = 16 * 2**20  # the official header has 0.2 MB; more than this is not a checkpoint but an attack
_MAX_DIMENSIONS = 8
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what it is and where its bytes lie."""

    name: str
    file: Path
    kind: str
    """One of ITEM_BYTES."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    end: int

    def rows(self, first: int, last: int) -> "StoredTensor":
        """A part of it along its first dimension."""
        row_bytes = (self.end - self.start) // self.shape[0]
        start = self.start + first * row_bytes
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, end=start + (last - first) * row_bytes)


def list_tensors(folder: Path) -> tuple[StoredTensor, ...]:
    """Every tensor of a folder's *.safetensors, shard by shard in the order in which the bytes lie.

    With an index, exactly the shards that it names. Allocates no more than the headers take (16 MiB of JSON each at
    most). Raises CheckpointError naming the file and the tensor for pickles, an empty folder, a missing or truncated
    shard, a damaged header, and an index that disagrees with the shards.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _list_indexed(folder, index)
    shards = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not shards:
        raise CheckpointError(_describe_empty(folder))
    _check_numbers(shards)
    return _join(read_header(shard) for shard in shards)


def _check_numbers(shards: Sequence[Path]) -> None:
    """Without an index, the files' own numbering (model-00001-of-00003) says which are missing."""
    names = {shard.name for shard in shards}
    for shard in shards:
        if match := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", shard.name):
            numbered = (f"{match[1]}{number:05}-of-{match[3]}.safetensors" for number in range(1, int(match[3]) + 1))
            missing = next((name for name in numbered if name not in names), None)
            if missing:
                raise CheckpointError(f"{shard.with_name(missing)} is missing; {shard.name} says that it exists")


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one file in the order in which their bytes lie; the bytes must fill the file exactly."""
    try:
        with file.open("rb") as stream:
            file_bytes = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if file_bytes < 8 or length > min(file_bytes - 8, _MAX_JSON_BYTES):
                raise CheckpointError(f"{file} is truncated or no safetensors file: it has {file_bytes} bytes")
            header = _parse(stream.read(length), file)
    except OSError as wrong:
        raise CheckpointError(f"{file} cannot be read: {wrong.strerror or wrong}") from None
    header.pop("__metadata__", None)
    tensors = sorted((_tensor(file, 8 + length, *item) for item in header.items()), key=lambda t: (t.start, t.end))
    _check_layout(file, tensors, 8 + length, file_bytes)
    return tuple(tensors)


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as wrong:
        raise CheckpointError(f"{file} has a damaged header: {wrong}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} has a damaged header: expected a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which the same name twice is an error and not a choice."""
    if len(pairs) != len({name for name, _ in pairs}):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} stands there twice")
    return dict(pairs)


def _tensor(file: Path, data_start: int, name: str, entry: object) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{where} has a damaged header entry: expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in ITEM_BYTES:
        raise CheckpointError(f"{where} is stored as {kind}; expected {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has a damaged header entry: its shape is no list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a damaged header entry: its data_offsets are no two byte positions")
    expected = math.prod(shape) * ITEM_BYTES[kind]
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{where}: shape {list(shape)} in {kind} takes {expected} bytes, but {offsets[1] - offsets[0]} are stored"
        )
    return StoredTensor(name, file, kind, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: object) -> bool:
    # bool is an int to isinstance, but not a size
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(file: Path, tensors: Sequence[StoredTensor], data_start: int, file_bytes: int) -> None:
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} starts at byte {tensor.start}, expected {end}: tensors overlap or "
                "leave a gap"
            )
        end = tensor.end
    if end != file_bytes:
        state = "truncated" if file_bytes < end else "longer than its header says"
        raise CheckpointError(f"{file} is {state}: it has {file_bytes} bytes, expected {end}; download it again")


def _list_indexed(folder: Path, index: Path) -> tuple[StoredTensor, ...]:
    owners = _read_index(index)
    shards = sorted(set(owners.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            count = sum(owner == shard for owner in owners.values())
            raise CheckpointError(f"{folder / shard} is missing; {index.name} expects {count} tensors in it")
    tensors = _join(read_header(folder / shard) for shard in shards)
    stored = {tensor.name: tensor.file.name for tensor in tensors}
    for name in sorted(owners.keys() | stored.keys()):
        if owners.get(name) != stored.get(name):
            raise CheckpointError(
                f"{index}: tensor {name!r} is expected in {owners.get(name, 'no shard')}, "
                f"but found in {stored.get(name, 'no shard')}"
            )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Which shard holds each tensor; shards are plain names of files beside the index."""
    try:
        index_bytes = index.stat().st_size
        if index_bytes > _MAX_JSON_BYTES:
            raise CheckpointError(f"{index} has {index_bytes} bytes: too large for an index")
        owners = _parse(index.read_bytes(), index).get("weight_map")
    except OSError as wrong:
        raise CheckpointError(f"{index} cannot be read: {wrong.strerror or wrong}") from None
    if not isinstance(owners, dict) or not owners:
        raise CheckpointError(f"{index} has no weight_map from tensor names to files")
    for name, shard in owners.items():
        if not _is_shard_name(shard):
            raise CheckpointError(f"{index}: tensor {name!r} is said to be in {shard!r}; expected a *.safetensors file")
    return owners


def _is_shard_name(shard: object) -> bool:
    plain = isinstance(shard, str) and shard.isprintable() and not {"/", "\\"} & set(shard) and len(shard) < 256
    return plain and str(shard).endswith(".safetensors")


def _join(shards: Iterable[tuple[StoredTensor, ...]]) -> tuple[StoredTensor, ...]:
    found: dict[str, StoredTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard):
        first = found.setdefault(tensor.name, tensor)
        if first is not tensor:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} is also in {first.file.name}; expected it once"
            )
    return tuple(found.values())


def _describe_empty(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder; a model folder holds config.json and *.safetensors"
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return f"{folder / pickles[0]} is a pickle, which can run any code when opened; memphi reads *.safetensors only"
    return f"{folder} holds no *.safetensors files; a model folder holds config.json and *.safetensors"
