"""What a benchmark's document says about where its figures come from: commit, device, versions, date."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from memphi import __version__
from memphi.errors import MemphiError

SCHEMA = 1
"""Of the documents of `memphi bench`; raised when a field comes to mean something else."""


def provenance(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Where and by what a document is made; commit is what git cannot say."""
    return {
        "commit": commit or find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memphi": __version__,
    }


def sentence(error: Exception) -> str:
    """Why something was not measured, in one line."""
    said = str(error) if isinstance(error, MemphiError) else f"{type(error).__name__}: {error}"
    return said.strip().partition("\n")[0]


def find_commit() -> str | None:
    """The commit of this very source, with `+changes` where files differ from it; None where git does not know it."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit, changes = (_git(*arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()} ({platform.machine()})"
    )
