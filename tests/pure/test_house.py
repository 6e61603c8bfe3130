"""The house rules: what may be imported when, what the tools say of the source, what a wheel holds."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "PIL", "av", "tokenizers", "transformers", "huggingface_hub"}


def run(*command, cwd=ROOT, **settings):
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, **settings)


def project_files():
    """Every file that is in git, or would be."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported_by(code):
    """The heavy packages that a program has imported when it ends."""
    report = "import sys\ntry:\n    {}\nexcept SystemExit:\n    pass\nprint('IMPORTED', *sys.modules)"
    finished = run(sys.executable, "-c", report.format(code.replace("\n", "\n    ")))
    assert finished.returncode == 0, finished.stderr
    return HEAVY & set(finished.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["ask", "--help"],
        ["chat", "--help"],
        ["serve", "--help"],
        ["bench", "--help"],
        ["ask", "-x"],
    ],
)
def test_help_imports_nothing_heavy(arguments):
    assert not imported_by(f"sys.argv = ['memphi', *{arguments}]\nfrom memphi.cli import main\nmain()")


def test_the_package_imports_nothing_heavy():
    assert not imported_by("import memphi\ndir(memphi)\nmemphi.__version__")


def test_requests_and_attachments_import_no_torch():
    code = (
        "from memphi import Message, Request, Result, SamplingParams, open_media\nopen_media(b'BM' + bytes(12) + b'('"
    )
    assert imported_by(code + " + bytes(3))") == {"numpy"}


@pytest.mark.parametrize(
    "tool",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-c", "import sys; from importlinter.cli import lint_imports_command as lint; sys.exit(lint())"],
    ],
    ids=["ruff check", "ruff format", "mypy", "import-linter"],
)
def test_the_tools_find_nothing(tool):
    finished = run(sys.executable, *tool)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_no_file_tells_where_this_machine_keeps_things():
    places = [str(ROOT), f"{Path.home()}/"] if len(ROOT.parts) > 2 else [f"{Path.home()}/"]
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(place)}(?!\w)" for place in places).encode())
    assert not [str(path.relative_to(ROOT)) for path in project_files() if pattern.search(path.read_bytes())]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what is in git, and unpacked."""
    source = tmp_path_factory.mktemp("source")
    for path in project_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    finished = run(sys.executable, "-c", build, source / "dist", cwd=source)
    assert finished.returncode == 0, finished.stderr
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    held = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {name for name in held if ".dist-info/" not in name}
    assert package == {
        path.relative_to(ROOT).as_posix() for path in project_files() if path.parts[len(ROOT.parts)] == "memphi"
    }
    assert {name.partition("licenses/")[2] for name in held} >= {"LICENSE", "memphi/official/NOTICE"}


def test_a_wheel_works_by_itself(wheel):
    code = (
        "import memphi; from memphi.checkpoint.locate import locate; from memphi.checkpoint.layout import read_config\n"
        "print(memphi.__file__, *(read_config(locate(name).folder).language.layers for name in ('random', 'demo')))"
    )
    finished = run(sys.executable, "-P", "-c", code, cwd=wheel.parent, env={"PYTHONPATH": str(wheel)})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split()[:2] == [str(wheel / "memphi" / "__init__.py"), "32"]
