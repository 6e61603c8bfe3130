"""What every benchmark's document says about where it comes from; called by each benchmark."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memphi.bench.document import provenance


def write_document(path: Path, device: torch.device, commit: str | None, figures: Mapping[str, Any]) -> None:
    """Write figures with commit, device, versions, date and command as one JSON document."""
    benchmark = _benchmark(Path(sys.argv[0]))
    document = {
        "benchmark": benchmark,
        "command": " ".join(("python -m", f"benchmarks.{benchmark}", *map(_without_folder, sys.argv[1:]))),
        **provenance(device, commit),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _benchmark(program: Path) -> str:
    """The name of the module or package that runs."""
    return program.parent.name if program.stem == "__main__" else program.stem


def _without_folder(argument: str) -> str:
    """An argument as given, but of an absolute path the last part alone: one machine's folders tell nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument
