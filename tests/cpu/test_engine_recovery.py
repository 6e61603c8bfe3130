"""Running out of memory is one sentence about what would work, and the engine goes on."""

import pytest
import torch

from memphi.engine.engine import Engine
from memphi.engine.recovery import is_out_of_memory, told_plainly
from memphi.errors import DoesNotFitError
from memphi.inputs.tokenizer import Tokenizer
from memphi.model.phi4mm import Phi4MM
from memphi.request import Request, SamplingParams
from tests.checkpoints import tiny_checkpoint, tiny_config
from tests.cpu.test_engine import picture

CPU = torch.device("cpu")


@pytest.fixture
def engine(tmp_path):
    from memphi.checkpoint.loader import load_model

    folder = tiny_checkpoint(tmp_path / "model", tiny_config(), torch.float32)
    return Engine(load_model(folder, "cpu", torch.float32), Tokenizer.from_folder(folder))


@pytest.mark.parametrize("at", ["encode_images", "forward"])
def test_a_request_that_does_not_fit_leaves_nothing_behind(engine, monkeypatch, at):
    request = Request.ask("What is it?", [picture(1, 60, 60)], sampling=SamplingParams(max_tokens=2))
    expected = engine.generate(request).ids

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as broken:
        broken.setattr(Phi4MM, at, fail)
        with pytest.raises(DoesNotFitError, match=r"too little memory .*; send fewer or smaller attachments.*--each"):
            engine.generate([request, request])
        with pytest.raises(DoesNotFitError):
            list(engine.stream(request))
    assert not engine._runner.caches
    assert not engine._runner.media
    assert engine.generate(request).ids == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_kind_of_running_out_is_known(error):
    assert is_out_of_memory(error)
    with (
        pytest.raises(DoesNotFitError, match="this machine has too little memory for the model; wait"),
        told_plainly("the model", CPU, "wait"),
    ):
        raise error


def test_the_host_s_allocator_says_what_is_looked_for():
    with pytest.raises(DoesNotFitError), told_plainly("this", CPU, "wait"):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shape"), told_plainly("this", CPU, "wait"):
        raise RuntimeError("shape mismatch")
