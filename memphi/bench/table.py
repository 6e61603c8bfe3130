"""Figures of documents as tables: for a terminal, and for a README (`python -m memphi.bench.table FILE ...`)."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memphi.bench.limits import Card
from memphi.bench.workloads import BENCHMARK
from memphi.errors import RequestError
from memphi.memory.costs import size_text

Document = Mapping[str, Any]


def text_table(document: Document) -> str:
    """One document for a terminal: the card, the workloads beside their limits, curves, and what was not run."""
    peers = _peers([document])
    head = [
        "workload",
        "reads",
        "computes",
        "limit",
        "memphi",
        "unit",
        "of limit",
        *peers,
        "first token",
        "a token",
        "peak",
        "repeats",
        "what",
    ]
    rows = [head, *(_terminal_row(record, document, peers) for record in document["workloads"])]
    lines = [card_line(document), *([scale_note(document)] if document["scale"] != 1 else [])]
    lines += columns(rows) if document["workloads"] else []
    lines += [line for curve in document["curves"] for line in _curve_lines(curve)]
    lines += [f"not run: {name}: {reason}" for name, reason in document["not_run"].items()]
    return "\n".join(lines)


def markdown_table(documents: Iterable[Document]) -> str:
    """Documents for a README: a table for each device, model and scheme, the newest figure of each workload."""
    groups: dict[tuple[Any, ...], list[Document]] = {}
    for document in sorted(documents, key=lambda document: document["date"]):
        groups.setdefault((document["device"], kept_text(document), document["scale"]), []).append(document)
    return "\n\n".join(_markdown_group(group) for group in groups.values())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines: the first column and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    last = len(row) - 1
    return [
        cell.ljust(width) if place in (0, last) else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def card_line(document: Document) -> str:
    """The model, and what its card reaches."""
    card = card_text(Card(**document["card"]))
    weights = size_text(document["plan"]["weights_bytes"])
    return f"{kept_text(document)}, weights of {weights}; measured here: {card}"


def kept_text(document: Document) -> str:
    """The model, and how its weights and its keys and values are kept, as `memphi plan` says it."""
    plan, asked = document["plan"] or {}, document.get("engine", {}).get("scheme", "auto")
    scheme = plan.get("scheme") or asked  # Older documents have but the one asked for.
    numbers = document["dtype"] if scheme in ("auto", "bf16") else f"{scheme} and {document['dtype']}"
    cache_format = plan.get("cache_format", "plain")
    kept = "" if cache_format == "plain" else f", keys and values in {cache_format}"
    return f"{document['model']} in {numbers}{kept}"


def card_text(card: Card) -> str:
    """What a card reaches, for a person."""
    rate = card.operations_per_second
    operations = f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
    return f"{card.name}, {card.bytes_per_second / 1e9:,.0f} GB/s, {operations}"


def scale_note(document: Document) -> str:
    return f"scaled to {document['scale']:.0%} of every size: these figures compare with no others"


def number_text(value: float | None) -> str:
    """Three figures or more, nothing for nothing."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _peers(documents: Iterable[Document]) -> list[str]:
    return list(dict.fromkeys(record["peer"] for document in documents for record in document["peers"]))


def _peer_text(document: Document, peer: str, workload: str) -> str:
    for record in document["peers"]:
        if (record["peer"], record["workload"]) == (peer, workload):
            return number_text(record["figure"]) + (" extrapolated" if record["extrapolated_from"] else "")
    return ""


def _terminal_row(record: Mapping[str, Any], document: Document, peers: Sequence[str]) -> list[str]:
    token_seconds, peak_bytes = record.get("token_seconds"), record.get("peak_memory_bytes")
    return [
        record["workload"],
        *_work_texts(record),
        number_text(record["limit"]),
        number_text(record["figure"]),
        record["unit"],
        "" if record["share"] is None else f"{record['share']:.0%}",
        *(_peer_text(document, peer, record["workload"]) for peer in peers),
        f"{number_text(record['first_token_seconds'])} s",
        "" if token_seconds is None else f"{number_text(token_seconds * 1000)} ms",
        "" if peak_bytes is None else size_text(peak_bytes),
        record["repeats"],
        record["says"],
    ]


def _work_texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """What a workload reads and computes at least, in all phases."""
    phases = record.get("phases")
    if phases is None:
        return "", ""
    n_bytes, operations = (sum(phase[name] for phase in phases.values()) for name in ("bytes", "operations"))
    return f"{number_text(n_bytes / 1e9)} GB", f"{number_text(operations / 1e12)} TFLOP"


def _curve_lines(curve: Mapping[str, Any]) -> list[str]:
    lines = [f"over {curve['says']}"]
    costs = list(curve["growth"])
    head = ["", *(f"{name} {cost.removesuffix('_seconds')}, s" for cost in costs for name in ("limit", "memphi")), ""]
    rows = [
        [
            f"{point['size']:,}",
            *(number_text(value) for cost in costs for value in (point["limit"][cost], point[cost])),
            "",
        ]
        for point in curve["points"]
    ]
    return lines + columns([head, *rows]) + [_growth_line(cost, told) for cost, told in curve["growth"].items()]


def _growth_line(cost: str, told: Mapping[str, Any] | None) -> str:
    if told is None:
        return f"{cost}: too few points to tell how it grows"
    verdict = "as it should" if told["holds"] else "FASTER THAN IT SHOULD"
    return (
        f"{cost} grows with the power {told['exponent']:.2f} from {told['from_size']:,} on, the arithmetic with "
        f"{told['exponent_of_limit']:.2f}: {verdict}"
    )


def _markdown_group(documents: Sequence[Document]) -> str:
    peers = _peers(documents)
    newest = {record["workload"]: (record, document) for document in documents for record in document["workloads"]}
    head = ["work", "", "limit", "memphi", "of the limit", *peers]
    rows = [head, ["---"] * len(head)]
    for name, (record, document) in newest.items():
        share = "" if record["share"] is None else f"{record['share']:.0%}"
        theirs = [
            next((t for d in (document, *documents[::-1]) if (t := _peer_text(d, peer, name))), "") for peer in peers
        ]
        figures = [number_text(record["limit"]), number_text(record["figure"])]
        rows.append([f"`{name}`: {record['says']}", record["unit"], *figures, share, *theirs])
    table = [f"| {' | '.join(row)} |" for row in rows] if newest else []
    notes = list(dict.fromkeys(_source(document) for document in documents))
    grown = [_curve_note(curve) for document in documents for curve in document["curves"]]
    missing = [f"Not run: {name}: {reason}." for d in documents for name, reason in d["not_run"].items()]
    others = {f"{peer}: {says}." for document in documents for peer, says in document["peers_are"].items()}
    return "\n".join([*table, "", *notes, *sorted(others), *grown, *missing]).strip()


def _source(document: Document) -> str:
    told = f"{card_line(document)}; torch {document['torch']}, commit {document['commit']}, {document['date'][:10]}."
    return told + (f" {scale_note(document).capitalize()}." if document["scale"] != 1 else "")


def _curve_note(curve: Mapping[str, Any]) -> str:
    return f"Over {curve['says']}: " + "; ".join(_growth_line(*pair) for pair in curve["growth"].items()) + "."


def read_documents(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Those of the files that `memphi bench` wrote; raises RequestError for one that is no JSON."""
    return [document for path in paths if (document := _read(path)).get("benchmark") == BENCHMARK]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as wrong:
        raise RequestError(f"{path} cannot be read as JSON: {wrong}") from None
    return document if isinstance(document, dict) else {}


if __name__ == "__main__":
    print(markdown_table(read_documents(map(Path, sys.argv[1:]))))
