"""How long `memphi quantize` takes for a full-size checkpoint, by scheme, and what memory of the device it takes.

Writes random weights of the official sizes, 11 GB, and each quantised folder, which goes before the next is written.
Usage: python -m benchmarks.quantising --out FILE --folder FOLDER
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.document import write_document
from memphi import official
from memphi.checkpoint.calibration import EXAMPLE_TOKENS
from memphi.checkpoint.layout import read_config
from memphi.checkpoint.quantisation import CALIBRATED, quantise_folder, summary
from memphi.checkpoint.random import random_model
from memphi.checkpoint.writer import write_checkpoint
from memphi.config import Scheme
from memphi.engine.device import find_device
from memphi.memory import costs
from memphi.model.quant.weights import WEIGHTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON document goes")
    parser.add_argument("--folder", type=Path, help="where 18 GB are written and removed again; a local disk")
    parser.add_argument("--schemes", default=",".join(WEIGHTS), help="some of them")
    parser.add_argument("--commit", help="the commit measured, where git cannot say")
    arguments = parser.parse_args()
    device, over = find_device("auto"), False
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        source, folder = Path(temporary) / "source", Path(temporary) / "quantised"
        config = read_config(official.folder())
        write_checkpoint(random_model(config, device, torch.bfloat16), source, official.folder())
        figures = dict[str, dict[str, Any]]()
        for scheme in arguments.schemes.split(","):
            figures[scheme] = measure(source, folder, scheme, device)
            print(scheme, figures[scheme], flush=True)
            write_document(arguments.out, device, arguments.commit, {"schemes": figures})
            shutil.rmtree(folder)
            price = costs.calibrating(config, 2, EXAMPLE_TOKENS).bytes
            over |= scheme in CALIBRATED and (figures[scheme]["device_peak_bytes"] or 0) > price
    return 1 if over else 0


def measure(source: Path, folder: Path, scheme: Scheme, device: torch.device) -> dict[str, Any]:
    """Quantise a folder once; the relative error of each kind of weight in the decoder beside."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    began = time.perf_counter()
    errors = quantise_folder(source, folder, scheme, device)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "device_peak_bytes": torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None,
        "errors": {name: round(error, 5) for name, _, error, _ in summary(errors) if name.startswith("language.")},
    }


if __name__ == "__main__":
    sys.exit(main())
