"""The benchmark of small dials, tried on the demo model: what it writes, and what it counts as wrong."""

import json

from benchmarks import small_dials


def test_each_dial_is_a_document_s_entry(tmp_path, capsys):
    out = tmp_path / "small.json"
    dials = ["1GiB", "100MiB", "1GiB:int4,adapters,page"]
    arguments = ["--out", str(out), "--model", "demo", "--device", "cpu", "--scheme", "int8", "--placement", "shared"]
    assert small_dials.main([*arguments, "--memory", *dials, "--tokens", "5", "--scale", "0.1"]) == 1
    runs = json.loads(out.read_text())["dials"]
    assert [run["dial"] for run in runs] == dials
    for run, kept in ((runs[0], ("int8", "shared")), (runs[2], ("int4", "adapters"))):
        assert run["wrong"] == []
        assert (run["scheme"], run["placement"], run["peak_bytes"]) == (*kept, None)
        assert [one["tokens"] for one in run["answers"]] == [5, 5]
        assert run["planned_bytes"] <= run["allowed_bytes"]
        assert run["predicted_bytes"] > run["accounts"]["weights"] + run["accounts"]["context"]
    assert runs[1]["wrong"] == ["refused"]
    assert "100MiB: the model does not fit" in capsys.readouterr().err


def test_every_dial_is_enough_by_arithmetic(capsys):
    """On an H100, with what its context was measured to take; and nobody's weights have to be streamed."""
    assert small_dials.main(["--dry", "H100"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().err.splitlines())
    assert said.keys() == set(small_dials.DIALS)
    assert said["4GiB"].startswith("int4, shared, keys and values int8; 4")
    for dial, line in said.items():
        predicted = float(line.partition("predicted ")[2].removesuffix(" GiB"))
        assert 0.85 < predicted * 2**30 / small_dials.parse_bytes(dial.partition(":")[0]) <= 1


def test_a_request_that_no_plan_has_room_for_is_told(capsys):
    assert small_dials.main(["--dry", "H100", "--memory", "5GiB:int4,resident,page", "2GiB"]) == 1
    said = capsys.readouterr().err
    assert "5GiB:int4,resident,page: 9358 tokens and an answer's, and there is room for" in said
    assert "2GiB: the model does not fit" in said


def test_what_was_not_kept_is_told():
    said = {"answers": [{"tokens": 5}], "predicted_bytes": 1000}
    assert small_dials._wrong(said, 2000, 1050, 5) == []
    assert small_dials._wrong(said, 1040, 1050, 5) == ["the dial was exceeded"]
    assert small_dials._wrong(said, 2000, 1200, 5) == ["more than 10% from what was predicted"]
    assert small_dials._wrong(said, 2000, None, 6) == ["not answered"]
    assert small_dials._wrong({}, 2000, 1050, 5) == ["the process died"]
