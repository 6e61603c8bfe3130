"""What cuDNN takes of its own in the audio encoder's convolutions, at full size, by a window's frames; on a GPU.

Two thirds of a price hang on it, and it depends on the shape. Usage: python -m benchmarks.convolutions
"""

import torch
import torch.nn.functional as F  # noqa: N812

from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.memory.costs import MIB
from memphi.model.audio import Subsampling

FRAMES = (200, 400, 776, 784, 1000, 2000, 3000, 3984, 3992, 4000, 4008, 4016)
"""A window of 40 s has 4000, eight more where there is sound before it, and after it; 776 or 784 go at once."""


@torch.inference_mode()
def main() -> int:
    config = read_config(official.folder()).audio
    layers = Subsampling(config).to("cuda", torch.bfloat16)
    print(f"{'frames':>8}{'convolution':>14}{'input MiB':>11}{'output':>9}{'beside':>9}")
    for frames in FRAMES:
        x = torch.randn(1, 1, frames, config.mel_bins, device="cuda", dtype=torch.bfloat16)
        stages: list[tuple[str, torch.nn.Module]] = [("first", layers.first)]
        for i, pair in enumerate(zip(layers.depthwise, layers.pointwise, strict=True)):
            stages += [(f"depthwise {i}", pair[0]), (f"pointwise {i}", pair[1])]
        for name, convolution in stages:
            convolution(x)  # The first time chooses an algorithm.
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = convolution(x)
            beside = torch.cuda.max_memory_allocated() - before - y.nbytes
            print(f"{frames:8}{name:>14}{x.nbytes / MIB:11.1f}{y.nbytes / MIB:9.1f}{beside / MIB:9.1f}")
            x = F.relu(y) if not name.startswith("depthwise") else y
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
