"""What README.md and docs/ tell people to run does run, and prints what they show."""

import re
import shlex
import subprocess
import sys

import pytest
import typer

from memphi.cli import app
from tests.documents import INSTALLS, PAGES, ROOT, examples, run_command, run_program

ALL = [example for page in PAGES for example in examples(page)]
COMMANDS = [example for example in ALL if example.language != "python"]
RUN = [e for e in COMMANDS if e.excuse is None and not e.beside and "-m pytest" not in e.command]


@pytest.mark.parametrize("example", RUN, ids=str)
def test_a_command_prints_what_the_page_shows(example):
    real = run_command(example)
    assert example.agrees(real), f"{example}: shown\n{example.output}\nbut really\n{real}"


@pytest.mark.parametrize("example", [e for e in COMMANDS if e.excuse is not None], ids=str)
def test_a_command_that_cannot_be_run_here_is_understood(example):
    for command in re.split(r"\n|&&|\|", example.command):
        words = shlex.split(command, comments=True)
        if words[:1] == ["memphi"]:
            command = typer.main.get_command(app).commands[words[1]]
            assert command.make_context(words[1], list(words[2:]))
        elif words[:2] == ["python", "-m"]:
            said = subprocess.run(
                [sys.executable, *words[1:3], "--help"], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
            options = [word.partition("=")[0] for word in words[3:] if word.startswith("--")]
            assert all(option in said for option in options), f"{example}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_program_prints_what_the_page_shows(page):
    for example, real in run_program(page):
        assert example.agrees(real), f"{example}: shown\n{example.output}\nbut really\n{real}"


def test_the_tests_are_run_as_the_readme_says():
    tests = [e.code.strip() for e in COMMANDS if e.code.startswith(INSTALLS) and "pytest" in e.code]
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], check=True, capture_output=True, text=True).stdout
    assert tests == [shown.strip()]
    assert tests[0] in (ROOT / "README.md").read_text()


def test_the_readme_installs_and_asks_in_one_line():
    """With the constraint where there is no GPU, without it where there is one; otherwise the same."""
    asks = [e for e in COMMANDS if e.code.startswith(INSTALLS) and "memphi ask" in e.code]
    assert len(asks) == 2
    assert asks[0].code.replace("-c requirements/cpu.txt ", "") == asks[1].code
    assert all(e.output and "--model demo" in e.code and e.code.count("\n") == 1 for e in asks)


def test_every_block_of_a_page_is_an_example_or_plain_text():
    """A block in a language that is not run would rot unseen."""
    for page in PAGES:
        languages = set(re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)) - {""}
        assert languages <= {"console", "sh", "python", "text"}, page


def test_links_within_the_project_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
