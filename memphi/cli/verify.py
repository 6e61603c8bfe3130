"""`memphi verify`: compare memphi with transformers' native model on the same weights."""

from typing import TYPE_CHECKING

import typer

from memphi.cli import options
from memphi.cli.terminal import make_settings, telling, warn_of_device
from memphi.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from memphi.verify import ModeReport

HEADINGS = ("mode", "prompt", "relative", "limit", "largest", "mean", "top-1", "answer", "")


def verify(
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    allocator: options.Allocator = "default",
) -> None:
    r"""Compare memphi with transformers on the same weights, mode by mode; the exit code is 1 if they differ.

    Needs the extra `verify`, from your copy of memphi: pip install ".\[verify]". Both models run one after the other.
    """
    warn_of_device(device)
    make_settings(allocator)
    with telling("starting") as tell:
        from memphi.engine.device import find_device, find_dtype
        from memphi.verify import verify as compare

        reports = compare(model, find_device(device), find_dtype(dtype), progress=tell)
    for row in (HEADINGS, *map(_row, reports)):
        print("{:<13} {:>6} {:>9} {:>7} {:>9} {:>9} {:>6} {:>8}  {}".format(*row).rstrip())
    if not all(report.agrees for report in reports):
        raise typer.Exit(1)


def _row(report: "ModeReport") -> tuple[str, ...]:
    same = sum(1 for ours, theirs in zip(report.ours, report.theirs, strict=False) if ours == theirs)
    return (
        report.mode.name.lower(),
        str(report.prompt_tokens),
        f"{report.relative:.2e}",
        f"{report.tolerance:.0e}",
        f"{report.largest:.2e}",
        f"{report.mean:.2e}",
        f"{report.top1:.1%}",
        f"{same} of {max(len(report.ours), len(report.theirs))}",
        "agrees" if report.agrees else "DIFFERS",
    )
