"""Tables and pictures say what the documents hold, and where it comes from."""

import json
import subprocess
import sys

import pytest

from memphi.bench.plot import draw, peer_throughput, throughput
from memphi.bench.table import markdown_table, number_text, read_documents, text_table
from memphi.errors import RequestError

GROWTH = {"from_size": 8, "exponent": 0.9, "exponent_of_limit": 0.95, "holds": True}


def record(name, figure, requests=1, **others):
    phases = {
        p: {"name": p, "bytes": 2 * 10**9, "operations": 10**12, "limit_seconds": 0.5} for p in ("encode", "decode")
    }
    phases["prefill"] = phases["encode"] | {"name": "prefill"}
    return {
        "workload": name,
        "says": f"what {name} is",
        "metric": "tokens",
        "unit": "tokens/s",
        "figure": figure,
        "limit": 400.0,
        "share": figure / 400,
        "repeats": "3 of 3",
        "first_token_seconds": 0.25,
        "seconds": 4.0,
        "token_seconds": 0.003,
        "requests": requests,
        "answer_tokens": 128 * requests,
        "phases": phases,
        "peak_memory_bytes": 12 << 30,
        "memory": [[0.0, 11 << 30], [2.0, 12 << 30]],
        **others,
    }


def peer(name, workload, figure, extrapolated_from=None):
    return {
        "peer": name,
        "workload": workload,
        "figure": figure,
        "seconds": 10.0,
        "extrapolated_from": extrapolated_from,
    }


def document(**others):
    return {
        "benchmark": "memphi bench",
        "commit": "abc",
        "date": "2026-11-24T10:00:00+00:00",
        "device": "a card",
        "torch": "2.11.0",
        "model": "random",
        "dtype": "bf16",
        "scale": 1.0,
        "plan": {"weights_bytes": 11 << 30},
        "card": {"name": "a card", "bytes_per_second": 3.1e12, "operations_per_second": 794e12},
        "workloads": [record("decode-1", 350.0), record("decode-64", 320.0, 64)],
        "curves": [],
        "peers": [peer("transformers", "decode-1", 12.5), peer("recipe", "decode-1", 5.5, {"tokens": "30 of 128"})],
        "peers_are": {"transformers": "as it comes", "recipe": "with everybody's settings"},
        "not_run": {"pages": "there was no time left"},
        **others,
    }


def curve(holds=True):
    point = {"seconds": 2.0, "answer_tokens": 128, "limit": {"seconds": 1.0}}
    points = [point | {"size": size} for size in (1, 2, 4)]
    return {"curve": "rows", "says": "rows", "points": points, "growth": {"seconds": GROWTH | {"holds": holds}}}


def test_a_terminal_sees_the_card_the_figures_and_what_is_missing():
    lines = text_table(document()).splitlines()
    assert "a card, 3,100 GB/s, 794 TFLOP/s" in lines[0]
    assert "weights of 11.0 GiB" in lines[0]
    (row,) = [line for line in lines if line.startswith("decode-1 ")]
    for cell in ("6 GB", "3 TFLOP", "400", "350", "88%", "12.5", "5.5 extrapolated", "0.25 s", "3 ms", "12.0 GiB"):
        assert f" {cell} " in row
    assert row.endswith("what decode-1 is")
    assert lines[-1] == "not run: pages: there was no time left"
    assert not any("scaled" in line for line in lines)


def test_a_scaled_run_says_so_everywhere():
    scaled = document(scale=0.05)
    assert "scaled to 5% of every size" in text_table(scaled)
    assert "Scaled to 5% of every size" in markdown_table([scaled])


@pytest.mark.parametrize(("holds", "verdict"), [(True, "as it should"), (False, "FASTER THAN IT SHOULD")])
def test_a_curve_tells_how_cost_grows(holds, verdict):
    grown = document(curves=[curve(holds)])
    assert f"seconds grows with the power 0.90 from 8 on, the arithmetic with 0.95: {verdict}" in text_table(grown)
    assert verdict in markdown_table([grown])


def test_a_readme_gets_one_table_with_the_newest_figures():
    later = document(date="2026-11-25T10:00:00+00:00", workloads=[record("decode-1", 380.0)], peers=[], not_run={})
    table = markdown_table([later, document()]).splitlines()
    assert table[0] == "| work |  | limit | memphi | of the limit | transformers | recipe |"
    assert table[2] == "| `decode-1`: what decode-1 is | tokens/s | 400 | 380 | 95% | 12.5 | 5.5 extrapolated |"
    assert table[3].startswith("| `decode-64`: ")
    assert sum(line.startswith("|") for line in table) == 4
    assert any("commit abc, 2026-11-25" in line for line in table)
    assert any("recipe: with everybody's settings." in line for line in table)


def test_other_devices_get_tables_of_their_own():
    assert markdown_table([document(), document(device="another card")]).count("| work |") == 2


def test_other_schemes_and_caches_get_tables_of_their_own_and_are_named():
    plan = {"weights_bytes": 4 << 30, "cache_format": "plain"}
    kept = [
        document(),
        document(plan=plan | {"scheme": "int4"}),
        document(plan=plan | {"scheme": "int4", "cache_format": "int8"}),
        document(plan=plan, engine={"scheme": "fp8"}),
    ]
    table = markdown_table(kept)
    assert table.count("| work |") == 4
    for says in ("in bf16,", "in int4 and bf16,", "in int4 and bf16, keys and values in int8,", "in fp8 and bf16,"):
        assert f"random {says} weights of" in table
    assert text_table(kept[1]).startswith("random in int4 and bf16, weights of 4.0 GiB")


def test_the_program_prints_the_table_of_what_bench_wrote(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document()))
    (tmp_path / "other.json").write_text('{"benchmark": "soak"}')
    command = [sys.executable, "-m", "memphi.bench.table", *map(str, sorted(tmp_path.iterdir()))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.strip() == markdown_table([document()])


def test_a_result_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("no")
    with pytest.raises(RequestError, match=r"a\.json cannot be read as JSON"):
        read_documents([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (10470.2, "10,470"), (18.37, "18.4"), (0.0939, "0.0939"), (1.0, "1"), (2.515, "2.52")],
)
def test_numbers_are_short(value, text):
    assert number_text(value) == text


def test_throughput_is_that_of_the_curve_or_else_of_the_workloads():
    assert throughput(document()) == [(1, 32.0, 128 / 1.5), (64, 2048.0, 64 * 128 / 1.5)]
    assert throughput(document(curves=[curve()])) == [(1, 64.0, 128.0), (2, 64.0, 128.0), (4, 64.0, 128.0)]
    assert peer_throughput(document(), "transformers") == [(1, 12.8)]


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_documents_are_drawn(tmp_path, suffix, begins):
    path = tmp_path / "new" / f"figures.{suffix}"
    start = {"workload": "start", "first_token_seconds": 12.0}
    whole = document(workloads=[*document()["workloads"], start], curves=[curve()])
    draw([whole, document(device="another"), document(workloads=[])], path)
    assert path.read_bytes().startswith(begins)


def test_a_picture_names_what_it_shows(tmp_path):
    draw([document()], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    for words in ("Throughput", "Memory taken", "decode-64", "transformers", "limit of this card"):
        assert f"<!-- {words}" in drawn


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(RequestError, match="nothing to draw"):
        draw([], tmp_path / "a.png")
