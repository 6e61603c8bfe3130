"""What you type. Each command is one file, whose heavy imports happen when it runs, so that help is instant."""

import os
import sys

import typer

from memphi.cli.ask import ask
from memphi.cli.chat import chat
from memphi.cli.verify import verify
from memphi.errors import MemphiError

app = typer.Typer(
    help="Run Phi-4-multimodal-instruct: text, images and speech.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(ask)
app.command()(chat)
app.command()(verify)


def main() -> None:
    """The `memphi` command: exit code 0 ok, 2 usage, 3 does not fit, 4 bad input."""
    # Waiting threads would otherwise spin and slow a busy CPU; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except MemphiError as error:
        print(f"memphi: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
