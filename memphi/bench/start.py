"""How long a process takes from its start to a first token: Python, torch, the weights and all that is made once.

Run as a program it is that process. The weights of a folder come from the system's page cache, for the first of two
processes has read them, and modules from their bytecode, which it has written where Python may.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from memphi.bench.workloads import START
from memphi.config import EngineConfig
from memphi.engine.messages import Loading
from memphi.errors import MemphiError

STAGES = ("imported", "loaded", "first token")
"""What the process says, each when it is done."""


def measure_start(loading: Loading, deadline: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """The record of the second of two processes; raises MemphiError where one fails or is late."""
    made = "weights made on the device" if loading.model == "random" else "weights in the page cache"
    says = f"a new process to its first token, {made}"
    tell(f"{START}: {says}")
    _run(loading, deadline)
    stages = _run(loading, deadline)
    return {
        "workload": START,
        "says": says,
        "metric": "first token",
        "unit": "s",
        "figure": stages[STAGES[-1]],
        "limit": None,
        "share": None,
        "repeats": "1 of 1",
        "first_token_seconds": stages[STAGES[-1]],
        "stages": stages,
    }


def _run(loading: Loading, deadline: float) -> dict[str, float]:
    """Seconds from a process' start to the end of each stage."""
    left_seconds = deadline - time.perf_counter()
    if left_seconds <= 0:
        raise MemphiError("there was no time left")
    command, started = [sys.executable, "-m", "memphi.bench.start", json.dumps(asdict(loading))], time.perf_counter()
    said = dict[str, float]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        killer = threading.Timer(left_seconds, process.kill)
        killer.start()
        assert process.stdout is not None
        for line in process.stdout:
            said[line.strip()] = time.perf_counter() - started
        killer.cancel()
    if STAGES[-1] not in said:
        why = "there was no time left to end it" if time.perf_counter() >= deadline else next(reversed(said), "")
        raise MemphiError(f"the process ended without a token: {why}")
    return {stage: said[stage] for stage in STAGES}


def main() -> None:
    """The process: tells each stage when it ends."""
    fields = json.loads(sys.argv[1])
    loading = Loading(**{**fields, "config": EngineConfig(**fields["config"])})
    from memphi.engine.engine import load
    from memphi.request import Request, SamplingParams

    print(STAGES[0], flush=True)
    engine = load(loading.model, loading.device, loading.dtype, loading.attention, loading.config, loading.allocator)
    print(STAGES[1], flush=True)
    engine.generate(Request.ask("Hello", sampling=SamplingParams(max_tokens=1)))
    print(STAGES[2], flush=True)


if __name__ == "__main__":
    main()
