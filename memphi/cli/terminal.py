"""What the commands share: attachments as they are typed, a model loaded under a progress bar, an answer on stdout."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memphi.config import EngineConfig
    from memphi.engine.engine import Engine
    from memphi.engine.settings import AllocatorName
    from memphi.request import Media, Request


def open_attachments(sources: list[str]) -> "tuple[Media, ...]":
    """Open paths and URLs, and stdin for `-`; raises MediaError naming the one that cannot be opened."""
    from memphi.inputs.media import open_media

    return tuple(
        open_media(sys.stdin.buffer, name=attachment_name(source)) if source == "-" else open_media(source)
        for source in sources
    )


def attachment_name(source: str) -> str:
    """What an attachment is called in answers and errors."""
    from memphi.inputs.media import label_of

    return "stdin" if source == "-" else label_of(source)


def load_engine(
    model: str,
    device: str,
    dtype: Any,  # noqa: ANN401
    attention: Any,  # noqa: ANN401
    config: "EngineConfig",
    allocator: "AllocatorName" = "default",
    debug_cuda: bool = False,
) -> "Engine":
    """Load a model, telling on stderr how far it is."""
    warn_of_device(device)
    make_settings(allocator, debug_cuda)
    with telling("starting"):
        from memphi.engine.device import find_device
        from memphi.engine.engine import load
        from memphi.engine.watch import record_memory, watch_for_nan
    if debug_cuda and find_device(device).type == "cuda":
        record_memory()
    with failures_recorded(), byte_progress(f"loading {model}") as progress:
        engine = load(model, device, dtype, attention, config, progress=progress)
    if debug_cuda:
        watch_for_nan(engine.model)
        if engine.model.device.type != "cuda":
            tell(f"--debug-cuda only looks for NaN here: the device is {engine.model.device}")
    return engine


def make_settings(allocator: "AllocatorName", debug_cuda: bool = False) -> None:
    """Set what CUDA reads when it starts; says on stderr what a person's own settings keep from being used."""
    from memphi.engine.settings import use_allocator, wait_for_launches

    if (obstacle := use_allocator(allocator)) is not None:
        tell(obstacle)
    if debug_cuda:
        wait_for_launches()


@contextmanager
def failures_recorded() -> Iterator[None]:
    """With --debug-cuda on a GPU, what fails inside leaves a file in the current folder, and stderr says which."""
    from memphi.engine.watch import memory_kept

    with memory_kept(tell, Path()):
        yield


def tell(what: str) -> None:
    """One line on stderr."""
    print(f"memphi: {what}", file=sys.stderr)


def warn_of_device(name: str) -> None:
    """Say on stderr what a person should know of a device before they trust an answer."""
    if name.partition(":")[0] == "mps":
        tell("mps is untested: compare an answer or two with --device cpu")


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while the block runs; call what it gives to change its words. Silent outside a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status.update


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, driven by (bytes done, bytes in total). Silent outside a terminal.

    It appears with the first call, so that it never stands above the bars of a download.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Disabled, not only silent: outside a terminal it would end with an empty line.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)

    def show(done_bytes: int, total_bytes: int) -> None:
        bar.start()
        bar.update(task, completed=done_bytes, total=total_bytes)

    try:
        yield show
    finally:
        bar.stop()


def stream_answer(engine: "Engine", request: "Request", opening: str = "") -> str:
    """Write an answer to stdout as it comes, after the opening, and return it; nothing where it fails at once.

    What memory pressure changed about the request is told on stderr, after the answer.
    """
    pieces: list[str] = []
    degraded: tuple[str, ...] = ()
    try:
        with failures_recorded():
            for delta in engine.stream(request):
                print(delta.text if pieces else opening + delta.text, end="", flush=True)
                pieces.append(delta.text)
                degraded += delta.degraded
    finally:
        if pieces:
            print(flush=True)
    for sentence in degraded:
        tell(sentence)
    return "".join(pieces)
