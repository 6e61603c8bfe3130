"""What you type. Each command is one file, whose heavy imports happen when it runs, so that help is instant."""

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from memphi import __version__
from memphi.cli.ask import ask
from memphi.cli.bench import bench
from memphi.cli.chat import chat
from memphi.cli.doctor import doctor
from memphi.cli.plan import plan
from memphi.cli.quantize import quantize
from memphi.cli.serve import serve
from memphi.cli.verify import verify
from memphi.errors import MemphiError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(ask)
app.command()(bench)
app.command()(chat)
app.command()(doctor)
app.command()(plan)
app.command()(quantize)
app.command()(serve)
app.command()(verify)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"memphi {__version__}")
        raise typer.Exit


@app.callback()
def memphi(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Phi-4-multimodal-instruct: text, images and speech."""


def main() -> None:
    """The `memphi` command: exit code 0 ok, 1 failed, 2 usage, 3 does not fit, 4 bad input, 130 interrupted.

    Interrupts and a reader of stdout that went away (`| head`) end it at once, without a word.
    """
    # Waiting threads would otherwise spin and slow a busy CPU; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _open_what_is_closed()
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # neither what is typed nor a file's name need be UTF-8
    try:
        _run()
    except MemphiError as error:
        print(f"memphi: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.EPIPE:
            print(f"memphi: reading or writing failed: {error}", file=sys.stderr)
        sys.stdout = io.StringIO()  # Python flushes it once more as it ends, which would fail again
        sys.exit(1)


def _open_what_is_closed() -> None:
    """Have an empty stdin, and somewhere for output to go, where a program was started without."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


def _run() -> None:
    """Run the command, and write all that it printed."""
    try:
        app()
    finally:
        sys.stdout.flush()
