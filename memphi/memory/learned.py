"""What a device taught about the prices: how much more each kind of step took than its formula says.

Kept in one small JSON file of the user's, so that the next plan for that device knows it from the start. Numbers only.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MOST_EXCESS_BYTES = 1 << 30
"""A formula that is further off is a fault to be mended, not a constant to be learned."""


@dataclass(frozen=True)
class Learned:
    """The most that each kind of step took beyond its formula, on one device under one version of PyTorch."""

    device: str = ""
    """Its name and PyTorch's version; empty: nothing is kept."""
    excess_bytes: Mapping[str, int] = field(default_factory=dict)

    def price(self, kind: str, n_bytes: int) -> int:
        """A formula's bytes, corrected by what was seen."""
        return n_bytes + self.excess_bytes.get(kind, 0)

    def seen(self, kind: str, predicted_bytes: int, observed_bytes: int) -> "Learned":
        """The same, or wiser where the truth was above the formula's own bytes by more than so far."""
        excess = min(observed_bytes - predicted_bytes, MOST_EXCESS_BYTES)
        if excess <= self.excess_bytes.get(kind, 0):
            return self
        return Learned(self.device, {**self.excess_bytes, kind: excess})


def learned_file() -> Path:
    """Where it is kept: in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", str(Path.home()))
    else:
        base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(base) / "memphi" / "devices.json"


def key_of(card: str) -> str:
    """What a card is called here: what a step takes depends on PyTorch too."""
    return f"{card}, PyTorch {version('torch')}"


def recall(device: str, path: Path | None = None) -> Learned:
    """What is known of a device; a file that is missing or damaged knows nothing."""
    known = _read(path or learned_file()).get(device, {})
    sound = {
        kind: excess
        for kind, excess in (known.items() if isinstance(known, dict) else ())
        if isinstance(excess, int) and 0 < excess <= MOST_EXCESS_BYTES
    }
    return Learned(device, sound)


def keep(learned: Learned, path: Path | None = None) -> None:
    """Write what was learned beside what is known of other devices; where that fails, the next run learns it again."""
    path = path or learned_file()
    known = {**_read(path), learned.device: dict(learned.excess_bytes)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(known, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as reason:
        logging.getLogger(__name__).info("what was learned about %s is not kept: %s", learned.device, reason)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
