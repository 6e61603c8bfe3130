"""`memphi bench`: how fast this machine runs a model, beside what its card allows."""

import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from memphi.cli import options
from memphi.cli.terminal import load_engine, make_settings, tell, telling, warn_of_device
from memphi.errors import MemphiError

if TYPE_CHECKING:
    from memphi.bench.workloads import Wanted
    from memphi.engine.engine import Engine


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(help="Workloads by name; none: all. Or, with --plot, results (FILE.json) to draw."),
    ] = None,
    model: options.Model = "random",
    device: options.Device = "auto",
    dtype: options.Dtype = "bf16",
    attention: options.AttentionBackend = "auto",
    memory: options.Memory = None,
    cache_format: options.CacheFormat = "auto",
    pin: options.Pins = [],  # noqa: B006
    merge: options.Merge = None,
    kernels: options.Kernels = "auto",
    scheme: options.Scheme = "auto",
    allocator: options.Allocator = "default",
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is done; the middle one counts.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0.0, help="Time for everything; what it does not hold is told.")
    ] = 300.0,
    against: Annotated[
        str, typer.Option(help="The same work by transformers, recipe, or both: transformers,recipe.")
    ] = "",
    curve: Annotated[str, typer.Option(help="How cost grows over context, rows, crops, seconds, or several.")] = "",
    scale: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="A share of every size, to try it; compares with nothing.")
    ] = 1.0,
    seed: options.Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw figures into a file, .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON document here too, as far as it is made, after each workload.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="The commit measured, where git cannot say.")] = None,
) -> None:
    """Measure named workloads beside the limit of this very card, and print a table or one JSON document.

    The exit code is 1 where a workload was not measured; why is told.
    """
    if plot is not None:
        _check_plot(plot)
        if what and all(name.endswith(".json") for name in what):
            return _draw_results([Path(name) for name in what], plot)
    if out is not None:
        _check_target(out)
    wanted = _wanted(what or [], curve, against, repeats, seconds, scale, seed, commit)
    # Random weights repeat themselves: what speculation gains on them, it gains nowhere else.
    config = options.engine_config(memory, "on", pin, merge, False, kernels, scheme, cache_format)
    warn_of_device(device)
    make_settings(allocator)
    with telling("starting"):
        from memphi.bench.suite import Suite
        from memphi.engine.messages import Loading

    def load() -> "Engine":
        return load_engine(model, device, dtype, attention, config, allocator)

    def keep(document: dict[str, Any]) -> None:
        if out is not None:
            with suppress(OSError):  # Told at the end, below the figures.
                _write(document, out)

    document = Suite(wanted, Loading(model, device, dtype, attention, config, allocator), load, tell, keep).run()
    _show(document, as_json, out, plot)
    measured = {record["workload"] for record in document["workloads"]}
    if not measured.issuperset(wanted.workloads):
        raise typer.Exit(1)
    return None


def _wanted(
    names: list[str],
    curve: str,
    against: str,
    repeats: int,
    seconds: float,
    scale: float,
    seed: int,
    commit: str | None,
) -> "Wanted":
    """What is to be measured; raises typer.BadParameter for a name that means nothing."""
    from memphi.bench.workloads import NAMES, CurveName, PeerName, Wanted

    curves = _choose(curve.split(","), get_args(CurveName))
    workloads = _choose(names, NAMES) or (() if curves else NAMES)
    peers = _choose(against.split(","), get_args(PeerName))
    return Wanted(workloads, curves, peers, repeats, seconds, scale, seed, commit)


def _choose(names: list[str], choices: tuple[str, ...]) -> tuple[Any, ...]:
    for name in names:
        if name and name not in choices:
            raise typer.BadParameter(f"there is no {name!r}; use {', '.join(choices)}")
    return tuple(dict.fromkeys(filter(None, names)))


def _show(document: dict[str, Any], as_json: bool, out: Path | None, plot: Path | None) -> None:
    """Print the document or its table, then write what was asked for: if that fails, the figures are seen."""
    from memphi.bench.table import text_table

    print(json.dumps(document, indent=2) if as_json else text_table(document))
    if out is not None:
        _write(document, out)
    if plot is not None:
        from memphi.bench.plot import draw

        draw([document], plot)


def _write(document: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _check_plot(path: Path) -> None:
    """Before anything is measured: whether a plot can be drawn there."""
    if path.suffix not in (".png", ".svg"):
        raise typer.BadParameter(f"a plot is a .png or a .svg file, not {path.name}")
    if find_spec("matplotlib") is None:
        raise MemphiError('drawing needs matplotlib; install it from your copy of memphi: pip install ".[bench]"')
    _check_target(path)


def _check_target(path: Path) -> None:
    """Before anything is measured: whether a file can be written there."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as wrong:
        raise typer.BadParameter(f"{path} cannot be written ({wrong.strerror}); name another file") from None
    if is_new:
        path.unlink()


def _draw_results(results: list[Path], path: Path) -> None:
    """Draw what earlier runs found."""
    from memphi.bench.plot import draw
    from memphi.bench.table import read_documents

    draw(read_documents(results), path)
