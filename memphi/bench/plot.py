"""Figures of documents as a picture: throughput over requests at once, times to the first token, memory over time.

Needs matplotlib, the extra `bench`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memphi.bench.table import kept_text
from memphi.errors import RequestError
from memphi.memory.costs import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]
INCHES = (18, 5)
TEXTS = ("decode-1", "decode-64", "decode-256")


def draw(documents: Sequence[Document], path: Path) -> None:
    """Write one picture of all documents; its kind follows from the file's name. Raises RequestError without any."""
    from matplotlib.figure import Figure

    if not documents:
        raise RequestError("there is nothing to draw: none of these files is a result of memphi bench")
    figure = Figure(figsize=INCHES, layout="constrained")
    throughput, first_token, memory = figure.subplots(1, 3)
    _draw_throughput(throughput, documents)
    _draw_first_token(first_token, documents)
    _draw_memory(memory, documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_throughput(axes: "Axes", documents: Sequence[Document]) -> None:
    """Generated tokens a second over requests at once: measured as lines, the card's limit dashed, peers as marks."""
    for document in documents:
        points = sorted(throughput(document))
        if points:
            sizes, measured, limits = zip(*points, strict=True)
            (line,) = axes.plot(sizes, measured, marker="o", label=_name(document))
            axes.plot(sizes, limits, linestyle="--", color=line.get_color(), label="limit of this card")
        for peer in document["peers_are"]:
            if theirs := peer_throughput(document, peer):
                axes.plot(*zip(*theirs, strict=True), marker="x", linestyle=":", label=peer)
    _finish(axes, "Throughput: 512 tokens, 128 new ones", "requests at once", "generated tokens/s", logarithmic=True)


def throughput(document: Document) -> list[tuple[int, float, float]]:
    """(requests at once, tokens a second, the limit) of text: the curve over rows, or else the workloads."""
    curve = next((curve for curve in document["curves"] if curve["curve"] == "rows"), None)
    if curve is not None:
        taken = [(point["size"], point["answer_tokens"], point["seconds"], point["limit"]) for point in curve["points"]]
        return [(rows, tokens / seconds, tokens / limit["seconds"]) for rows, tokens, seconds, limit in taken]
    records = [record for record in document["workloads"] if record["workload"] in TEXTS]
    return [(r["requests"], r["answer_tokens"] / r["seconds"], r["answer_tokens"] / _least_seconds(r)) for r in records]


def peer_throughput(document: Document, peer: str) -> list[tuple[int, float]]:
    """(requests at once, tokens a second) of the same workloads by a peer."""
    records = {record["workload"]: record for record in document["workloads"] if record["workload"] in TEXTS}
    theirs = {record["workload"]: record["seconds"] for record in document["peers"] if record["peer"] == peer}
    return [(r["requests"], r["answer_tokens"] / theirs[name]) for name, r in records.items() if name in theirs]


def _least_seconds(record: Mapping[str, Any]) -> float:
    return math.fsum(phase["limit_seconds"] for phase in record["phases"].values())


def _draw_first_token(axes: "Axes", documents: Sequence[Document]) -> None:
    """Until all requests of a workload have their first token; the limit as a mark on each bar."""
    height = 0.8 / len(documents)
    names = list(dict.fromkeys(record["workload"] for document in documents for record in document["workloads"]))
    for number, document in enumerate(documents):
        records = document["workloads"]
        places = [names.index(record["workload"]) + number * height for record in records]
        axes.barh(places, [r["first_token_seconds"] for r in records], height, label=_name(document))
        limits = [
            (place, limit) for place, record in zip(places, records, strict=True) if (limit := first_limit(record))
        ]
        axes.plot([limit for _, limit in limits], [place for place, _ in limits], "k|", markersize=12)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    if names:
        axes.set_xscale("log")
    _finish(axes, "Time to the first token of the last request", "s (mark: the limit of this card)", "")


def first_limit(record: Mapping[str, Any]) -> float | None:
    """The least time to the first tokens; None where there is no limit."""
    phases = record.get("phases")
    return phases and phases["encode"]["limit_seconds"] + phases["prefill"]["limit_seconds"]


def _draw_memory(axes: "Axes", documents: Sequence[Document]) -> None:
    """What the engine took while a workload ran."""
    for document in documents:
        for record in document["workloads"]:
            samples = record.get("memory", ())
            if samples:
                axes.plot(*zip(*((s, b / GIB) for s, b in samples), strict=True), label=record["workload"])
    axes.set_ylim(bottom=0)
    _finish(axes, "Memory taken", "seconds since the workload began", "GiB")


def _finish(axes: "Axes", title: str, x: str, y: str, logarithmic: bool = False) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.legend(fontsize="small")


def _name(document: Document) -> str:
    """What tells documents apart."""
    scaled = f", scaled to {document['scale']:.0%}" if document["scale"] != 1 else ""
    return f"{document['device']}, {kept_text(document)}{scaled}"
