"""`memphi bench` on the demo model, scaled down: what it measures, what it says of it, and what it leaves out."""

import json
import sys
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memphi.bench import card, peers
from memphi.bench.curves import growth, measure_curve
from memphi.bench.limits import Card
from memphi.bench.memory import MOST_SAMPLES, MemoryTrace
from memphi.bench.peers import Order, Rival, Taken, extrapolate
from memphi.bench.run import Bench, NotRunError, _accept, _run
from memphi.bench.start import STAGES, measure_start
from memphi.bench.suite import Suite
from memphi.bench.workloads import WORKLOADS, Timing, Wanted, Workload, draw
from memphi.cli import main
from memphi.config import EngineConfig
from memphi.engine.engine import load
from memphi.engine.messages import Loading
from memphi.errors import MemphiError
from memphi.request import InputMode

QUICK = ["--model=demo", "--device=cpu", "--dtype=fp32", "--scale=0.02", "--commit=abc"]
LOADING = Loading("demo", "cpu", "fp32", "auto", EngineConfig(), "default")
SCALE = 0.02


@pytest.fixture(autouse=True)
def _quick_card(monkeypatch):
    monkeypatch.setattr(card, "MEASURE_SECONDS", 0.02)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `memphi bench` in this process; returns exit code, stdout and stderr."""

    def bench(*arguments):
        monkeypatch.setattr(sys, "argv", ["memphi", "bench", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return bench


@pytest.fixture(scope="module")
def engine():
    engine = load("demo", "cpu", "fp32")
    yield engine
    engine.close()


@pytest.fixture
def bench(engine):
    """Make a bench with so much time."""

    def make(seconds=60.0, repeats=1):
        return Bench(engine, Card("a card", 1e10, 1e11), repeats, 0, time.perf_counter() + seconds, lambda _: None)

    return make


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_every_workload_is_measured_beside_its_limit(run, tmp_path):
    results, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    code, out, err = run(*QUICK, "--repeats=2", "--json", f"--out={results}", f"--plot={picture}", *WORKLOADS)
    assert code == 0
    document = json.loads(out)
    assert json.loads(results.read_text()) == document
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (document["schema"], document["commit"], document["scale"], document["model"]) == (1, "abc", 0.02, "demo")
    assert {"date", "device", "python", "torch", "memphi", "dtype", "plan", "engine", "wanted"} <= document.keys()
    assert document["card"]["bytes_per_second"] > 1e8
    assert document["card"]["operations_per_second"] > 1e8
    assert document["not_run"] == {}
    assert [record["workload"] for record in document["workloads"]] == list(WORKLOADS)
    for record in document["workloads"]:
        check_record(record, WORKLOADS[record["workload"]].scaled(SCALE))
    assert "memphi: decode-1: " in err
    code, out, _ = run("--plot", tmp_path / "drawn.svg", results)
    assert (code, out) == (0, "")
    assert (tmp_path / "drawn.svg").read_text().startswith("<?xml")


def check_record(record, workload):
    assert record["says"] == workload.says
    assert record["repeats"] == "2 of 2"
    assert len(record["figures"]) == 2
    assert record["figure"] in record["figures"]
    assert record["share"] == pytest.approx(workload.share(record["figure"], record["limit"]))
    assert record["share"] > 0
    assert 0 < record["first_token_seconds"] <= record["seconds"]
    assert record["answer_tokens"] == workload.requests * workload.answer_tokens
    assert record["prompt_tokens"] >= workload.requests * workload.prompt_tokens
    assert (record["token_seconds"] is None) == (workload.answer_tokens == 1)
    assert (record["crops"] > 0, record["sound_seconds"] > 0) == (workload.images > 0, workload.seconds > 0)
    # Nothing was found in a cache, and nobody had to make room.
    assert (record["shared_tokens"], record["pauses"], record["rungs"]) == (0, 0, 0)
    assert record["peak_memory_bytes"] >= max(n_bytes for _, n_bytes in record["memory"]) > 2**20


def test_a_person_gets_a_table_that_says_it_is_scaled(run):
    code, out, _ = run(*QUICK, "--repeats=1", "decode-1")
    assert code == 0
    assert out.splitlines()[0].startswith("demo in fp32, weights of ")
    assert out.splitlines()[1].startswith("scaled to 2% of every size")
    assert out.splitlines()[-1].startswith("decode-1 ")


def test_what_there_was_no_time_for_is_listed(run):
    code, out, err = run(*QUICK, "--seconds=0", "--against=recipe", "--curve=rows", "--json", "decode-1", "start")
    assert code == 1
    document = json.loads(out)
    assert (document["workloads"], document["peers"], document["curves"][0]["points"]) == ([], [], [])
    assert {"decode-1", "start", "recipe", "rows 1"} <= document["not_run"].keys()
    assert all("no time left" in reason for reason in document["not_run"].values())
    assert "memphi: decode-1: not run: " in err


def test_what_fails_leaves_the_rest_to_be_measured(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "prefill", Workload("prefill", "first token", prompt_tokens=10**6))
    wanted, models = Wanted(("prefill", "decode-1"), repeats=1, scale=SCALE * 5), []

    def load_demo():
        engine = load("demo", "cpu", "fp32")
        models.append(weakref.ref(engine.model))
        return engine

    kept = list[dict]()
    document = Suite(wanted, LOADING, load_demo, lambda _: None, kept.append).run()
    assert [record["workload"] for record in document["workloads"]] == ["decode-1"]
    assert "tokens" in document["not_run"]["prefill"]
    assert models[0]() is None, "peers would run beside memphi's weights"
    assert [len(each["workloads"]) for each in kept] == [0, 1], "what was measured is kept at once"
    assert kept[0]["not_run"].keys() == {"prefill"}
    assert kept[1] | {"date": document["date"]} == document


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["decode-2"], 2, "there is no 'decode-2'"),
        (["--curve=tokens"], 2, "there is no 'tokens'"),
        (["--against=vllm"], 2, "there is no 'vllm'"),
        (["--plot=a.pdf"], 2, "a plot is a .png or a .svg file"),
        (["--plot=a.png", "none.json"], 4, "none.json cannot be read"),
        (["--plot=/dev/null/a.png"], 2, "a.png cannot be written"),
        (["--out=."], 2, ". cannot be written (Is a directory)"),
        (["--seed=-1"], 2, "'--seed'"),
    ],
)
def test_wrong_words_are_told_before_anything_is_loaded(run, monkeypatch, arguments, code, words):
    monkeypatch.setenv("COLUMNS", "300")
    left, out, err = run(*arguments)
    assert (left, out) == (code, "")
    assert words in err


def test_where_figures_cannot_be_written_they_are_printed(run, monkeypatch, tmp_path):
    results, measure = tmp_path / "bench.json", Suite.run
    monkeypatch.setattr(Suite, "run", lambda suite: results.mkdir() or measure(suite))
    code, out, err = run(*QUICK, "--repeats=1", f"--out={results}", "decode-1")
    assert code == 1
    assert out.splitlines()[-1].startswith("decode-1 ")
    assert err.splitlines()[-1] == f"memphi: reading or writing failed: [Errno 21] Is a directory: '{results}'"


def test_a_missing_library_is_told(run, monkeypatch):
    monkeypatch.setattr(sys.modules["memphi.cli.bench"], "find_spec", lambda name: None)
    assert run("--plot=a.png")[::2] == (
        1,
        'memphi: drawing needs matplotlib; install it from your copy of memphi: pip install ".[bench]"\n',
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, _ = run(*QUICK, "--repeats=1", "--against=transformers", "decode-1")
    assert code == 0
    assert "not run: transformers: comparing needs transformers" in out


# --- a workload ----------------------------------------------------------------------------------------------------


def test_an_answer_that_takes_too_long_is_ended(bench, engine):
    late = bench(seconds=1.0)
    started = time.perf_counter()
    with pytest.raises(NotRunError, match="no time left"):
        late.measure(Workload("long", "tokens", 4, 64, 20_000))
    assert time.perf_counter() - started < 30
    assert engine.stats.open == 0


def test_repeats_that_do_not_fit_are_left_out(bench, monkeypatch):
    short = bench(repeats=3)
    answer, seeds = short.once, []

    def slow(workload, seed):
        seeds.append(seed)
        short._deadline = time.perf_counter() + (60.0 if len(seeds) < 4 else 0.0)
        return answer(workload, seed)

    monkeypatch.setattr(short, "once", slow)
    record = short.measure(WORKLOADS["decode-1"].scaled(SCALE))
    assert (record["repeats"], len(record["figures"]), seeds) == ("1 of 3", 1, [0, 4, 1, 2])


def test_text_runs_under_the_adapter_that_it_is_given(bench, engine):
    words = bench()._words
    (draft,) = draw(Workload("x", "tokens", 1, 64, 24), words, 3)
    parts = [
        _accept(engine, replace(draft, mode=mode)) for mode in (InputMode.TEXT, InputMode.VISION, InputMode.SPEECH)
    ]
    answers = [_run(engine, [part], time.perf_counter() + 60)[0].ids for part in parts]
    assert len(set(answers)) == 3
    assert answers[0] == engine.generate(draft.request()).ids


def test_an_adapter_in_the_weights_costs_nothing(bench):
    footprint = SimpleNamespace(mode=InputMode.VISION)
    made = bench()
    assert made._task(footprint, WORKLOADS["decode-1"]).adapter == "vision"
    made.engine = SimpleNamespace(config=EngineConfig(merge="vision"))
    assert made._task(footprint, WORKLOADS["decode-1"]).adapter is None


def test_a_trace_of_memory_keeps_its_peak_when_thinned():
    readings = iter([5, *range(1000)])
    with MemoryTrace(lambda: next(readings)) as trace:
        pass
    trace.samples = [(n / 100, n) for n in range(1000)]
    thinned = trace.thinned()
    assert len(thinned) <= MOST_SAMPLES
    assert max(n_bytes for _, n_bytes in thinned) == trace.peak_bytes == 999
    with MemoryTrace(None) as nothing:
        pass
    assert (nothing.peak_bytes, nothing.thinned()) == (None, [])


def test_a_start_is_measured_from_nothing_to_a_token():
    record = measure_start(LOADING, time.perf_counter() + 60, lambda _: None)
    assert list(record["stages"]) == list(STAGES)
    assert 0 < record["stages"]["imported"] < record["stages"]["loaded"] < record["figure"]


@pytest.mark.parametrize(
    ("does", "seconds", "why"), [("echo no memory", 60.0, "no memory"), ("sleep 60", 0.2, "no time left")]
)
def test_a_start_that_comes_to_nothing_is_told(monkeypatch, tmp_path, does, seconds, why):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexec {does}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(MemphiError, match=f"the process ended without a token: .*{why}"):
        measure_start(LOADING, time.perf_counter() + seconds, lambda _: None)


# --- curves --------------------------------------------------------------------------------------------------------


def test_a_curve_has_costs_and_limits_that_grow(bench):
    curve = measure_curve(bench(), "seconds", scale=0.001)
    assert [point["size"] for point in curve["points"]] == [1, 2, 5]
    limits = [point["limit"]["first_token_seconds"] for point in curve["points"]]
    assert limits == sorted(limits)
    assert all(point["first_token_seconds"] > 0 for point in curve["points"])
    assert curve["growth"]["first_token_seconds"]["exponent_of_limit"] > 0
    assert curve["not_run"] == {}


@pytest.mark.parametrize(
    ("power", "of_limit", "holds"), [(1.0, 0.9, True), (1.2, 0.9, False), (1.9, 1.9, True), (2.2, 1.9, False)]
)
def test_a_cost_may_grow_as_the_arithmetic_does(power, of_limit, holds):
    points = [{"size": n, "seconds": 3 * n**power, "limit": {"seconds": n**of_limit}} for n in (1, 2, 4, 8, 16, 32)]
    told = growth(points, "seconds")
    assert told["holds"] is holds
    assert told["exponent"] == pytest.approx(power)
    assert told["exponent_of_limit"] == pytest.approx(of_limit)
    assert told["from_size"] == 8
    assert growth(points[:2], "seconds") is None


def test_crops_of_a_curve_are_those_of_its_pictures(bench, engine):
    from memphi.bench.curves import CURVES

    config = engine.model.config
    for crops in CURVES["crops"].sizes:
        (draft,) = draw(CURVES["crops"].workload(crops, config), bench()._words, 0)
        assert engine.measure(draft.request()).crops == crops


# --- peers ---------------------------------------------------------------------------------------------------------


def test_peers_do_the_same_work_in_a_process_of_their_own(run):
    code, out, _ = run(*QUICK, "--repeats=1", "--against=recipe", "--json", "decode-1", "describe-8", "mixed")
    assert code == 0
    document = json.loads(out)
    assert [record["workload"] for record in document["peers"]] == ["decode-1", "describe-8"]
    assert all(record["figure"] > 0 and record["extrapolated_from"] is None for record in document["peers"])
    assert document["peers"][0]["transformers"]
    assert list(document["not_run"]) == ["recipe: mixed"]
    assert "CUDA_LAUNCH_BLOCKING" in document["peers_are"]["recipe"]


def test_what_a_peer_has_no_time_for_is_extrapolated_and_says_so(monkeypatch):
    monkeypatch.setattr(peers, "WORK_SECONDS", 0.0)
    order = Order("transformers", "demo", "cpu", "fp32", ("describe-64",), SCALE * 2, 0, 60.0)
    rival = Rival(peers.PEERS["transformers"], order)
    record = rival.measure(WORKLOADS["describe-64"].scaled(SCALE * 2), time.perf_counter() + 60)
    assert record["extrapolated_from"] == {"batches": "1 of 3", "tokens": "2 of 10"}
    assert record["figure"] == pytest.approx(3 / record["seconds"])
    # Pictures one after another: two whole batches come before the last one's first token.
    assert 2 / 3 < record["first_token_seconds"] / record["seconds"] < 1


def test_a_peer_never_says_what_attachments_stand_on():
    """Its model takes that for one whose sizes are missing, and random weights may well say it."""
    order = Order("transformers", "demo", "cpu", "fp32", ("describe-1",), SCALE, 0, 60.0)
    rival = Rival(peers.PEERS["transformers"], order)
    images = torch.tensor([rival._tokenizer.image_id])
    rival._model.lm_head.register_forward_hook(lambda head, x, logits: logits.index_fill(-1, images, 1e4))
    record = rival.measure(WORKLOADS["describe-1"].scaled(SCALE), time.perf_counter() + 60)
    assert record["extrapolated_from"] is None


def test_texts_are_one_batch_and_the_recipe_takes_one_thing_at_a_time(bench):
    words = bench()._words
    texts, pictures = (draw(WORKLOADS[name].scaled(0.05), words, 0) for name in ("decode-64", "describe-64"))
    album = draw(replace(WORKLOADS["describe-8"], size=(32, 32)), words, 0)
    rival = Rival.__new__(Rival)
    rival._peer = peers.PEERS["transformers"]
    assert [len(rival._batches(drafts)) for drafts in (texts, pictures, album)] == [1, 4, 1]
    rival._peer = peers.PEERS["recipe"]
    assert [len(rival._batches(drafts)) for drafts in (texts, pictures, album)] == [4, 4, 8]


def test_extrapolation_goes_on_at_the_pace_seen():
    whole, cut = Taken(1.0, 5.0, 5), Taken(3.0, 5.0, 2)
    assert extrapolate([whole], 1, 5) == Timing(1.0, 5.0)
    assert extrapolate([cut], 1, 5) == Timing(3.0, 11.0)
    assert extrapolate([whole, cut], 4, 5) == Timing(3 * 8.0 + 2.0, 32.0)


def test_a_card_is_measured_in_the_format_of_the_weights():
    for dtype in (torch.float32, torch.bfloat16):
        measured = card.measure_card(torch.device("cpu"), dtype)
        assert measured.bytes_per_second > 1e8
        assert measured.operations_per_second > 1e7
        assert measured.name.startswith("CPU")
