"""On CUDA each of torch's kernels that attention over prompts chooses from equals eager attention."""

from collections import Counter

import pytest
import torch

from benchmarks.attention import Scene, make_scene
from memphi import official
from memphi.checkpoint.layout import read_config
from memphi.model.attention import EagerAttention, SdpaAttention, sdpa
from memphi.model.rows import pack

DEVICE = torch.device("cuda")
BF16_ERROR = 1e-2
SHAPES = {
    "prompts": ((700, 0), (1, 0), (16, 0), (333, 0)),
    "a length that recurs": ((40, 0), (4096, 0), (300, 0)),
    "a chunk": ((512, 2000),),
    "chunks": ((373, 1340), (20, 16), (100, 4000), (17, 1)),
    "a chunk that recurs": ((40, 10), (4096, 8192 + 100)),
    "long rows": ((4500, 0), (5000, 5000)),
    "all at once": ((1, 300), (512, 0), (200, 700), (1, 40), (9, 100), (30, 31), (1, 0), (1, 500)),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def scene_of(shape, dtype):
    return make_scene(shape, read_config(official.folder()).language, dtype, DEVICE)


def attended(scene: Scene, attention):
    out = torch.full_like(scene.query, float("nan"))
    attention.paged(scene.query, scene.key, scene.value, scene.keys, scene.values, scene.packing, out)
    return out


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, BF16_ERROR)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_rows_of_every_kind_equal_eager_attention(shape, dtype, limit):
    scene = scene_of(SHAPES[shape], dtype)
    found, expected = attended(scene, SdpaAttention()).double(), attended(scene, EagerAttention()).double()
    assert (found - expected).norm() / expected.norm() <= limit


@torch.inference_mode()
def test_rows_side_by_side_go_in_one_launch(monkeypatch):
    """Of whole rows and of chunks; a length that recurs has cuDNN to itself on the card that it was measured on."""
    calls = Counter()
    varlen, causal = sdpa.varlen, SdpaAttention.causal
    monkeypatch.setattr(sdpa, "varlen", lambda *parts: calls.update(["varlen"]) or varlen(*parts))
    monkeypatch.setattr(SdpaAttention, "causal", lambda *parts: calls.update(["causal"]) or causal(*parts))
    attended(scene_of(SHAPES["prompts"], torch.bfloat16), SdpaAttention())
    attended(scene_of(SHAPES["chunks"], torch.bfloat16), SdpaAttention())
    assert calls == {"varlen": 2}
    calls.clear()
    attended(scene_of(SHAPES["a length that recurs"], torch.bfloat16), SdpaAttention())
    measured = torch.cuda.get_device_capability()[0] == 9
    assert calls == ({"varlen": 2, "causal": 1} if measured else {"varlen": 3})


def test_gradients_are_those_of_eager_attention():
    """Of heads that share keys, in one launch for rows of different lengths."""
    scene = scene_of(SHAPES["prompts"], torch.bfloat16)
    packing, gradients = pack(scene.rows, DEVICE), []
    for attention in (SdpaAttention(), EagerAttention()):
        parts = [part.detach().clone().requires_grad_() for part in (scene.query, scene.key, scene.value)]
        attention.packed(*parts, packing).float().square().sum().backward()
        gradients.append([part.grad.double() for part in parts])
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() / expected.norm() <= 3 * BF16_ERROR
