"""`memphi doctor`: is this machine fit for memphi, and what is there to do?"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from memphi.cli import options
from memphi.config import DEFAULT_MODEL


def doctor(
    model: options.Model = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the lines.")] = False,
) -> None:
    """Check this machine, a line for each thing: what was found, and what to do. The exit code is 1 if one fails.

    Nothing is loaded or downloaded.
    """
    from memphi.doctor import CHECKS, examine

    wide, findings = max(map(len, CHECKS)), []
    for finding in examine(model):
        findings.append(finding)
        if not as_json:
            words = finding.found if finding.advice is None else f"{finding.found}; {finding.advice}"
            print(f"{finding.status:<4}  {finding.name:<{wide}}  {words}", flush=True)
    failed = any(finding.status == "fail" for finding in findings)
    if as_json:
        document = {"model": model, "fit": not failed, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, ensure_ascii=False, indent=2))
    if failed:
        raise typer.Exit(1)
