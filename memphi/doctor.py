"""Checks of the machine, each with what was found and what to do about it.

Knows what memphi needs of a machine; changes nothing on it and downloads nothing. torch is imported by the checks that
ask it, so that the others speak where it cannot be imported. The command `doctor` calls it.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from memphi import official
from memphi.checkpoint.headers import list_tensors
from memphi.checkpoint.layout import find_tensors, read_config
from memphi.checkpoint.locate import PINNED_REVISIONS, locate
from memphi.config import DEFAULT_MODEL, EngineConfig, ModelConfig
from memphi.errors import CheckpointError, DoesNotFitError, MemphiError
from memphi.memory.costs import GIB, size_text
from memphi.memory.devices import DeviceFacts, present_card, this_machine
from memphi.memory.planner import make_plan

Status = Literal["ok", "warn", "fail"]

MEANT_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
BF16_CAPABILITY = FLASH_CAPABILITY = (8, 0)
OLDEST_TORCH = (2, 11)
DOWNLOAD_BYTES = 12 * 10**9
"""The official weights and what a download needs beside them."""
HOST_BYTES = 4 * GIB
"""Python, torch and CUDA's libraries, and the buffers through which weights are read."""
SOUND_DECODERS = ("pcm_s16le", "mp3", "aac", "flac", "vorbis", "opus")
PICTURE_DECODERS = {"jpg": "JPEG", "zlib": "PNG", "webp": "WebP"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    status: Status
    found: str
    advice: str | None = None
    """What to do; None where there is nothing to be done."""


@dataclass(frozen=True)
class Machine:
    """What the checks are about: the model that is to run here, and the card as nvidia-smi sees it."""

    model: str
    card: DeviceFacts | None

    @property
    def device(self) -> DeviceFacts:
        """The card, or without one the CPU."""
        return self.card or this_machine()


def examine(model: str = DEFAULT_MODEL) -> Iterator[Finding]:
    """Check after check, as each is done; one that fails in itself is told as a failure and the rest go on."""
    machine = Machine(model, present_card())
    for name, check in CHECKS.items():
        try:
            finding = Finding(name, *check(machine))
        except MemphiError as wrong:
            finding = Finding(name, "fail", str(wrong))
        except Exception as wrong:
            finding = Finding(name, "fail", f"could not be checked: {type(wrong).__name__}: {_first_line(str(wrong))}")
        yield finding


Verdict = tuple[Status, str] | tuple[Status, str, str]
"""Status, what was found and, if there is any, advice."""


# --- Python and torch ----------------------------------------------------------------------------------------------


def check_python(machine: Machine) -> Verdict:
    """Only told: pip has seen to it that it is new enough."""
    return "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}"


def check_torch(machine: Machine) -> Verdict:
    """A torch that is new enough, built for CUDA where there is a card, and with kernels for that card."""
    try:
        import torch
    except (ImportError, OSError) as wrong:
        return "fail", f"cannot be imported: {wrong}", "install memphi again in an environment of its own"
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    found = f"{torch.__version__}, built {built}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return "fail", found, f"install torch {'.'.join(map(str, OLDEST_TORCH))} or newer"
    if machine.card is None:
        return "ok", found
    if torch.version.cuda is None:
        return "fail", f"{found}, but here is {machine.card.name}", "install torch with CUDA: pip install -U torch"
    if not torch.cuda.is_available():
        return "fail", f"{found}, cannot use {machine.card.name}", "update NVIDIA's driver, or install an older torch"
    capability = machine.card.capability
    if capability and not any(_runs_on(name, capability) for name in torch.cuda.get_arch_list()):
        return "fail", f"{found}, without kernels for {machine.card.name}", "install a torch that is built for the card"
    return "ok", found


def _runs_on(built_for: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for sm_86 run on a card: the same major version, no newer minor; compute_ ones are compiled."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", built_for)
    if match is None:
        return False
    kind, major, minor = match[1], int(match[2]), int(match[3])
    return (major, minor) <= capability if kind == "compute" else major == capability[0] and minor <= capability[1]


def check_triton(machine: Machine) -> Verdict:
    """What memphi's own kernels are built with, where there is a card to run them."""
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found = "not installed"
    if machine.card is None:
        return "ok", f"{found}; needed with a card alone"
    from memphi.model.kernels.launch import why_not_built

    if (obstacle := why_not_built()) is None:
        return "ok", found
    return "warn", f"{found}, and kernels cannot be built", f"{obstacle}; until then PyTorch's own are used, and slower"


# --- the card ------------------------------------------------------------------------------------------------------


def check_driver(machine: Machine) -> Verdict:
    """The driver, and whether it is new enough for the CUDA that torch was built for."""
    if shutil.which("nvidia-smi") is None:
        return "warn", "no nvidia-smi, so no NVIDIA driver", "the CPU is used, which is slow; with a card, install it"
    said = _nvidia_smi()
    driver = re.search(r"(?:Driver|KMD) Version *: *([\d.]+)", said)
    cuda = re.search(r"CUDA(?: UMD)? Version *: *(\d+)\.(\d+)", said)
    if driver is None or cuda is None:
        return "fail", f"nvidia-smi says: {_first_line(said)}", "restart, or install NVIDIA's driver again"
    import torch

    found = f"{driver[1]}, for CUDA up to {cuda[1]}.{cuda[2]}"
    if torch.version.cuda is not None and int(cuda[1]) < int(torch.version.cuda.partition(".")[0]):
        return "fail", f"{found}, and torch wants {torch.version.cuda}", "update the driver, or install an older torch"
    return "ok", found


def check_card(machine: Machine) -> Verdict:
    """Its name and compute capability, among those that memphi is meant for."""
    card = machine.card
    if card is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            return "warn", f"none that is not hidden: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it to use a card"
        return "warn", "no NVIDIA card", "the CPU is used, which is slow"
    assert card.capability is not None
    found = f"{card.name}, compute capability {'.'.join(map(str, card.capability))}"
    if card.capability not in MEANT_CAPABILITIES:
        bf16 = "" if card.capability >= BF16_CAPABILITY else " with --dtype fp16"
        return "warn", f"{found}: untried", f"compare an answer or two{bf16} with --device cpu"
    if card.capability < BF16_CAPABILITY:
        return "warn", f"{found}: no units for bf16", "use --dtype fp16"
    return "ok", found


def check_neighbours(machine: Machine) -> Verdict:
    """Which programs use the card's memory."""
    if machine.card is None:
        return "ok", "no card to share"
    said = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader", _this_card())
    programs = [line.strip() for line in said.splitlines() if re.match(r"\d+,", line)]
    others = [line for line in programs if not line.startswith(f"{os.getpid()},")]
    used_bytes = machine.card.total_bytes - machine.card.free_bytes
    if not others:
        return "ok", f"no other program computes on the card; {size_text(used_bytes)} of it are in use"
    return "warn", f"pid, program, memory: {'; '.join(others)}", "end what is not needed: memphi gets what is left"


def check_memory(machine: Machine) -> Verdict:
    """What `memphi plan` says of the device, and the least that the model needs."""
    folder = _config_folder(machine.model)
    if folder is None:
        return "warn", "unknown: the model is not here", "`memphi plan --gpu CARD` says what fits into which card"
    config, device = read_config(folder), machine.device
    has = f"{size_text(device.free_bytes)} of {size_text(device.total_bytes)} free on {device.name}"
    try:
        plan = make_plan(config, device, EngineConfig())
    except DoesNotFitError as wrong:
        return "fail", has, str(wrong)
    return "ok", (
        f"{has}; memphi would take {size_text(plan.budget_bytes)} for {plan.context_tokens} tokens of context and "
        f"{plan.rows} rows at once, and needs at least {size_text(_smallest_dial(config, device, plan.budget_bytes))}"
    )


def _smallest_dial(config: ModelConfig, device: DeviceFacts, fits_bytes: int) -> int:
    """The least memory under which there is a plan, to one part in 1000 of what is known to fit."""
    low, high = 1, 1000
    while low < high:
        middle = (low + high) // 2
        try:
            make_plan(config, device, EngineConfig(memory_bytes=middle * fits_bytes // 1000))
            high = middle
        except DoesNotFitError:
            low = middle + 1
    return high * fits_bytes // 1000


def check_attention(machine: Machine) -> Verdict:
    """The backend that `auto` picks, and whether torch's fastest kernels run under it."""
    import torch

    from memphi.model.attention import select_attention

    name = type(select_attention("auto")).__name__.removesuffix("Attention").lower()
    if machine.card is None:
        return "ok", f"{name}: torch's own kernels for the CPU"
    assert machine.card.capability is not None
    if machine.card.capability < FLASH_CAPABILITY:
        return "warn", f"{name}, row by row: the card is too old for flash attention", "expect long prompts to be slow"
    if not torch.backends.cuda.is_flash_attention_available():
        return "warn", f"{name}, but this torch has no flash attention", "use --attention eager, or another build"
    return "ok", f"{name}, with flash attention: memory grows with the length, not with its square"


def check_mapping(machine: Machine) -> Verdict:
    """Whether memory for keys and values can be taken and given back page by page."""
    import torch

    from memphi.cache.pool import why_not_mapped

    if not torch.cuda.is_available():
        return "ok", "no CUDA device to map memory on"
    obstacle = why_not_mapped(torch.device("cuda"))
    if obstacle is None:
        return "ok", "memory for keys and values is taken and given back as it is needed"
    return "warn", f"memory for keys and values is taken all at once: {obstacle}", "pip install cuda-bindings"


# --- files ---------------------------------------------------------------------------------------------------------


def check_decoders(machine: Machine) -> Verdict:
    """What PyAV and Pillow were built to read."""
    import av
    from av.codec import codecs_available
    from PIL import features

    missing = [name for name in SOUND_DECODERS if name not in codecs_available]
    missing += [name for library, name in PICTURE_DECODERS.items() if not features.check(library)]
    found = f"PyAV {av.__version__}, Pillow {metadata.version('Pillow')}"
    if missing:
        return "warn", f"{found}, which cannot read {', '.join(missing)}", "install av and Pillow from PyPI's wheels"
    return "ok", found


def check_tokenizer(machine: Machine) -> Verdict:
    """Whether the tokenizer of the model, or the official one, turns text into ids and back."""
    from memphi.inputs.tokenizer import Tokenizer

    text = "What is in the picture?"
    tokenizer = Tokenizer.from_folder(_config_folder(machine.model) or official.folder())
    found = f"tokenizers {metadata.version('tokenizers')}"
    if tokenizer.decode(tokenizer.encode_text(text)) != text:
        return "fail", f"{found} does not give {text!r} back", "install tokenizers again"
    return "ok", found


def check_cache(machine: Machine) -> Verdict:
    """The hub's cache, and whether a download would fit beside it."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    held_bytes = scan_cache_dir(folder).size_on_disk if folder.is_dir() else 0
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(there).free
    found = f"{folder} holds {size_text(held_bytes)}, {size_text(free_bytes)} of the disk are free"
    if free_bytes < DOWNLOAD_BYTES and _model_folder(machine.model) is None:
        return "fail", found, f"make room for {size_text(DOWNLOAD_BYTES)}, or set HF_HOME to a folder on another disk"
    return "ok", found


def check_files(machine: Machine) -> Verdict:
    """Whether the model is here and complete: every name and shape, without reading a weight."""
    folder = _model_folder(machine.model)
    if machine.model == "random":
        return "ok", "random: weights are made up, none are read"
    if folder is None:
        size = " (11.1 GB)" if machine.model == DEFAULT_MODEL else ""
        return "warn", f"{machine.model} is not in the hub's cache", f"it is downloaded{size} when it is first asked"
    try:
        config = read_config(folder)
        count = _check_tensors(folder, config)
        n_bytes = sum(tensor.end - tensor.start for tensor in list_tensors(folder))
    except CheckpointError as wrong:
        cached = not Path(machine.model).expanduser().exists() and machine.model != "demo"
        again = "`memphi ask` goes on with the download" if cached else "copy or download the folder again"
        return "fail", str(wrong), again
    return "ok", f"{folder} is complete: {config.layout} layout, {count} tensors, {size_text(n_bytes)}"


def _check_tensors(folder: Path, config: ModelConfig) -> int:
    """Compare names and shapes with what the model needs, as loading does; returns how many tensors it reads."""
    import torch

    from memphi.checkpoint.loader import as_stored, check_tensors, empty_model
    from memphi.model.meta import on_meta

    stored = find_tensors(folder, config)
    with on_meta():
        model = empty_model(config, torch.bfloat16)
    check_tensors(folder, stored, as_stored(model, stored))
    return len(stored)


def check_host_memory(machine: Machine) -> Verdict:
    """What loading and the libraries need beside a card; without one, `memory` has already said it."""
    host = this_machine()
    found = f"{size_text(host.free_bytes)} of {size_text(host.total_bytes)} available"
    if host.free_bytes < HOST_BYTES:
        return "warn", found, f"close other programs: torch and its libraries alone can take {size_text(HOST_BYTES)}"
    return "ok", found


# Mapping starts CUDA, whose context would count as used memory: it comes last.
CHECKS: dict[str, Callable[[Machine], Verdict]] = {
    "python": check_python,
    "torch": check_torch,
    "driver": check_driver,
    "card": check_card,
    "neighbours": check_neighbours,
    "memory": check_memory,
    "host memory": check_host_memory,
    "attention": check_attention,
    "triton": check_triton,
    "decoders": check_decoders,
    "tokenizer": check_tokenizer,
    "hub cache": check_cache,
    "model files": check_files,
    "mapping": check_mapping,
}


# --- what the checks share -----------------------------------------------------------------------------------------


def _model_folder(model: str) -> Path | None:
    """Where a model's files are, as far as they are here; None: it would be downloaded. Raises CheckpointError."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if "/" not in model or Path(model).expanduser().exists():
        return locate(model).folder
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=PINNED_REVISIONS.get(model))
    except HFValidationError:
        raise CheckpointError(f"{model!r} is neither a folder nor a hub name") from None
    return Path(cached).parent if isinstance(cached, str) else None


def _config_folder(model: str) -> Path | None:
    """As `_model_folder`, without an error, and the default model's config and tokenizer come with memphi."""
    with suppress(CheckpointError):
        return official.folder() if model == DEFAULT_MODEL else _model_folder(model)
    return None


def _nvidia_smi(*arguments: str) -> str:
    """What nvidia-smi prints; raises OSError or TimeoutExpired."""
    command = ["nvidia-smi", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout


def _this_card() -> str:
    """nvidia-smi's words for the card that a program here would use first."""
    return f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').partition(',')[0].strip() or '0'}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "nothing")
