"""The dial and its pins on the command line."""

import pytest
from typer.testing import CliRunner

from memphi.cli import app
from memphi.errors import DoesNotFitError

ASK = ["ask", "What colour is it?", "-a", "memphi/demo/media/shapes.png", "--model", "demo", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, [*ASK, *arguments])


@pytest.fixture(scope="module")
def plain():
    return run().stdout


@pytest.mark.parametrize(
    "arguments",
    [["--kv-cache", "off"], ["--memory", "600MiB", "--pin", "crops_per_pass=1", "--pin", "step_tokens=128"]],
    ids=["no cache", "a dial and pins"],
)
def test_how_memory_is_used_changes_no_answer(plain, arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout == plain


def test_a_dial_too_small_says_what_would_work():
    result = run("--memory", "30MiB")
    assert isinstance(result.exception, DoesNotFitError)
    assert "needs at least" in str(result.exception)
    assert "--memory" in str(result.exception)


@pytest.mark.parametrize("pin", ["rows", "rows=", "rows=0", "rows=two", "colour=3"])
def test_a_pin_that_means_nothing_is_refused(pin):
    result = run("--pin", pin)
    assert result.exit_code == 2
    assert "pins nothing" in result.output.replace("\n", " ")


def test_a_plan_obeys_a_pin():
    result = CliRunner().invoke(app, ["plan", "--gpu", "RTX 3090", "--pin", "crops_per_pass=4", "--json"])
    assert '"crops_per_pass": 4' in result.stdout
