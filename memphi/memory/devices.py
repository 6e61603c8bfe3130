"""What there is to run on: a card by its name, the card that nvidia-smi sees, or this machine's own memory.

Knows no tensors and imports no torch: the engine asks torch itself. The planner and the commands call it.
"""

import ctypes
import difflib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from memphi.errors import DeviceError
from memphi.memory.costs import GIB, MIB
from memphi.memory.learned import Learned, key_of, recall

DeviceKind = Literal["cuda", "cpu", "mps"]
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class DeviceFacts:
    """A device as the planner sees it."""

    kind: DeviceKind
    name: str
    total_bytes: int
    free_bytes: int
    """Free while memphi holds nothing: whoever already has a CUDA context adds it."""
    capability: tuple[int, int] | None = None
    """Of an NVIDIA card."""
    learned: Learned = field(default_factory=Learned)


@dataclass(frozen=True)
class Card:
    """An NVIDIA card as one buys it."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


# Memory as the cards' drivers report it, rounded down: some keep a part for themselves.
CARDS = (
    Card("GTX 1080 Ti", 11, (6, 1)),
    Card("P100 16GB", 15.8, (6, 0)),
    Card("V100 16GB", 15.7, (7, 0)),
    Card("V100 32GB", 31.7, (7, 0)),
    Card("T4", 14.5, (7, 5)),
    Card("RTX 2060", 6, (7, 5)),
    Card("RTX 2070", 8, (7, 5)),
    Card("RTX 2080", 8, (7, 5)),
    Card("RTX 2080 Ti", 11, (7, 5)),
    Card("Quadro RTX 8000", 47, (7, 5)),
    Card("A100 40GB", 39.4, (8, 0)),
    Card("A100 80GB", 79.1, (8, 0)),
    Card("RTX 3050", 8, (8, 6)),
    Card("RTX 3060", 12, (8, 6)),
    Card("RTX 3060 Ti", 8, (8, 6)),
    Card("RTX 3060 Laptop", 6, (8, 6)),
    Card("RTX 3070", 8, (8, 6)),
    Card("RTX 3070 Ti", 8, (8, 6)),
    Card("RTX 3080", 10, (8, 6)),
    Card("RTX 3080 12GB", 12, (8, 6)),
    Card("RTX 3080 Ti", 12, (8, 6)),
    Card("RTX 3090", 24, (8, 6)),
    Card("RTX 3090 Ti", 24, (8, 6)),
    Card("A10", 22, (8, 6)),
    Card("A10G", 22, (8, 6)),
    Card("A40", 44.9, (8, 6)),
    Card("RTX A4000", 16, (8, 6)),
    Card("RTX A5000", 24, (8, 6)),
    Card("RTX A6000", 47.9, (8, 6)),
    Card("RTX 4050 Laptop", 6, (8, 9)),
    Card("RTX 4060", 8, (8, 9)),
    Card("RTX 4060 Laptop", 8, (8, 9)),
    Card("RTX 4060 Ti 8GB", 8, (8, 9)),
    Card("RTX 4060 Ti 16GB", 16, (8, 9)),
    Card("RTX 4070", 12, (8, 9)),
    Card("RTX 4070 Laptop", 8, (8, 9)),
    Card("RTX 4070 Super", 12, (8, 9)),
    Card("RTX 4070 Ti", 12, (8, 9)),
    Card("RTX 4070 Ti Super", 16, (8, 9)),
    Card("RTX 4080", 16, (8, 9)),
    Card("RTX 4080 Super", 16, (8, 9)),
    Card("RTX 4080 Laptop", 12, (8, 9)),
    Card("RTX 4090", 23.9, (8, 9)),
    Card("RTX 4090 Laptop", 16, (8, 9)),
    Card("RTX 2000 Ada", 16, (8, 9)),
    Card("RTX 4000 Ada", 20, (8, 9)),
    Card("RTX 6000 Ada", 47.9, (8, 9)),
    Card("L4", 22, (8, 9)),
    Card("L40", 44.9, (8, 9)),
    Card("L40S", 44.9, (8, 9)),
    Card("H100 80GB", 79.1, (9, 0)),
    Card("H200", 139.8, (9, 0)),
    Card("RTX 5060", 7.9, (12, 0)),
    Card("RTX 5060 Ti 8GB", 7.9, (12, 0)),
    Card("RTX 5060 Ti 16GB", 15.9, (12, 0)),
    Card("RTX 5070", 11.9, (12, 0)),
    Card("RTX 5070 Ti", 15.9, (12, 0)),
    Card("RTX 5080", 15.9, (12, 0)),
    Card("RTX 5090", 31.8, (12, 0)),
    Card("B200", 178, (10, 0)),
)
_NOISE = re.compile(r"nvidia|geforce|tesla|gpu|graphics|card|generation|pcie|sxm\d*|hbm\d*\w?")


def find_card(text: str) -> DeviceFacts:
    """The card of a name, loosely: `4090`, `rtx4090`, `NVIDIA GeForce RTX 4090`; raises DeviceError with close names.

    Of several that a name could mean, the plainest, and of those the one with the least memory.
    """
    wanted = _words(text)
    matches = [card for card in CARDS if wanted and wanted <= _words(card.name)]
    if not matches:
        raise DeviceError(f"there is no card called {text!r} in memphi's table; {_suggestion(text)}")
    card = min(matches, key=lambda card: (len(_words(card.name)), card.memory_gib))
    n_bytes = int(card.memory_gib * GIB)
    return DeviceFacts("cuda", card.name, n_bytes, n_bytes, card.capability)


def _words(text: str) -> frozenset[str]:
    """Runs of letters and of digits, without what says nothing: `RTX4090` is rtx and 4090."""
    return frozenset(re.findall(r"[a-z]+|\d+", _NOISE.sub(" ", text.lower())))


def _suggestion(text: str) -> str:
    names = {card.name.lower(): card.name for card in CARDS}
    close = [names[name] for name in difflib.get_close_matches(text.lower(), names, n=3, cutoff=0.4)]
    alike = f"close to it are {', '.join(close)}; or " if close else ""
    return f"{alike}give its memory with --memory"


def present_card(number: int = 0) -> DeviceFacts | None:
    """The NVIDIA card that is cuda:number to a program here, as nvidia-smi sees it; None where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number)] if visible is None else visible.split(",")[number : number + 1]
    index = "".join(names).strip()
    if not index or index.startswith("-"):
        return None
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return _read_card(said)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _read_card(line: str) -> DeviceFacts:
    """One line of nvidia-smi's: name, MiB in all, MiB free, capability; ValueError for anything else."""
    name, total, free, capability = (part.strip() for part in line.strip().partition("\n")[0].rsplit(",", 3))
    major, minor = capability.split(".")
    return DeviceFacts("cuda", name, int(total) * MIB, int(free) * MIB, (int(major), int(minor)), recall(key_of(name)))


def this_machine() -> DeviceFacts:
    """The host's own memory, for the CPU: all of it, and what is available; a container's limit counts."""
    total, available = _host_memory()
    limit, used = _container_memory()
    if limit is not None and limit < total:
        total, available = limit, min(available, max(limit - used, 0))
    return DeviceFacts("cpu", "this machine's CPU", total, available)


def _host_memory() -> tuple[int, int]:
    """Bytes in all, and available."""
    if sys.platform == "win32":
        return _windows_memory()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return total, int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # macOS tells only how much there is
        return total, total


def _windows_memory() -> tuple[int, int]:
    """MEMORYSTATUSEX: its length and load in 32 bits each, then seven numbers of 64 bits, of which two matter."""
    status = (ctypes.c_uint64 * 8)()
    status[0] = ctypes.sizeof(status)
    vars(ctypes)["windll"].kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status[1], status[2]


def _container_memory() -> tuple[int | None, int]:
    """The limit of this process's cgroup and what it uses; (None, 0) where there is none.

    Pages of files that were read count as used there, though they make way for whoever needs memory.
    """
    for folder, limit, used, idle in (
        (CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int((folder / limit).read_text()), int((folder / used).read_text()) - int(stat[idle])
        except (OSError, ValueError, KeyError):  # no such file, or `max`
            continue
    return None, 0
