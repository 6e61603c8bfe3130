"""Debian packages as a source of data: fetched with apt-get, unpacked into a folder, never installed.

Knows apt-get, dpkg and where a package keeps its licence; knows nothing of what is inside. The bank's fonts, words and
human recordings come this way.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a part of the bank came from: package, version, licences as the package names them."""

    package: str
    version: str
    licences: tuple[str, ...]


def unpack(packages: Sequence[str], folder: Path) -> tuple[Source, ...]:
    """Fetch the packages and unpack them together below the folder."""
    folder = folder.resolve()
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-qq", "download", *packages], cwd=archives, check=True, stderr=subprocess.DEVNULL)
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
    return tuple(_source(package, next(archives.glob(f"{package}_*.deb")), folder) for package in packages)


def installed(packages: Sequence[str]) -> tuple[Source, ...]:
    """Return the sources of packages that are installed on this machine."""
    versions = (subprocess.check_output(["dpkg-query", "-Wf", "${Version}", name], text=True) for name in packages)
    return tuple(
        Source(name, version, licences(Path("/usr/share/doc", name, "copyright")))
        for name, version in zip(packages, versions, strict=True)
    )


def licences(copyright_file: Path) -> tuple[str, ...]:
    """Return the licence names of a Debian copyright file, or a pointer to it where it names none."""
    text = copyright_file.read_text(errors="replace")
    named = dict.fromkeys(re.findall(r"^License:[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE))
    return tuple(named) or (f"see the copyright file of {copyright_file.parent.name}",)


def _source(package: str, archive: Path, folder: Path) -> Source:
    version = subprocess.check_output(["dpkg-deb", "-f", archive, "Version"], text=True).strip()
    return Source(package, version, licences(folder / "usr/share/doc" / package / "copyright"))
