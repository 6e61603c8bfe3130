"""What the benchmark's processes tell each other: an event a line."""

import json
import sys
from collections.abc import Mapping
from typing import Any


def say(text: str) -> None:
    sys.stderr.write(f"dials: {text}\n")


def tell(event: str, **facts: Any) -> None:  # noqa: ANN401
    """Tell the parent, in one line, which one write keeps whole among those of other threads."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def read_event(line: str) -> dict[str, Any] | None:
    """What a process said in one line; what libraries print is passed on."""
    if line.startswith('{"event"'):
        event: dict[str, Any] = json.loads(line)
        return event
    print(line, end="", file=sys.stderr)
    return None


def without_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """What an event tells, without its name and when it was heard."""
    return {name: value for name, value in event.items() if name not in ("event", "at")}
