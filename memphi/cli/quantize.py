"""`memphi quantize`: a model's folder with its weights in fewer bits."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from memphi.cli import options
from memphi.cli.terminal import byte_progress, telling

HEADINGS = ("weights", "scheme", "error", "worst")


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or `demo`.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    scheme: Annotated[
        Literal["int8", "int4", "fp8"],
        typer.Option(help="Of the decoder's linears; the embedding and the towers become int8.", show_default=False),
    ],
    device: options.Device = "auto",
) -> None:
    """Write a model's folder anew with its weights quantised; --model OUT then loads them as they are.

    Goes on where an interrupted run ended. In int4 and fp8 the decoder is fitted to example texts on the device, layer
    by layer; that takes 2 GiB of it for the real model. The table has each kind of weight with its relative error, over
    all layers and in the worst; quantisation.json in the folder has every layer.
    """
    with telling("starting"):
        from memphi.checkpoint.locate import locate
        from memphi.checkpoint.quantisation import quantise_folder, summary
        from memphi.engine.device import find_device
        from memphi.errors import CheckpointError

        location, where = locate(model), find_device(device)
    if location.random:
        raise CheckpointError(f"{model} has no files to quantise; load it with --model {model} --scheme {scheme}")
    with byte_progress(f"quantising {model}") as progress:
        errors = quantise_folder(location.folder, folder, scheme, where, progress)
    rows = [(name, kind, f"{error:.2%}", f"{worst:.2%}") for name, kind, error, worst in summary(errors)]
    for row in (HEADINGS, *rows):
        print("{:<36} {:>6} {:>7} {:>7}".format(*row))
