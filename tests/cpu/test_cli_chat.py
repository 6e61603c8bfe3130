"""`memphi chat` over a pipe: turns build on each other, attachments belong to one message, errors end a turn only."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from memphi.cli import main
from memphi.errors import DoesNotFitError
from memphi.request import Delta, FinishReason, Media
from tests.checkpoints import tiny_checkpoint, tiny_config

TEXT_TO_FAIL = "too much"


class Scripted:
    """An engine that answers with the number of messages it was sent, and remembers the requests."""

    def __init__(self):
        self.requests = []

    def stream(self, request):
        self.requests.append(request)
        if TEXT_TO_FAIL in request.messages[-1].content:
            raise DoesNotFitError("it does not fit")
        text = f"{len(request.messages)} messages"
        yield Delta(text[:2], ())
        yield Delta(text[2:], (), FinishReason.STOP)


@pytest.fixture
def scripted(monkeypatch):
    engine = Scripted()
    # By name: the package has the command itself under the module's name.
    monkeypatch.setattr(sys.modules["memphi.cli.chat"], "load_engine", lambda *_: engine)
    return engine


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run `memphi chat` in this process, the lines on its stdin; returns exit code, stdout and stderr."""

    def run_chat(*lines, options=(), encoding="utf-8"):
        monkeypatch.setattr(sys, "argv", ["memphi", "chat", *map(str, options)])
        typed = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding))
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        return code, *capsys.readouterr()

    return run_chat


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path)
    return path


def roles(request):
    return [message.role for message in request.messages]


def texts(request):
    return ["".join(part for part in message.content if isinstance(part, str)) for message in request.messages]


def test_every_turn_carries_those_before_it(talk, scripted):
    code, out, err = talk("Hello.", "And again.", "", "Good bye.", options=["--system", "Be brief."])
    assert (code, out) == (0, "2 messages\n4 messages\n6 messages\n")
    assert "/attach FILE" in err
    last = scripted.requests[-1]
    assert roles(last) == ["system", "user", "assistant", "user", "assistant", "user"]
    assert texts(last) == ["Be brief.", "Hello.", "2 messages", "And again.", "4 messages", "Good bye."]


def test_attachments_go_with_the_next_message_only(talk, scripted, picture):
    talk("What is it?", f"/attach {picture}", f"/attach {picture}", "And these?", "Thanks.", options=["-a", picture])
    per_message = [
        [sum(isinstance(part, Media) for part in message.content) for message in request.messages]
        for request in scripted.requests
    ]
    assert per_message == [[1], [1, 0, 2], [1, 0, 2, 0, 0]]


def test_every_picture_is_seen_in_the_detail_asked_for(talk, scripted, picture):
    talk("What is it?", f"/attach {picture}", "And this?", options=["-a", picture, "--detail", "3"])
    assert [media.detail for media in scripted.requests[-1].media] == [3, 3]


def test_a_name_may_be_as_a_terminal_pastes_it(talk, scripted, picture, monkeypatch):
    spaced = picture.rename(picture.with_name("my picture.png"))
    monkeypatch.setenv("HOME", str(spaced.parent))
    names = (spaced, f'"{spaced}"', str(spaced).replace(" ", "\\ "), "~/my\\ picture.png")
    _, _, err = talk(*(f"/attach {name}" for name in names), f"/attach\t{spaced}", "What?", "/attach 'no", "Well?")
    assert len(scripted.requests[0].media) == 5
    assert "there is no file 'no" in err


def test_a_closed_stdin_is_an_empty_one(monkeypatch, capsys, scripted):
    monkeypatch.setattr(sys, "argv", ["memphi", "chat"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert not scripted.requests


def test_an_attachment_may_speak_for_itself(talk, scripted, picture):
    talk(f"/attach {picture}", "")
    assert texts(scripted.requests[0]) == [""]


def test_new_starts_over_and_keeps_the_system_prompt(talk, scripted, picture):
    _, out, _ = talk("Hello.", f"/attach {picture}", "/new", "Hello.", options=["--system", "Be brief."])
    assert out == "2 messages\n2 messages\n"
    assert not scripted.requests[-1].media


def test_quit_ends_and_so_does_the_end_of_input(talk, scripted):
    assert talk("Hello.", "/quit", "Never said.")[:2] == (0, "1 messages\n")
    assert talk()[:2] == (0, "")


def test_a_line_that_is_no_text_is_read_as_far_as_it_is(talk, scripted):
    code, out, _ = talk("caf\xe9", "Who are you?", encoding="ascii")
    assert (code, out.splitlines()) == (0, ["1 messages", "3 messages"])
    assert scripted.requests[0].messages[-1].content[-1].startswith("caf")


def test_a_turn_that_fails_is_told_and_forgotten(talk, scripted):
    code, out, err = talk("Hello.", TEXT_TO_FAIL, "Still there?")
    assert (code, out) == (0, "1 messages\n3 messages\n")
    assert "memphi: it does not fit\n" in err
    assert texts(scripted.requests[-1]) == ["Hello.", "1 messages", "Still there?"]
    assert "attached" not in err


def test_attachments_of_a_turn_that_fails_are_dropped_by_name(talk, scripted, picture):
    code, out, err = talk(f"/attach {picture}", TEXT_TO_FAIL, "Still there?", options=["-a", picture])
    assert (code, out) == (0, "1 messages\n")
    assert "memphi: it does not fit\nmemphi: no longer attached: picture.png, picture.png; /attach again" in err
    assert [len(request.media) for request in scripted.requests] == [2, 0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/attach nowhere.png", "no file nowhere.png"),
        ("/attach", "needs the name of a file"),
        ("/attach -", "needs the name of a file"),
        ("/sing", "/sing"),
    ],
)
def test_a_command_that_fails_is_told_on_stderr(talk, scripted, line, reason):
    code, out, err = talk(line, "Hello.")
    assert (code, out) == (0, "1 messages\n")
    assert reason in err


def test_a_path_is_no_command(talk, scripted):
    talk("/etc/hosts says what?")
    assert texts(scripted.requests[0]) == ["/etc/hosts says what?"]


def test_a_real_model_keeps_talking_even_after_an_empty_answer(talk, tmp_path, picture):
    folder = tiny_checkpoint(tmp_path / "model", tiny_config(short_tokens=2048, max_tokens=4096), torch.float32)
    options = ["--model", folder, "--device", "cpu", "--dtype", "fp32", "--max-tokens", 3, "--stop", "s"]
    code, out, err = talk("Say something.", "/attach " + str(picture), "What is it?", "And now?", options=options)
    assert code == 0
    assert len(out.splitlines()) == 3
    assert out.startswith("\n")  # the tiny model only says "s", which is what it was to stop at
    assert err.count("memphi:") == 0
