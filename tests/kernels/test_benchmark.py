"""The benchmarks of the kernels get through all they measure, at small sizes."""

import json

import pytest
import torch

from benchmarks import between, kernels, products, quantised_products, steps
from memphi.model.kernels import eight_bits, four_bits


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_the_benchmark_writes_one_document(tmp_path):
    out = tmp_path / "kernels.json"
    assert kernels.main(["--out", str(out), "--commit", "none"]) == 0
    document = json.loads(out.read_text())
    assert {figure["kernel"] for figure in document["figures"]} == {
        *(
            "add_norm",
            "gate",
            "tabulate",
            "rotate_and_keep",
            "choose",
            "narrow",
            "add_to",
            "divide",
            "attend_new",
            "attend_new, 8 bits",
            "attend",
            "chain",
        )
    }
    assert all(
        figure["relative_error"] < 1e-5 and all(figure["microseconds"].values()) for figure in document["figures"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_products_are_measured_under_every_tiling(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "VECTOR_BLOCKS", [(32, 256, 4)])
    monkeypatch.setattr(products, "TILES", [(64, 128, 3, 4)])
    out = tmp_path / "products.json"
    assert products.main(["--out", str(out), "--commit", "none", "--rows", "1,5", "--columns", "0,8"]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [figure["matrix"] for figure in figures[:5]] == ["qkv", "out", "gate_up", "down", "head"]
    assert len(figures) == 2 * (5 + 4)
    assert set(figures[0]["microseconds"]) == {"torch", "chosen", "vector 32x256, 4 warps"}
    assert set(figures[-1]["microseconds"]) == {"torch", "chosen", "tile 64x128, 3 stages, 4 warps"}
    assert all(figure["largest_relative_error"] < 1e-5 for figure in figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_products_in_few_bits_are_measured_under_every_tiling(tmp_path, monkeypatch):
    for name, module, block in (("BYTE_BLOCKS", eight_bits, (128, 256, 4)), ("WORD_BLOCKS", four_bits, (128, 32, 4))):
        monkeypatch.setattr(quantised_products, name, [block])
        monkeypatch.setattr(module, "BLOCK", block)
    for name in ("BYTE_TILES", "WORD_TILES"):
        monkeypatch.setattr(quantised_products, name, [(64, 32, 3, 4)])
    monkeypatch.setattr(quantised_products, "PARTS", (1, 2))
    out = tmp_path / "products.json"
    arguments = ["--out", str(out), "--commit", "none", "--rows", "1,5", "--columns", "8", "--sweep"]
    assert quantised_products.main([*arguments, "--only", "out"]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [figure["scheme"] for figure in figures] == 2 * ["int8"] + 2 * ["int4"] + 2 * ["fp8"]
    always = {"chosen", "kernel", "many", "bf16"}
    assert set(figures[0]["microseconds"]) == always | {"vector 128x256, 4 warps"}
    tiles = {f"tile 64x32, 3 stages, 4 warps, {parts} parts" for parts in (1, 2)}
    assert set(figures[-1]["microseconds"]) == always | tiles | {"many slowly"}
    assert set(figures[-1]["relative_errors"]) == set(figures[-1]["microseconds"]) - {"bf16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_attention_is_measured_between_products(tmp_path, monkeypatch):
    monkeypatch.setattr(between, "PROGRAMS", (2,))
    monkeypatch.setattr(between, "BLOCKS", [(32, 32, 3, 4, 64, True)])
    out = tmp_path / "between.json"
    assert between.main(["--out", str(out), "--commit", "none", "--rows", "1,2", "--tokens", "20"]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [(figure["rows"], figure["tokens"]) for figure in figures] == [(1, 20), (2, 20)]
    named = "2 programs, units of 32, 32x3, 4 warps, 64 parts, early"
    assert all(set(figure["microseconds"]) == {"products alone", "chosen", named} for figure in figures)
    assert all(all(figure["microseconds"].values()) for figure in figures)


@pytest.mark.parametrize("rows", ["one", "1,", "-1", "0"])
def test_rows_that_are_no_counts_are_told_in_a_sentence(tmp_path, capsys, rows):
    out = tmp_path / "between.json"
    with pytest.raises(SystemExit):
        between.main(["--out", str(out), f"--rows={rows}"])
    assert "counts separated by commas" in (told := capsys.readouterr().err) or "1 or more" in told
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sizes are the official ones")
def test_steps_are_measured_whole_and_without_each_part(tmp_path):
    out = tmp_path / "steps.json"
    options = ["--commit", "none", "--rows", "3", "--tokens", "20", "--schemes", "int8", "--cache-format", "int8"]
    assert steps.main(["--out", str(out), *options]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert [figure["adapters"] for figure in figures] == list(steps.SETS)
    assert all(
        figure["milliseconds"] > 0 and set(figure["added_milliseconds"]) == set(steps.PARTS) for figure in figures
    )


def test_every_part_of_a_step_is_called_from_where_the_benchmark_leaves_it_out():
    assert all(callable(getattr(module, name)) for places in steps.PARTS.values() for module, name in places)
