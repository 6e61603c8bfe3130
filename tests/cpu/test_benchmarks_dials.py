"""The benchmark of dials runs, here on a tiny model and a tiny dial, and its requirements can fail."""

import json
import time

import pytest
import torch

from benchmarks.dials.calibration import weigh
from benchmarks.dials.child import Notes
from benchmarks.dials.meter import Seen, sampled
from benchmarks.dials.parent import main
from benchmarks.dials.process import Child
from benchmarks.dials.requests import SMALL, Sizes, make_request
from benchmarks.dials.summary import summarize_dial
from memphi.request import InputMode
from tests.checkpoints import tiny_checkpoint, tiny_config

MIB = 2**20


class CountingMeter:
    """The first reading is the process' absence, the last too; between them it grows."""

    source = "a test"

    def __init__(self):
        self.used = 100
        self.readings = 0

    def used_bytes(self):
        self.readings += 1
        return self.used


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A dial in which everything fits but the longest text, one too small for the model, and single steps."""
    folder = tmp_path_factory.mktemp("dials")
    config = tiny_config(short_tokens=128, max_tokens=224)
    model = tiny_checkpoint(folder / "model", config, torch.float32)
    command = ["--small", "--device=cpu", "--dtype=fp32", f"--model={model}", f"--out={folder / 'out.json'}"]
    command += ["--dial=480MiB", "--dial=401MiB", "--requests=7", "--seconds=60", "--commit=abc"]
    assert main([*command, "--calibrate=60"]) == 0
    first = json.loads((folder / "out.json").read_text())
    assert main(command) == 0
    return first, json.loads((folder / "out.json").read_text())


def test_a_dial_is_judged(document):
    dial = document[0]["dials"]["480MiB"]
    assert dial["complete"]
    assert dial["holds"]
    assert list(dial["checks"].values()) == [True] * 4 + [None] * 3
    assert set(dial["outcomes"]) == {"answered", "refused"}
    assert sum(dial["outcomes"].values()) == 7
    assert [record["fits"] for record in dial["requests"]] == [r["outcome"] == "answered" for r in dial["requests"]]
    assert all(any(c.isdigit() for c in refused["sentence"]) for refused in dial["refused"])
    assert dial["stats"]["answer_tokens"] > 0
    assert dial["exit_code"] == 0


def test_a_dial_too_small_is_refused(document):
    dial = document[0]["dials"]["401MiB"]
    assert dial["holds"]
    assert "at least" in dial["sentence"]


def test_single_steps_are_priced(document):
    cases = {case["case"]: case for case in document[0]["calibration"]["cases"]}
    assert {"vision pass 1", "audio pass 8", "decode 64 x 1000", "prefill 2048 after 8192"} <= set(cases)
    assert cases["vision pass 1"]["predicted_bytes"] > 0
    assert all(len(case.get("runs", [])) == 2 for case in cases.values() if "skipped" not in case)
    assert not any("failed" in run for case in cases.values() for run in case.get("runs", []))
    assert "allows" in cases["prefill 8192"]["skipped"]


def test_finished_dials_are_kept(document):
    first, second = document
    assert second["dials"] == first["dials"]
    assert second["calibration"] == first["calibration"]


def test_a_mix_is_the_same_again_and_has_all_modes():
    modes = set()
    for index in range(12):
        request, again = (make_request(index, 0, SMALL) for _ in range(2))
        assert request.messages[0].content[-1] == again.messages[0].content[-1]
        assert [medium.digest for medium in request.media] == [medium.digest for medium in again.media]
        modes.add(request.mode)
    assert modes == set(InputMode)


def test_the_extremes_are_in_every_mix():
    pictures, sound = (make_request(index, 0, Sizes()).media for index in (1, 2))
    assert [max(medium.content.shape) for medium in pictures] == [3508] * 12
    assert len(sound[0].content.values) == 600 * 16000


def test_what_is_in_use_counts_from_the_lower_end():
    meter = CountingMeter()
    with sampled(meter) as seen:
        meter.used = 700
        wanted = meter.readings + 3
        for _ in range(6000):  # On a busy machine the thread that samples may wait for its turn.
            if meter.readings >= wanted:
                break
            time.sleep(0.01)
        meter.used = 90
    assert (seen.base_bytes, seen.peak_bytes) == (90, 610)
    assert seen.samples >= 2


ANSWERED = {"event": "request", "index": 0, "fits": True, "outcome": "answered", "sentence": None}
REFUSED = {"event": "request", "index": 1, "fits": False, "outcome": "refused", "sentence": "it needs 9 tokens"}
END = {"event": "end", "kinds": {"decode step": {"above": 0, "below": 0}}}


def summary(*events, exit_code=0, peak_bytes=10, requests=2):
    seen = Seen("a test", 0, peak_bytes, 5)
    return summarize_dial(10, requests, Child([*events], exit_code, 1.0, seen))


def test_a_good_dial_holds():
    good = summary(ANSWERED, REFUSED, END)
    assert good["holds"]
    assert good["complete"]
    assert all(good["checks"].values())


@pytest.mark.parametrize(
    ("events", "how"),
    [
        ([ANSWERED | {"outcome": "refused", "sentence": "needs 9"}, REFUSED, END], {}),
        ([ANSWERED | {"outcome": "failed", "out_of_memory": True}, REFUSED, END], {}),
        ([ANSWERED, REFUSED | {"sentence": "no"}, END], {}),
        ([ANSWERED, REFUSED | {"outcome": "answered"}, END], {}),
        ([ANSWERED, REFUSED, END], {"exit_code": -9}),
        ([ANSWERED, REFUSED], {}),
        ([ANSWERED, REFUSED, END], {"peak_bytes": 11}),
        ([ANSWERED, REFUSED, END | {"kinds": {"decode step": {"above": 1, "below": 0}}}], {}),
        ([ANSWERED, REFUSED, END | {"kinds": {"decode step": {"above": 0, "below": 1}}}], {}),
    ],
)
def test_each_requirement_can_fail(events, how):
    failed = summary(*events, **how)
    assert not failed["holds"]
    assert list(failed["checks"].values()).count(False) >= 1


def test_what_was_not_reached_is_listed():
    cut = summary(ANSWERED, REFUSED, END, requests=4)
    assert cut["holds"]
    assert not cut["complete"]
    assert cut["not_run"] == [2, 3]


def test_notes_keep_the_furthest_steps():
    notes = Notes()
    for predicted, observed in ((100 * MIB, 90 * MIB), (100 * MIB, 101 * MIB), (200 * MIB, 100 * MIB)):
        notes.note("prefill chunk", predicted, observed)
    kind = notes.kinds()["prefill chunk"]
    assert (kind["steps"], kind["above"], kind["below"]) == (3, 1, 1)
    assert kind["most_below"] == {"predicted_bytes": 100 * MIB, "observed_bytes": 101 * MIB}
    assert kind["most_above"] == {"predicted_bytes": 200 * MIB, "observed_bytes": 100 * MIB}


@pytest.mark.parametrize(
    ("predicted", "observed", "verdict"), [(100, 101, "below the truth"), (200, 100, "far above the truth")]
)
def test_a_prediction_is_weighed(predicted, observed, verdict):
    assert weigh(predicted * MIB, observed * MIB)["verdict"] == verdict
    assert weigh(observed * MIB, observed * MIB)["verdict"] == "good"
