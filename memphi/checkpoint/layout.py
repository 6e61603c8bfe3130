"""Which files make up a model folder, in the official and in the converted transformers layout (spec 2, 2.5).

Knows where the weights and the adapters lie and under which table their names stand; opens headers, never weights.
Imports no torch. The loader and whoever needs a folder's config call it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memphi.checkpoint.headers import StoredTensor, list_tensors, read_header
from memphi.checkpoint.names import from_converted, from_official, from_peft
from memphi.config import LARGEST_SIZE, AdapterConfig, ModelConfig
from memphi.errors import CheckpointError

ADAPTERS = ("vision", "speech")


def read_config(folder: Path) -> ModelConfig:
    """A folder's config; in the converted layout, the adapters' ranks come from their own folders."""
    config = ModelConfig.from_folder(folder)
    if config.layout != "converted":
        return config
    vision, speech = (_read_adapter(folder / f"{name}-lora" / "adapter_config.json") for name in ADAPTERS)
    return replace(config, vision_adapter=vision, speech_adapter=speech)


def find_tensors(folder: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The stored tensors that the model computes with, by our names, in the order in which the files hold them.

    Raises CheckpointError for damaged files (see `list_tensors`) and for a tensor that the table of names lacks.
    """
    rename = from_converted if config.layout == "converted" else from_official
    found: dict[str, StoredTensor] = {}
    for tensor in list_tensors(folder):
        try:
            ours = rename(tensor.name, config.vision.layers)
        except KeyError:
            raise _unknown(tensor) from None
        if ours is not None:
            found[ours] = tensor
    return found if config.layout != "converted" else found | _find_adapters(folder)


def _find_adapters(folder: Path) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for adapter in ADAPTERS:
        for tensor in read_header(folder / f"{adapter}-lora" / "adapter_model.safetensors"):
            try:
                ours = from_peft(tensor.name, adapter)
            except KeyError:
                raise _unknown(tensor) from None
            if ours in found:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} stands there under another name too")
            found[ours] = tensor
    return found


def _unknown(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: tensor {tensor.name!r} is none of Phi-4-multimodal's")


def _read_adapter(file: Path) -> AdapterConfig:
    """Rank and alpha of a PEFT adapter; raises CheckpointError for one that is computed in another way (spec 3.2)."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = int(value["r"]), float(value["lora_alpha"])
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; the converted layout keeps its adapters there") from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as wrong:
        raise CheckpointError(f"{file} cannot be used: expected JSON with r and lora_alpha ({wrong})") from None
    if not 1 <= rank <= LARGEST_SIZE or not math.isfinite(alpha):
        raise CheckpointError(f"{file}: r or lora_alpha is out of bounds; expected a positive rank and a number")
    _refuse_variants(value, file)
    return AdapterConfig(rank, alpha)


def _refuse_variants(value: Mapping[str, Any], file: Path) -> None:
    for field, plain in (("use_rslora", False), ("use_dora", False), ("bias", "none")):
        if value.get(field, plain) != plain:
            raise CheckpointError(f"{file}: {field} is {value[field]!r}; memphi computes plain LoRA only ({plain!r})")
