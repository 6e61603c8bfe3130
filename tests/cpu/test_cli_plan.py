"""`memphi plan`: what fits, told without a GPU, without weights and without torch."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image

from memphi.cli import main
from memphi.cli.options import parse_bytes, parse_detail
from memphi.memory import devices
from memphi.memory.costs import GIB, MIB


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `memphi plan` in this process; returns exit code, stdout and stderr."""

    def plan(*arguments):
        monkeypatch.setattr(sys, "argv", ["memphi", "plan", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "200")
    return plan


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((768, 1024, 3), np.uint8)).save(path)
    return path


def test_a_card_that_is_not_here_is_planned_for(run):
    code, out, err = run("--gpu", "RTX 4090")
    assert (code, err) == (0, "")
    assert out.startswith("microsoft/Phi-4-multimodal-instruct in bf16 on RTX 4090\n")
    for name in ("context", "weights", "work space", "keys and values", "in all", "rows at once", "crops a pass"):
        assert any(line.startswith(f"  {name}  ") for line in out.splitlines())
    assert "1681 tokens and 7 crops each" in out
    assert "A4 pages at 300 dpi" in out
    assert "one recording" in out
    assert "prefill chunk" in out


def test_json_says_the_same_to_a_program(run):
    code, out, _ = run("--gpu", "H100", "--memory", "40GiB", "--json")
    document = json.loads(out)
    plan = document["plan"]
    assert code == 0
    assert plan["budget_bytes"] == 40 * GIB
    assert plan["page_bytes"] == 2 * MIB
    assert document["device"]["name"] == "H100 80GB"
    assert document["reasons"].keys() == plan.keys() - {"groups"}
    assert {group["where"] for group in plan["groups"]} == {"device"}
    assert {cost["name"] for cost in document["costs"]} >= {"context", "weights: language", "logits"}
    pictures = document["fits"][0]
    assert pictures["most"] * pictures["tokens_each"] < plan["context_tokens"]


@pytest.mark.parametrize(
    "arguments", [["--memory", "8GiB"], ["--gpu", "RTX 4060"], ["--gpu", "A100", "--memory", "8G"]]
)
def test_eight_gib_are_refused_with_numbers_and_a_way_out(run, arguments):
    code, out, err = run(*arguments, "--scheme", "bf16")
    assert (code, out) == (3, "")
    assert "needs at least 10." in err
    assert "GiB of" in err
    assert "--memory 10." in err
    assert "--scheme int" in err
    assert "--device cpu" in err
    assert err.count("\n") == 1


def test_eight_gib_hold_the_model_in_few_bits(run):
    code, out, _ = run("--gpu", "RTX 4060")
    assert code == 0
    assert out.startswith("microsoft/Phi-4-multimodal-instruct in int8 and bf16 on RTX 4060")
    assert re.search(r"scheme of the weights +int8  bf16 does not fit; int8", out)
    plan = json.loads(run("--memory", "8GiB", "--scheme", "int8", "--json")[1])
    assert (plan["plan"]["scheme"], plan["reasons"]["scheme"]) == ("int8", "as asked for")


def test_the_map_is_shown_where_weights_are_moved(run):
    code, out, _ = run("--memory", "5GiB")
    assert code == 0
    table = out.partition("where the weights lie\n")[2].partition("\n\n")[0]
    assert re.search(r"^  language .*on the device: every step computes with it", table, re.MULTILINE)
    for name in ("vision tower", "audio encoder", "vision adapter", "speech adapter"):
        assert re.search(rf"^  {name} .*on the host: brought ", table, re.MULTILINE)
    assert "where the weights lie" not in run("--memory", "40GiB")[1]


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_the_memory_that_would_work_works_on_that_card(run, scheme):
    asked = ("x", "--gpu", "H100", "--max-tokens", 100_000, "--scheme", scheme)
    _, _, err = run(*asked, "--memory", "8GiB")
    advised = re.search(r"--memory (\S+)", err.split("what would work:")[1])
    assert run(*asked, "--memory", advised[1])[0] == 0


def test_the_way_out_keeps_the_scheme(run, picture):
    pictures = ["-a", picture] * 16
    code, _, err = run("--memory", "8GiB", "What?", *pictures)
    assert code == 3
    advised = re.search(r"--memory \S+ --scheme int[48]", err)
    assert run(*advised[0].split(), "What?", *pictures)[0] == 0


def test_a_request_is_priced(run, picture):
    code, out, err = run("--memory", "16GiB", "What is it?", "-a", picture, "--max-tokens", 100, "--json")
    request = json.loads(out)["request"]
    assert (code, err) == (0, "")
    assert request["fits"]
    assert request["tokens"]["images"] == [1681]
    assert request["tokens"]["answer"] == 100
    assert request["pages"] == -(-(request["tokens"]["prompt"] + 100) // 16)
    assert request["costs"][0]["bytes"] == request["pages"] * 2 * MIB
    code, out, _ = run("--memory", "16GiB", "What is it?", "-a", picture)
    assert code == 0
    assert out.splitlines()[-1].split() == ["fits", "yes"]
    assert "picture.png" in out


def test_a_request_that_does_not_fit_is_told_how_it_would(run, picture):
    code, out, err = run("--memory", "12GiB", "--scheme", "bf16", "What?", *["-a", picture] * 12)
    assert code == 3
    assert out.splitlines()[-1].split() == ["fits", "no"]
    assert err.startswith("memphi: this request does not fit: ")
    assert "smallest of the 12 attachments" in err
    advised = err.partition("--memory ")[2].split()[0].strip(",;")
    assert run("--memory", advised, "--scheme", "bf16", "What?", *["-a", picture] * 12)[0] == 0
    fewer = int(err.partition("the ")[2].partition(" smallest")[0].split()[-1])
    assert run("--memory", "12GiB", "--scheme", "bf16", "What?", *["-a", picture] * fewer)[0] == 0
    assert run("--memory", "12GiB", "--scheme", "bf16", "What?", *["-a", picture] * (fewer + 1))[0] == 3


@pytest.mark.parametrize("cache", ["on", "off"])
def test_what_ask_refuses_does_not_fit(run, monkeypatch, cache):
    """The answer counts as it does in the engine: all that is asked for but its last token."""
    small = ["--model", "demo", "--device", "cpu", "--memory", "472MiB", "--scheme", "bf16", "--kv-cache", cache]
    small += ["--cache-format", "plain"]
    code, _, err = run(*small, "x " * 300, "--max-tokens", 30_000)
    assert code == 3
    most = int(re.search(r"what would work: --max-tokens (\d+)", err)[1])
    assert run(*small, "x " * 300, "--max-tokens", most)[0] == 0
    assert run(*small, "x " * 300, "--max-tokens", most + 1)[0] == 3
    asked = ["ask", *small, "x " * 300, "--max-tokens", str(most + 1)]
    monkeypatch.setattr(sys, "argv", ["memphi", *asked])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3


def test_the_demo_is_planned_on_this_machine(run):
    code, out, _ = run("--model", "demo", "Hello", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["device"]["kind"] == "cpu"
    assert document["request"]["fits"]
    assert document["plan"]["budget_bytes"] < 2 * GIB


def test_the_card_that_is_here_is_planned_for(run, monkeypatch):
    card = devices.DeviceFacts("cuda", "NVIDIA Test", 48 * GIB, 40 * GIB, (7, 5))
    monkeypatch.setattr(devices, "present_card", lambda number: card)
    code, out, _ = run()
    assert code == 0
    assert "on NVIDIA Test" in out
    assert "no units for bf16: --dtype fp16" in out
    code, _, err = run("--memory", "44GiB")
    assert code == 3
    assert "40.0 GiB of its 48.0 GiB are free" in err


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--gpu", "RTX 4096"], 4, "close to it are RTX 4090"),
        (["--device", "toaster"], 4, "'toaster' is no device"),
        (["--device", "cuda"], 4, "nvidia-smi shows no card"),
        (["--device", "cuda:9"], 4, "nvidia-smi shows no cuda:9 here"),
        (["--device", "cuda:x"], 4, "'cuda:x' is no device"),
        (["--device", "cpu", "--gpu", "H100"], 4, "--gpu names a card; leave --device out, or --gpu"),
        (["--model", "someone/else"], 4, "plan downloads nothing"),
        (["-a", "missing.png"], 4, "missing.png"),
        (["--memory", "much"], 2, "'much' is no size"),
        (["--detail", "fine"], 2, "'fine' is no detail"),
        (["--memory", "20GiB", "word " * 140_000], 3, "the model's context holds 131072"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, arguments, code, reason):
    left, out, err = run(*arguments)
    assert (left, out) == (code, "")
    assert reason in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_no_torch_is_imported(picture):
    code = (
        "import sys; from memphi.cli import main\n"
        "sys.argv = ['memphi', 'plan', '--gpu', '4090', 'What?', '-a', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as left:\n    assert not left.code\n"
        "assert 'torch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(picture)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "fits" in finished.stdout


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("8G", 8 << 30),
        ("8Gi", 8 << 30),
        ("8GB", 8 * 10**9),
        ("7.5GiB", 15 << 29),
        ("512MiB", 512 << 20),
        ("512M", 512 << 20),
        ("1TiB", 1 << 40),
        ("100000", 100_000),
        ("100000B", 100_000),
    ],
)
def test_sizes_are_read(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-8GiB", "8GiBs", "8XB", "0", "0.1", "1e9", "eight", "9" * 400])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(typer.BadParameter, match="is no size; write 8GiB"):
        parse_bytes(text)


def test_details_are_read():
    assert [parse_detail(text) for text in ("low", "auto", "high", "12")] == ["low", "auto", "high", 12]
    for wrong in ("", "0", "-1", "finest"):
        with pytest.raises(typer.BadParameter, match="is no detail"):
            parse_detail(wrong)
