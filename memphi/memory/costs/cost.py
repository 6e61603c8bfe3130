"""One cost, and bytes for a person."""

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Cost:
    """One thing that takes memory."""

    name: str
    bytes: int
    formula: str
    """How the bytes come about, in words."""


def size_text(n_bytes: int) -> str:
    """Bytes for a person: 10.3 GiB, 480 MiB, 20 KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n_bytes) >= unit:
            return (
                f"{n_bytes / unit:.1f} {name}"
                if unit == GIB or abs(n_bytes) < 10 * unit
                else f"{n_bytes // unit} {name}"
            )
    return f"{n_bytes} bytes"
