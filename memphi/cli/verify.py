"""`memphi verify`: compare memphi with transformers' native model on the same weights."""

import typer

from memphi.cli import options
from memphi.config import DEFAULT_MODEL


def verify(model: options.Model = DEFAULT_MODEL, device: options.Device = "auto", dtype: options.Dtype = "bf16") -> None:
    """Compare memphi with transformers on the same weights, mode by mode, and print the differences."""
    raise typer.Exit(1)
