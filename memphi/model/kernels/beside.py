"""Launches that run beside others, where neither fills a card by itself."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """What is launched in here waits for what was launched before, and not for what is launched after it.

    That goes on beside it until the function that this gives is called: what is launched then waits for both. A CUDA
    graph holds that as well. Elsewhere than on CUDA one thing is done after another.
    """
    if device.type != "cuda":
        yield lambda: None
        return
    stream, other = torch.cuda.current_stream(device), _other_stream(device, threading.get_ident())
    other.wait_stream(stream)
    with torch.cuda.stream(other):
        yield functools.partial(stream.wait_stream, other)


@functools.cache
def _other_stream(device: torch.device, thread: int) -> torch.cuda.Stream:
    """A thread's own: what one captures in a graph, no other may launch on."""
    return torch.cuda.Stream(device)
