"""What tests do to a card on purpose is nothing that the next plan for it should know; fp32 is fp32 in all of them."""

import gc

import pytest
import torch

from memphi.engine.device import cap_allocator


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test's memory is given back after it, and the allocator's cap goes with it."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # 32 MiB for each stream that graphs were captured on.
    torch.cuda.empty_cache()
    cap_allocator(torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def exact_convolutions():
    """Without this, cuDNN rounds fp32 inputs to 10 bits, and what shares a pass could change an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield
