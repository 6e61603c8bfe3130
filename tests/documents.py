"""The commands and programs in README.md and docs/, each with the output that the page shows.

`python -m tests.documents` runs them all and writes their real output into the pages. How a page says things:
- a `console` block has commands after `$ `, each followed by its output; `...` stands for anything, and measured
  figures (seconds, bytes, differences as in 1.23e-06) for any others;
- a `sh` or `python` block may be followed by a `text` block with its output; the `python` blocks of a page are one
  program;
- `<!-- not run: why -->` before a block: its commands must be understood, but are not carried out;
- `<!-- beside -->` before a block: its command goes on beside the page's other examples, from when it says on stderr
  that it is ready.
"""

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CHECKS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(
    r"(?:^<!-- (?:not run: (?P<excuse>[^\n]+)|(?P<beside>beside)) -->\n)?"
    r"^```(?P<language>console|sh|python)\n(?P<body>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
MEASURED = re.compile(r'\b\d\.\d\de-\d\d\b|\b\d\d\.\d\d%|(?<=seconds": )[\d.]+|(?<=_bytes": )\d+')
INSTALLS = "python3 -m venv "
"""How a line begins that makes a virtual environment; only what follows the installation is run here."""


@dataclass(frozen=True)
class Example:
    """One thing that a page tells its reader to run."""

    page: Path
    line: int
    language: str
    code: str
    output: str | None
    """What the page shows of stdout; None where it shows nothing."""
    excuse: str | None
    """Why it cannot be run everywhere."""
    beside: bool
    """Whether it runs beside the others."""
    span: tuple[int, int] = field(repr=False)
    """Where the output stands in the page; where it would, if there is none."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def command(self) -> str:
        """What to run in a virtual environment that is installed already."""
        code = self.code.replace("\\\n", " ")
        return code.rpartition("&&")[2].replace(".venv/bin/", "").strip() if code.startswith(INSTALLS) else code

    def agrees(self, real: str) -> bool:
        """Whether the page shows what really comes out."""
        if self.output is None:
            return True
        shown, real = (MEASURED.sub("0", text) for text in (self.output, real))
        return doctest.OutputChecker().check_output(shown, real, CHECKS)


def examples(page: Path) -> Iterator[Example]:
    """A page's examples, in order."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        language, at = block["language"], block.start("body")
        if language == "console":
            for part in re.finditer(
                r"^\$ ((?:[^\n]*\\\n)*[^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", block["body"], re.MULTILINE
            ):
                line = text.count("\n", 0, at + part.start()) + 1
                span = (at + part.start(2), at + part.end(2))
                yield Example(page, line, language, part[1], part[2], block["excuse"], bool(block["beside"]), span)
        else:
            line = text.count("\n", 0, at)
            excuse, beside, span = block["excuse"], bool(block["beside"]), block.span("output")
            yield Example(page, line, language, block["body"], block["output"], excuse, beside, span)


def environment() -> dict[str, str]:
    """What examples find: this installation first, and no GPU, since the pages show what a CPU answers."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}


@contextlib.contextmanager
def company(page: Path) -> Iterator[None]:
    """Have what a page runs beside its examples run meanwhile."""
    companions = [example for example in examples(page) if example.beside]
    with contextlib.ExitStack() as running:
        if companions:  # What they take for themselves, a port, another process may want too.
            running.enter_context(FileLock(Path(tempfile.gettempdir()) / "memphi-documents.lock"))
        for example in companions:
            words = shlex.split(example.command.replace("\\\n", " "))
            process = subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
            running.callback(process.wait, 60)
            running.callback(process.terminate)
            assert process.stderr is not None
            assert any(" is ready" in line for line in process.stderr), f"{example}: it ended before it was ready"
            threading.Thread(target=process.stderr.read, daemon=True).start()  # A full pipe would stop it.
        yield


def run_command(example: Example) -> str:
    """The command's stdout, from the project's folder; raises AssertionError where it fails."""
    with company(example.page):
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", example.command],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert finished.returncode == 0, f"{example}: {example.command}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def run_program(page: Path) -> list[tuple[Example, str]]:
    """Run a page's `python` blocks one after the other; returns each with what it printed."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    results = []
    with contextlib.chdir(ROOT), company(page):
        for example in [e for e in examples(page) if e.language == "python" and e.excuse is None]:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(example.code, str(example), "exec"), namespace)
            results.append((example, printed.getvalue()))
    return results


def rewrite(page: Path) -> int:
    """Write the real output of each example into its page, where another stands there; returns how many differed."""
    commands = [
        e
        for e in examples(page)
        if e.language != "python" and e.output is not None and e.excuse is None and not e.beside
    ]
    results = [(e, run_command(e)) for e in commands] + run_program(page)
    wrong = [(replace(e, page=page), real) for e, real in results if not e.agrees(real)]
    text = page.read_text(encoding="utf-8")
    for example, real in sorted(wrong, key=lambda pair: pair[0].span, reverse=True):
        start, end = example.span
        text = text[:start] + real.rstrip() + "\n" + text[end:]
    page.write_text(text, encoding="utf-8")
    return len(wrong)


if __name__ == "__main__":
    for name in PAGES:
        print(f"{name.relative_to(ROOT)}: {rewrite(name)} outputs written anew")
