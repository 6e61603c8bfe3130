"""--on-pressure on the command line: the answer on stdout, what was changed about the request on stderr."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from memphi.cli import main
from memphi.engine.engine import Engine
from tests.scenes import lively_model, plan_of, tiny_tokenizer


@pytest.fixture(scope="module")
def engine():
    """Room for 272 tokens: two of the pictures, or all three in 4 crops each instead of 6."""
    model = lively_model()
    built = Engine(model, tiny_tokenizer(), plan=plan_of(model, pages=17))
    yield built
    built.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    names = ("a.png", "b.png", "c.png")
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (220, 330, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in names]


@pytest.fixture
def run(monkeypatch, capsys, engine):
    """Run `memphi` in this process on the small engine; returns exit code, stdout and stderr."""

    def run_memphi(*arguments, stdin=""):
        for command in ("ask", "chat"):
            # By name: the package has the command itself under the module's name.
            monkeypatch.setattr(sys.modules[f"memphi.cli.{command}"], "load_engine", lambda *_: engine)
        monkeypatch.setattr(sys, "argv", ["memphi", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return run_memphi


def ask(run, pictures, *arguments):
    attached = [word for path in pictures for word in ("-a", path)]
    return run("ask", "How many?", *attached, "--max-tokens", 8, "--ignore-eos", *arguments)


def test_what_never_fits_is_refused_unless_something_may_be_changed(run, pictures):
    for choice in ([], ["--on-pressure", "wait"], ["--on-pressure", "refuse"]):
        code, out, err = ask(run, pictures, *choice)
        assert (code, out) == (3, "")
        assert "tokens of context, its answer included, and this engine has memory for 272" in err


def test_shrunk_pictures_are_told_on_stderr(run, pictures):
    code, out, err = ask(run, pictures, "--on-pressure", "shrink-images")
    assert code == 0
    assert out == ask(run, pictures, "--detail", 4)[1]
    assert err.splitlines() == [
        f"memphi: picture {name}.png is seen in 4 crops instead of 6: the memory allows 272 tokens of context"
        for name in "abc"
    ]


def test_pictures_one_by_one_are_listed(run, pictures):
    code, out, err = ask(run, pictures, "--on-pressure", "one-by-one")
    assert code == 0
    assert out == ask(run, pictures, "--each")[1]
    assert err.startswith("memphi: the 3 pictures are answered one by one: together they need ")


def test_a_document_holds_what_was_changed(run, pictures):
    code, out, err = ask(run, pictures, "--json", "--on-pressure", "one-by-one")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert [sentence.split(":")[0] for sentence in document["degraded"]] == ["the 3 pictures are answered one by one"]
    assert document["attachments"] == ["a.png", "b.png", "c.png"]
    assert document["tokens"]["answer"] == 24
    assert len(document["tokens"]["images"]) == 3
    assert json.loads(ask(run, pictures[:1], "--json")[1])["degraded"] == []


def test_what_fits_says_nothing(run, pictures):
    plain = ask(run, pictures[:1])
    for choice in ("shrink-images", "one-by-one", "refuse"):
        assert ask(run, pictures[:1], "--on-pressure", choice) == plain
    assert plain[2] == ""


def test_a_conversation_shrinks_its_pictures_as_it_grows(run, pictures):
    lines = "".join(f"/attach {path}\nWhat is it?\n" for path in pictures)
    code, _, err = run("chat", "--max-tokens", 1, "--on-pressure", "shrink-images", stdin=lines)
    assert code == 0
    assert "memphi: picture a.png is seen in " in err
    assert "does not fit" not in err
    _, _, err = run("chat", "--max-tokens", 1, stdin=lines)
    assert "this engine has memory for 272" in err


def test_a_choice_that_there_is_not_is_wrong_usage(run, pictures):
    code, out, err = ask(run, pictures, "--on-pressure", "hope")
    assert (code, out) == (2, "")
    assert "--on-pressure" in err
