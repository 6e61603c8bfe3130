"""The benchmark of small dials, tried on the demo model: what it writes, and what it counts as wrong."""

import json

from benchmarks import small_dials


def test_each_dial_is_a_document_s_entry(tmp_path, capsys):
    out = tmp_path / "small.json"
    arguments = ["--out", str(out), "--model", "demo", "--device", "cpu", "--scheme", "int8", "--placement", "shared"]
    arguments += ["--memory", "1GiB", "100MiB", "1GiB:page", "--tokens", "5", "--scale", "0.1"]
    assert small_dials.main(arguments) == 1
    runs = json.loads(out.read_text())["dials"]
    assert [run["dial"] for run in runs] == ["1GiB", "100MiB", "1GiB:page"]
    for run in (runs[0], runs[2]):
        assert run["wrong"] == []
        assert (run["scheme"], run["placement"], run["peak_bytes"]) == ("int8", "shared", None)
        assert [one["tokens"] for one in run["answers"]] == [5, 5]
        assert run["planned_bytes"] <= run["allowed_bytes"]
        assert run["predicted_bytes"] > run["accounts"]["weights"] + run["accounts"]["context"]
    assert runs[1]["wrong"] == ["refused"]
    assert "100MiB: the model does not fit" in capsys.readouterr().err


def test_what_was_not_kept_is_told():
    said = {"answers": [{"tokens": 5}], "predicted_bytes": 1000}
    assert small_dials._wrong(said, 2000, 1050, 5) == []
    assert small_dials._wrong(said, 1040, 1050, 5) == ["the dial was exceeded"]
    assert small_dials._wrong(said, 2000, 1200, 5) == ["more than 10% from what was predicted"]
    assert small_dials._wrong(said, 2000, None, 6) == ["not answered"]
    assert small_dials._wrong({}, 2000, 1050, 5) == ["the process died"]
