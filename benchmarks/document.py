"""What every benchmark's document says about where it comes from; called by each benchmark."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def write_document(path: Path, device: torch.device, commit: str | None, figures: Mapping[str, Any]) -> None:
    """Write figures with commit, device, versions, date and command as one JSON document."""
    document = {
        "benchmark": Path(sys.argv[0]).stem,
        "command": " ".join(("python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *map(_without_folder, sys.argv[1:]))),
        "commit": commit or find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _without_folder(argument: str) -> str:
    """An argument as given, but of an absolute path the last part alone: one machine's folders tell nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def find_commit() -> str | None:
    """The commit of this working tree, with `+changes` where files differ from it; None where git cannot say."""
    try:
        commit, changes = (_git(*arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
