"""What a device taught about the prices: how much more each kind of step took than its formula says.

Kept in one small JSON file of the user's, so that the next plan for that device knows it from the start. Numbers only.
"""

import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MOST_EXCESS_BYTES = 1 << 30
"""A formula that is further off is a fault to be mended, not a constant to be learned."""


@dataclass(frozen=True)
class Excess:
    """How far beyond its formula a kind of step went at most: in bytes in one step, as a share in perhaps another.

    A step is corrected by the smaller of the two. That is enough for every step seen, and one step that was badly
    predicted makes neither small ones dear by its bytes nor large ones by its share.
    """

    bytes: int = 0
    share: float = 0.0

    def of(self, n_bytes: int) -> int:
        """What to add to a formula's bytes."""
        return min(self.bytes, math.ceil(n_bytes * self.share))

    def with_step(self, predicted_bytes: int, observed_bytes: int) -> "Excess":
        """The same, or more where a step went further beyond."""
        n_bytes = min(observed_bytes - predicted_bytes, MOST_EXCESS_BYTES)
        return self.joined(Excess(n_bytes, n_bytes / max(predicted_bytes, 1)))

    def joined(self, other: "Excess") -> "Excess":
        """What is enough for the steps of both."""
        return Excess(max(self.bytes, other.bytes), max(self.share, other.share))


@dataclass(frozen=True)
class Learned:
    """How far each kind of step went beyond its formula, on one device under one version of PyTorch."""

    device: str = ""
    """Its name and PyTorch's version; empty: nothing is kept."""
    excess: Mapping[str, Excess] = field(default_factory=dict)

    def price(self, kind: str, n_bytes: int) -> int:
        """A formula's bytes, corrected by what was seen."""
        return n_bytes + self.excess.get(kind, Excess()).of(n_bytes)

    def seen(self, kind: str, predicted_bytes: int, observed_bytes: int) -> "Learned":
        """The same, or wiser where the truth was above the formula's own bytes by more than so far."""
        known = self.excess.get(kind, Excess())
        excess = known.with_step(predicted_bytes, observed_bytes)
        return self if excess == known else Learned(self.device, {**self.excess, kind: excess})


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
    return Learned(device, dict(_sound(known) if isinstance(known, dict) else ()))


def _sound(known: dict[str, Any]) -> Iterator[tuple[str, Excess]]:
    for kind, numbers in known.items():
        match numbers:
            case {"bytes": int(n_bytes), "share": int() | float() as share}:
                if 0 < n_bytes <= MOST_EXCESS_BYTES and 0 < share <= MOST_EXCESS_BYTES:
                    yield kind, Excess(n_bytes, share)


def keep(learned: Learned, path: Path | None = None) -> None:
    """Write what was learned beside what is known of other devices; where that fails, the next run learns it again."""
    path = path or learned_file()
    excess = {**learned.excess}
    for kind, other in recall(learned.device, path).excess.items():  # Another engine on such a card may have learned.
        excess[kind] = excess.get(kind, other).joined(other)
    known = {**_read(path), learned.device: {kind: asdict(each) for kind, each in excess.items()}}
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
