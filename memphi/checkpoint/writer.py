"""A Phi4MM into a model folder in the official layout.

Knows the file format and the order of writing; names come from the table. Fine-tuning, the demo model's maker and the
tests call it.
"""

import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from memphi.checkpoint.headers import INDEX_NAME
from memphi.checkpoint.names import official_name
from memphi.checkpoint.reader import DTYPES, blocks
from memphi.config import ModelConfig
from memphi.errors import CheckpointError
from memphi.model.phi4mm import Phi4MM
from memphi.model.quant.host import HostInt4Weight

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_PIECE_BYTES = 32 * 2**20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def write_checkpoint(
    model: Phi4MM, folder: Path, tokenizer_folder: Path | None = None, shard_bytes: int = 5_000_000_000
) -> None:
    """Write weights in their own dtypes, configs and, from `tokenizer_folder`, the tokenizer.

    Host memory: a piece of 32 MiB, whatever the size of a tensor or a shard. All of it is written under another name
    (`.<folder>.partial`) and renamed in the end, so that a kill or a full disk never leaves a folder that looks
    finished; what a killed run left is replaced by the next. Tensors that are never computed (the tower's last layer,
    norm and head, spec 4.1) are not written. Raises CheckpointError if the folder exists and is not empty, if
    writing fails, and for a model into whose weights an adapter is merged or whose weights come and go.
    """
    if model.merged is not None:
        raise CheckpointError(f"the {model.merged} adapter is merged into this model; load it anew to write it")
    if model.placement != "resident":
        raise CheckpointError("weights of this model lie on the host until they are needed; load it anew to write it")
    if any(isinstance(module, HostInt4Weight) for module in model.modules()):
        raise CheckpointError(
            "this model's weights are in the order that a CPU computes with; load it anew to write it"
        )
    tensors = {official_name(ours): tensor for ours, tensor in model.state_dict().items()}
    with _finished_folder(folder) as partial:
        write_configs(model.config, model.dtype, partial)
        if tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, partial)
        _write_shards(tensors, partial, shard_bytes)


def new_folder(folder: Path) -> Path:
    """Where a folder is to lie, whatever links lead there; raises CheckpointError where none can take its name."""
    folder = folder.resolve()
    try:
        is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as wrong:
        raise CheckpointError(f"{folder} cannot be written: {wrong.strerror or wrong}") from wrong
    if is_taken:
        raise CheckpointError(f"{folder} exists and is not empty; a checkpoint is written into a new folder")
    if folder.is_mount():
        raise CheckpointError(f"{folder} is where a disk is mounted; give a folder in it")
    return folder


@contextmanager
def _finished_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only when all went well."""
    folder = new_folder(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except OSError as wrong:
        raise CheckpointError(f"{folder} cannot be written: {wrong.strerror or wrong}") from wrong
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_configs(config: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    write_json(folder / "config.json", config.to_json() | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / "generation_config.json", {"eos_token_id": list(config.stop_token_ids)})
    preprocessor = {
        "image_processor_type": "Phi4MMImageProcessor",
        "processor_class": "Phi4MMProcessor",
        "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
        "audio_compression_rate": config.audio.compression,
        "audio_downsample_rate": 1,
        "audio_feat_stride": 1,
        "dynamic_hd": config.vision.max_crops,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


def copy_tokenizer(source: Path, folder: Path) -> None:
    packed = source / "tokenizer.json.gz"
    if packed.exists() and not (source / "tokenizer.json").exists():
        with gzip.open(packed) as text, synced(folder / "tokenizer.json") as file:
            shutil.copyfileobj(text, file)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{source} holds no tokenizer.json to copy")


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    shards = _divide(tensors, shard_bytes)
    owners: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(file, {name: tensors[name] for name in names})
        owners |= dict.fromkeys(names, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
    write_json(folder / INDEX_NAME, index)


def _divide(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a shard would grow beyond its size; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Wide numbers first, so that each tensor starts at a multiple of its number's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    with synced(file) as stream:
        stream.write(header_bytes(ordered))
        for _, tensor in ordered:
            for piece in _pieces(tensor):
                stream.write(piece)


def header_bytes(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """The file's first bytes: the header's length and the header, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    for block in blocks(tensor.detach(), _PIECE_BYTES // tensor.itemsize):
        numbers = block.contiguous().cpu().view(-1).view(torch.uint8).numpy()
        yield memoryview(numbers)  # type: ignore[arg-type]  # numpy arrays are buffers


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with synced(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk, and not only on its way there, when it is closed."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
