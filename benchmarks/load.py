"""How long a full-size checkpoint takes from disk to the device, and how much host memory it takes meanwhile.

Writes random weights of the official sizes, under a scheme or as they are, then loads them in fresh processes, first
with the files dropped from the page cache, then with them in it, and compares every bit; and has a process load them
for a first token. Usage: python -m benchmarks.load --out FILE --folder FOLDER [--scheme int8]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from memphi.bench.start import measure_start
from memphi.config import EngineConfig, Scheme
from memphi.engine.messages import Loading

if TYPE_CHECKING:
    from memphi.config import ModelConfig

SAMPLE_SECONDS, LONGEST_SECONDS = 0.005, 600.0
COUNTERS = ("RssAnon", "VmRSS")
"""What of /proc/self/status is sampled: memory of the process's own, and that with file pages counted too."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON document goes")
    parser.add_argument("--folder", type=Path, help="where the 11 GB are written and removed again; a local disk")
    parser.add_argument("--scheme", default="bf16", choices=get_args(Scheme), help="of the weights that are written")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what each fresh process does
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measure_load(arguments.load)))
        return 0
    if not arguments.out:
        parser.error("--out is needed")
    return _measure_all(arguments.out, arguments.folder, arguments.scheme, arguments.commit)


def _measure_all(out: Path, parent: Path | None, scheme: Scheme, commit: str | None) -> int:
    from benchmarks.document import write_document
    from memphi import official
    from memphi.config import ModelConfig

    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary) / "checkpoint"
        figures = {"scheme": scheme, **measure_write(ModelConfig.from_folder(official.folder()), folder, scheme)}
        for name, dropped in (("load", True), ("load_from_page_cache", False)):
            if dropped:
                drop_from_page_cache(folder)
            figures[name] = load_in_fresh_process(folder)
        loading = Loading(str(folder), str(_device()), "bf16", "auto", EngineConfig(), "default")
        figures["stages_of_a_start"] = measure_start(loading, time.perf_counter() + LONGEST_SECONDS, print)["stages"]
    write_document(out, _device(), commit, figures)
    return 0 if all(figures[name]["bit_identical"] for name in ("load", "load_from_page_cache")) else 1


def measure_write(config: "ModelConfig", folder: Path, scheme: Scheme = "bf16") -> dict[str, Any]:
    """Write a random checkpoint."""
    import torch

    from memphi import official
    from memphi.checkpoint.random import random_model
    from memphi.checkpoint.writer import write_checkpoint

    model = random_model(config, _device(), torch.bfloat16, scheme=scheme)
    started = time.perf_counter()
    write_checkpoint(model, folder, official.folder())
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"checkpoint_bytes": size, "write_seconds": round(seconds, 2)}


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the weight files, which are on the disk already."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def load_in_fresh_process(folder: Path) -> dict[str, Any]:
    """`measure_load` in a process that has done nothing else."""
    command = [sys.executable, "-m", "benchmarks.load", "--load", str(folder)]
    finished = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def measure_load(folder: Path) -> dict[str, Any]:
    """Load a checkpoint that `measure_write` wrote; host memory beside what torch and the device take by themselves."""
    import torch

    device = _device()
    torch.zeros(1, device=device)
    baseline = read_counters()

    from memphi.checkpoint.loader import load_model

    imported = read_counters()
    with sampled_peaks() as peaks:
        started = time.perf_counter()
        model = load_model(folder, device, torch.bfloat16)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "seconds": round(seconds, 3),
        "bytes_per_second": round(size / seconds),
        "baseline_bytes": baseline,
        "imported_bytes": imported,
        "peak_bytes": dict(peaks),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "model_bytes": size,
        "bit_identical": equals_random_model(model),
    }


def equals_random_model(model: Any) -> bool:  # noqa: ANN401
    """Whether every tensor has exactly the bits that `measure_write` wrote."""
    from dataclasses import replace

    import torch

    from memphi.checkpoint.random import random_model

    config, scheme = replace(model.config, scheme="bf16"), model.config.scheme
    written = random_model(config, model.device, torch.bfloat16, scheme=scheme).state_dict()
    loaded = model.state_dict()
    return written.keys() == loaded.keys() and all(torch.equal(loaded[name], written[name]) for name in written)


def read_counters() -> dict[str, int]:
    """This process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(values[name].split()[0]) * 1024 for name in COUNTERS}


@contextmanager
def sampled_peaks() -> Iterator[dict[str, int]]:
    """The largest counters seen while the block runs."""
    peaks, done = read_counters(), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            for name, value in read_counters().items():
                peaks[name] = max(peaks[name], value)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def _device() -> Any:  # noqa: ANN401
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
