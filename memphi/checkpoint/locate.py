"""From what a person calls a model to a folder on this machine; downloads where it has to.

Knows names, the hub's cache and which files of a repository are needed; opens no weights. The engine and the commands
call it. Imports no torch, and the hub's library only for a hub name.
"""

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from memphi import official
from memphi.checkpoint.headers import list_tensors
from memphi.config import DEFAULT_MODEL
from memphi.errors import CheckpointError

PINNED_REVISIONS = {DEFAULT_MODEL: "93f923e1a7727d1c4f446756212d9d3e8fcc5d81"}

_NEEDED_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json")
_WEIGHT_FILES = ("model.safetensors.index.json", "model*.safetensors")
_ADAPTER_FOLDERS = ("vision-lora/*", "speech-lora/*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REACH_SECONDS = 5


@dataclass(frozen=True)
class Location:
    """Where a model is: a folder with its configs and tokenizer, and its weights unless they are random."""

    name: str
    folder: Path
    random: bool = False
    """There are no weights to read: they are to be made up."""


def locate(model: str) -> Location:
    """Find a model by folder, by hub name, or as `demo` (shipped with memphi) or `random` (official sizes).

    A hub name is looked up in the hub's cache and downloaded if need be, resuming what an interrupted run left, with
    progress on stderr; the default model is pinned to one revision. HF_HUB_OFFLINE=1 keeps to the cache. A folder named
    like one of the words is written `./demo`. Raises CheckpointError that says what would work.
    """
    if model == "random":
        return Location(model, official.folder(), random=True)
    if model == "demo":
        return Location(model, _demo_folder())
    path = os.path.expanduser(model)  # os.path takes any text where Path raises
    if os.path.isdir(path):
        return Location(model, Path(path))
    if os.path.isfile(path):
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and *.safetensors")
    if not _HUB_NAME.fullmatch(model):
        raise CheckpointError(f"{model!r} is no folder; give a folder, a hub name like {DEFAULT_MODEL}, demo or random")
    return Location(model, _hub_folder(model))


def _demo_folder() -> Path:
    folder = Path(__file__).parents[1] / "demo" / "checkpoint"
    if not folder.is_dir():
        raise CheckpointError(
            f"this installation has no demo checkpoint: {folder} does not exist; install memphi again"
        )
    return folder


def _hub_folder(name: str) -> Path:
    from huggingface_hub import constants

    cached = _cached_folder(name)
    if cached and name in PINNED_REVISIONS and _is_complete(cached):
        return cached  # a pinned revision never changes: no need to ask
    if constants.HF_HUB_OFFLINE or not _can_reach(constants.ENDPOINT):
        if cached:
            return cached
        raise CheckpointError(
            f"{name} is no folder here, the hub's cache does not hold all of it, and the hub cannot be reached; where "
            f"there is a network, run `hf download {name} --local-dir FOLDER` and give that folder"
        )
    return _download(name)


def _patterns(name: str) -> list[str]:
    """The files needed; the official repository's adapter folders only repeat what its main files hold (spec 1.2)."""
    folders = () if name in PINNED_REVISIONS else _ADAPTER_FOLDERS
    return [*_NEEDED_FILES, *_WEIGHT_FILES, *folders]


def _cached_folder(name: str) -> Path | None:
    """What the hub's cache holds of a model, as far as the hub's library thinks it complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=PINNED_REVISIONS.get(name), allow_patterns=_patterns(name), local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        raise CheckpointError(f"{name!r} is neither a folder nor a hub name") from None


def _is_complete(folder: Path) -> bool:
    """Whether every needed file is there; some versions of the hub's library take an interrupted download for whole."""
    if not all((folder / name).is_file() for name in _NEEDED_FILES):
        return False
    try:
        list_tensors(folder)
    except CheckpointError:
        return False
    return True


def _can_reach(endpoint: str) -> bool:
    """Whether anything answers there, proxies included; the hub's library itself would try for half a minute."""
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=_REACH_SECONDS):
            return True
    except HTTPError:
        return True
    except URLError as wrong:
        return isinstance(wrong.reason, ssl.SSLError)  # the hub's library may know other certificates
    except OSError:
        return False


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=PINNED_REVISIONS.get(name), allow_patterns=_patterns(name)))
    except Exception as wrong:  # the library raises its own errors, its HTTP client's and the system's
        reason = next(iter(str(wrong).strip().splitlines()), type(wrong).__name__)
        raise CheckpointError(f"{name} could not be downloaded: {reason}") from wrong
