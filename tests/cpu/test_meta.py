"""Modules without memory, and that nobody pays at the start for what torch would bring along to make them."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from memphi.model.meta import on_meta
from memphi.model.phi4mm import Phi4MM
from tests.checkpoints import tiny_config


def test_shapes_without_memory_and_without_numbers():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with on_meta():
        model = Phi4MM(tiny_config())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in Phi4MM(tiny_config()).state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == expected


def test_after_it_modules_begin_as_ever():
    with on_meta():
        pass
    assert nn.Linear(4, 4).weight.abs().sum() > 0


def test_a_question_is_answered_without_torchs_compiler():
    """It and sympy are eight hundred files, more than a second of every command."""
    code = """
import sys, memphi
engine = memphi.load("demo", device="cpu")
media = [memphi.open_media(f"memphi/demo/media/{name}") for name in ("number.png", "question.wav")]
print(engine.generate(memphi.Request.ask("", media)).text)
assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules), "the compiler came along"
"""
    assert ran(code) == ("7583\n", 0)


def test_packed_adapters_are_loaded_without_it_too():
    """As a GPU has them, beside weights in 16 bits and in few."""
    code = """
import sys
from memphi import demo
from memphi.checkpoint.loader import load_model
from memphi.checkpoint.locate import locate
for scheme in (None, "int8", "int4"):
    load_model(locate("demo").folder, "cpu", __import__("torch").bfloat16, packed=True, scheme=scheme)
assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules), "the compiler came along"
"""
    assert ran(code) == ("", 0)


def ran(code):
    """What a process printed, and its exit status."""
    folder = Path(__file__).parents[2]
    told = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    print(told.stderr)
    return told.stdout, told.returncode
