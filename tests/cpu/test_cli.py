"""The commands as a person meets them: answers on stdout, everything else on stderr, exit codes that mean something."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import memphi
from memphi.cli import main
from memphi.inputs.media import open_media
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(short_tokens=4096, max_tokens=100_000)
    return tiny_checkpoint(tmp_path_factory.mktemp("cli") / "model", config, torch.float32)


@pytest.fixture(scope="module")
def engine(folder):
    return memphi.load(str(folder), "cpu", "fp32")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.wav"
    values = (np.random.default_rng(0).normal(0, 3000, 8000)).astype(np.int16)
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(values[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Run `memphi` in this process; returns exit code, stdout and stderr."""

    def run_memphi(*arguments, stdin=b"", model=folder):
        words = [str(argument) for argument in arguments]
        if words[0] in ("ask", "chat", "verify"):
            words += ["--model", str(model)] + ([] if "--device" in words else ["--device", "cpu"])
            words += [] if "--dtype" in words else ["--dtype", "fp32"]
        monkeypatch.setattr(sys, "argv", ["memphi", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return run_memphi


def start(folder, *arguments, **pipes):
    """Run `memphi ask` with an endless answer in its own process."""
    # Tests that run in the background inherit that interrupts are ignored.
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from memphi.cli import main; main()"
    )
    options = ("--model", folder, "--device", "cpu", "--dtype", "fp32", "--ignore-eos", "--max-tokens", 30_000)
    command = [sys.executable, "-c", script, "ask", "Go on.", *map(str, options), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes)


def expected(engine, question, *attachments, system=None, **sampling):
    media = [open_media(path) for path in attachments]
    params = replace(SamplingParams(max_tokens=6), **sampling)
    return engine.generate(Request.ask(question, media, system, params)).text


def test_public_names_are_all_there():
    for name in memphi._HOMES:
        assert getattr(memphi, name).__name__ == name
        assert name in dir(memphi)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        memphi.nothing  # noqa: B018


def test_the_version_is_the_package_s(run):
    assert run("--version") == (0, f"memphi {memphi.__version__}\n", "")


def test_the_package_may_be_run_as_a_module():
    command = [sys.executable, "-m", "memphi", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"memphi {memphi.__version__}\n", "")


def test_without_a_command_the_help_is_shown(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(command in out for command in ("ask", "chat", "verify"))


def test_the_answer_alone_goes_to_stdout(run, engine):
    code, out, err = run("ask", "Say something.", "--max-tokens", 6)
    assert (code, out, err) == (0, expected(engine, "Say something.") + "\n", "")


def test_several_attachments_are_one_question(run, engine, picture, clip):
    code, out, err = run("ask", "Compare.", "-a", picture, "-a", clip, "-a", picture, "--max-tokens", 6)
    assert (code, out, err) == (0, expected(engine, "Compare.", picture, clip, picture) + "\n", "")


def test_a_recording_may_ask_by_itself(run, engine, clip):
    assert run("ask", "-a", clip, "--max-tokens", 6) == (0, expected(engine, "", clip) + "\n", "")


def test_the_settings_reach_the_sampler(run, engine):
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    code, out, _ = run("ask", "Dice.", "--system", "Be odd.", "--ignore-eos", "--max-tokens", 30, *options)
    whole = expected(engine, "Dice.", system="Be odd.", ignore_eos=True, max_tokens=30, **settings)
    assert (code, out) == (0, whole + "\n")
    stop = whole[3:5]
    code, out, _ = run(
        "ask", "Dice.", "--system", "Be odd.", "--ignore-eos", "--max-tokens", 30, *options, "--stop", stop
    )
    assert (code, out) == (0, whole[: whole.index(stop)] + "\n")


def test_each_asks_about_every_attachment_alone(run, engine, picture, clip):
    code, out, err = run("ask", "What is it?", "--each", "-a", picture, "-a", clip, "--max-tokens", 6)
    answers = [expected(engine, "What is it?", path) for path in (picture, clip)]
    assert (code, out, err) == (0, f"picture.png: {answers[0]}\nclip.wav: {answers[1]}\n", "")


def test_json_says_what_a_program_wants_to_know(run, engine, picture, clip):
    code, out, err = run("ask", "What?", "--json", "-a", picture, "-a", clip, "--max-tokens", 6)
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["answer"] == expected(engine, "What?", picture, clip)
    assert document["mode"] == "vision_speech"
    assert document["finish_reason"] == "length"
    assert document["attachments"] == ["picture.png", "clip.wav"]
    tokens = document["tokens"]
    assert tokens["prompt"] == tokens["text"] + sum(tokens["images"]) + sum(tokens["audio"])
    assert tokens["answer"] == 6
    assert document["seconds"] >= document["first_token_seconds"] > 0
    code, out, _ = run("ask", "What?", "--json", "--each", "-a", picture, "-a", clip, "--max-tokens", 6)
    assert [item["mode"] for item in json.loads(out)] == ["vision", "speech"]


def test_a_detail_is_for_every_picture(run, engine, picture, clip):
    names = ("-a", picture, "-a", clip, "-a", picture)
    code, out, err = run("ask", "What?", "--json", "--detail", "low", *names, "--max-tokens", 6)
    assert (code, err) == (0, "")
    media = [replace(open_media(path), detail="low") for path in (picture, clip, picture)]
    footprint = engine.measure(Request.ask("What?", media))
    assert json.loads(out)["tokens"]["images"] == [image.tokens for image in footprint.images]
    assert footprint.images[0].crops == 2


def test_an_attachment_comes_from_stdin(run, engine, picture):
    code, out, err = run("ask", "What?", "-a", "-", "--max-tokens", 6, stdin=picture.read_bytes())
    assert (code, out, err) == (0, expected(engine, "What?", picture) + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["ask"], 2, "give a question"),
        (["ask", "x", "--each"], 2, "--each needs attachments"),
        (["ask", "x", "-a", "-", "-a", "-"], 2, "can be attached once"),
        (["ask", "x", "--max-tokens", "0"], 2, "--max-tokens"),
        (["ask", "x", "--seed=-1"], 2, "--seed"),
        (["ask", "x", "--detail", "fine"], 2, "'fine' is no detail"),
        (["ask", "x", "--attention", "none"], 2, "--attention"),
        (["ask", "x", "--no-such-option"], 2, "No such option"),
        (["explain"], 2, "No such command"),
        (["ask", "x", "-a", "missing.png"], 4, "missing.png: there is no file missing.png"),
        (["ask", "x", "-a", "-"], 4, "stdin: is empty"),
        (["ask", "x", "-a", ""], 4, "attachment: has an empty name"),
        (["ask", "x", "-a", __file__], 4, "neither a picture nor a sound"),
        (["ask", "x", "--temperature=-1"], 4, "temperature must lie between"),
        (["ask", "x", "--device", "toaster"], 4, "'toaster' is no device"),
        (["ask", "x", "--device", "cuda:99"], 4, "cuda"),
        (["ask", "word " * 60_000], 3, "the model's context holds 100000"),
        (["verify", "--device", "toaster"], 4, "'toaster' is no device"),
    ],
)
def test_what_is_wrong_is_told_on_stderr_with_a_code_of_its_kind(run, arguments, code, reason):
    left, out, err = run(*arguments)
    assert (left, out) == (code, "")
    assert reason in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert code == 2 or (err.startswith("memphi: ") and err.count("\n") == 1)


def test_a_model_that_is_none_is_told_before_anything_is_loaded(run, tmp_path):
    code, out, err = run("ask", "x", model=tmp_path)
    assert (code, out) == (4, "")
    assert err == (
        f"memphi: {tmp_path / 'config.json'} does not exist; a model folder holds config.json and *.safetensors\n"
    )


def test_too_little_memory_is_one_sentence(run, monkeypatch, picture):
    from memphi.engine import engine as module
    from memphi.model.phi4mm import Phi4MM

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Phi4MM, "encode_crops", fail)
    code, out, err = run("ask", "x", "-a", picture)
    assert (code, out) == (3, "")
    assert err.startswith("memphi: this machine has too little memory for this request; send fewer")
    assert err.count("\n") == 1
    monkeypatch.setattr(module, "load_model", fail)
    code, out, err = run("ask", "x")
    assert (code, out) == (3, "")
    assert err.startswith("memphi: this machine has too little memory for the model; choose another device")


def test_a_device_that_nobody_tried_is_warned_of(run, monkeypatch, engine):
    monkeypatch.setattr("memphi.engine.engine.find_device", lambda name: torch.device("cpu"))
    code, out, err = run("ask", "Say something.", "--device", "mps", "--max-tokens", 6)
    assert (code, out) == (0, expected(engine, "Say something.") + "\n")
    assert err.startswith("memphi: mps is untested")


def test_loading_is_shown_in_a_terminal(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("ask", "Say something.", "--max-tokens", 6)
    assert code == 0
    assert "loading" not in out
    assert "loading" in err
    assert "kB" in err


def test_a_folder_with_brackets_is_shown_as_it_is_called(run, monkeypatch, folder, tmp_path):
    bracketed = tmp_path / "model[red]"
    bracketed.symlink_to(folder)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "500")
    assert "model[red]" in run("ask", "Say something.", "--max-tokens", 6, model=bracketed)[2]


def test_an_interrupt_ends_without_a_traceback(folder):
    process = start(folder)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_a_reader_that_goes_away_ends_it_quietly(folder):
    process = start(folder, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_sentence(unbuffered):
    command = [sys.executable, "-c", "from memphi.cli import main; main()", "--version"]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert finished.returncode == 1
    assert finished.stderr == "memphi: reading or writing failed: [Errno 28] No space left on device\n"


def test_a_name_that_is_no_text_is_shown_as_far_as_it_is(run, picture, tmp_path):
    strange = tmp_path / os.fsdecode(b"x\xff.png")
    strange.write_bytes(picture.read_bytes())
    code, out, _ = run("ask", "What?", "--json", "-a", strange, "--max-tokens", 3)
    assert (code, json.loads(out)["attachments"]) == (0, ["x?.png"])
    code, out, _ = run("ask", "What?", "--each", "-a", strange, "--max-tokens", 3)
    assert (code, out.partition(":")[0]) == (0, "x?.png")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("verify") / "model", dtype=torch.float32)


def test_each_goes_on_after_a_file_that_is_damaged(run, picture, clip, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(picture.read_bytes()[:200])  # a good header, so that only decoding shows it
    names = ("-a", picture, "-a", damaged, "-a", clip)
    code, out, err = run("ask", "What?", "--each", *names, "--max-tokens", 3)
    assert code == 4
    assert [line.partition(":")[0] for line in out.splitlines()] == ["picture.png", "clip.wav"]
    assert "damaged.png" in err
    code, out, _ = run("ask", "What?", "--each", "--json", *names, "--max-tokens", 3)
    assert code == 4
    first, second, third = json.loads(out)
    assert "error" not in first | third
    assert "damaged.png" in second["error"]


def test_each_tells_in_its_place_what_cannot_be_opened(run, picture, clip, tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    names = ("-a", empty, "-a", picture, "-a", tmp_path / "missing.png", "-a", clip)
    code, out, err = run("ask", "What?", "--each", *names, "--max-tokens", 3)
    assert code == 4
    assert [line.partition(":")[0] for line in out.splitlines()] == ["picture.png", "clip.wav"]
    assert [line.split(": ")[:2] for line in err.splitlines()] == [["memphi", "empty.png"], ["memphi", "missing.png"]]
    code, out, err = run("ask", "What?", "--each", "--json", *names, "--max-tokens", 3)
    assert (code, err) == (4, "")
    documents = json.loads(out)
    assert [item["attachments"] for item in documents] == [
        ["empty.png"],
        ["picture.png"],
        ["missing.png"],
        ["clip.wav"],
    ]
    assert ["error" in item for item in documents] == [True, False, True, False]
    assert documents[0]["error"] == "empty.png: is empty"


def test_each_loads_no_model_where_nothing_can_be_opened(run, tmp_path):
    code, out, err = run("ask", "What?", "--each", "-a", __file__, "-a", "missing.png", model=tmp_path)
    assert (code, out, err.count("\n")) == (4, "", 2)
    assert err.startswith("memphi: test_cli.py: is neither a picture nor a sound")


def test_each_names_the_attachment_whatever_fails(run, picture):
    names = ("-a", picture, "-a", picture, "--max-tokens", 100_000)
    code, out, err = run("ask", "What?", "--each", *names)
    assert (code, out) == (3, "")
    assert [line.partition("needs")[0] for line in err.splitlines()] == ["memphi: picture.png: the request "] * 2
    documents = json.loads(run("ask", "What?", "--each", "--json", *names)[1])
    assert [item["attachments"] for item in documents] == [["picture.png"]] * 2


def test_a_conversation_cannot_also_be_an_attachment(run):
    code, _, err = run("chat", "-a", "-", stdin=b"hello")
    assert code == 2
    assert "attach a file" in err


def test_verify_prints_a_line_for_each_mode(run, smaller):
    code, out, err = run("verify", model=smaller)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["mode", "text", "vision", "speech", "vision_speech"]
    assert all(line[-1] == "agrees" and line[-4:-1] == ["8", "of", "8"] for line in lines[1:])


def test_verify_fails_where_a_mode_differs(run, smaller, monkeypatch):
    from memphi import verify as module

    monkeypatch.setattr(module, "TOLERANCES", {torch.float32: -1.0})
    code, out, _ = run("verify", model=smaller)
    assert code == 1
    assert out.count("DIFFERS") == 4


def test_verify_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = run("verify")
    assert (code, out) == (1, "")
    assert 'pip install ".[verify]"' in err
    assert 'pip install ".[verify]"' in run("verify", "--help")[1]
