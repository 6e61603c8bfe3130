"""The neighbour: a second process that takes nearly all that is free on the card, slice by slice, and leaves it again.

It takes so much that an engine without a dial has to make way: less is left free than half of the reserve. It waits for
the parent's word to begin, and ends with the parent, whose end closes the pipe between them, or when its time is up.
"""

import argparse
import os
import sys
import threading
import time
from importlib import import_module
from typing import Any, Protocol

from benchmarks.dials.lines import say, tell
from memphi.memory.costs import MIB, size_text
from memphi.memory.devices import this_machine
from memphi.memory.sizing import reserve_bytes

SLICES = 32
GRANULE_BYTES = 2 * MIB
"""In what units CUDA gives memory."""
LEFT_SHARE = 4
"""One part in so many of the reserve is left free; at half of it an engine makes way."""


class Card(Protocol):
    """Where memory is taken from."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        ...

    def take(self, n_bytes: int) -> object | None:
        """So much, held as long as what is returned; None where the device refuses."""
        ...

    def tidy(self) -> None:
        """Give back to the device what is held no more."""
        ...


class TorchCard:
    """A device, by plain torch tensors; on a CPU they are never written to, so that they take addresses alone."""

    def __init__(self, device: str) -> None:
        from memphi.engine.device import find_device

        self._torch: Any = import_module("torch")
        self._device = find_device(device)

    def memory(self) -> tuple[int, int]:
        if self._device.type == "cuda":
            free_bytes, total_bytes = self._torch.cuda.mem_get_info(self._device)
            return int(free_bytes), int(total_bytes)
        machine = this_machine()
        return machine.free_bytes, machine.total_bytes

    def take(self, n_bytes: int) -> object | None:
        from memphi.engine.recovery import is_out_of_memory

        try:
            piece: object = self._torch.empty(n_bytes, dtype=self._torch.uint8, device=self._device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        return piece

    def tidy(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()


class Orders:
    """What the parent says: its first byte means begin, the end of what it says means go."""

    def __init__(self, descriptor: int, deadline: float) -> None:
        """deadline is a time of time.monotonic; from then on it is over, whatever is said."""
        self._descriptor, self._deadline = descriptor, deadline
        self._begun, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # Not through sys.stdin: a thread that waits in it keeps Python from ending.
        while os.read(self._descriptor, 64):
            self._begun.set()
        self._over.set()
        self._begun.set()

    def wait_to_begin(self) -> bool:
        """Whether to begin, once that is known."""
        return self._begun.wait(max(self._deadline - time.monotonic(), 0.0)) and not self._over.is_set()

    def wait(self, seconds: float) -> bool:
        """Let so much time pass; False, and at once, when it is over."""
        left_seconds = self._deadline - time.monotonic()
        return not self._over.wait(max(min(seconds, left_seconds), 0.0)) and left_seconds > seconds


def work_neighbour(options: argparse.Namespace) -> None:
    """Come and go until it is over; tells each by a line."""
    orders = Orders(sys.stdin.fileno(), time.monotonic() + options.seconds)
    import_module("torch")  # Takes seconds, while the other process loads its model.
    if orders.wait_to_begin():
        come_and_go(TorchCard(options.device), options.turn, orders)
    tell("gone")


def come_and_go(card: Card, turn_seconds: float, orders: Orders) -> None:
    """Leave the card alone for a turn, take it for a turn, and again."""
    while orders.wait(turn_seconds):
        held = take(card)
        orders.wait(turn_seconds)
        held.clear()
        card.tidy()
        tell("leaves", free_bytes=card.memory()[0])


def take(card: Card) -> list[object]:
    """All that is free but what is left to others, in slices; less where others take memory at the same time."""
    free_bytes, total_bytes = card.memory()
    left_bytes = reserve_bytes(total_bytes) // LEFT_SHARE
    goal_bytes, held_bytes, refused = max(free_bytes - left_bytes, 0), 0, False
    slices = list[object]()
    tell("takes", free_bytes=free_bytes, goal_bytes=goal_bytes)
    while not refused and (n_bytes := next_slice(goal_bytes, held_bytes, card.memory()[0] - left_bytes)):
        piece = card.take(n_bytes)
        refused = piece is None
        if piece is not None:
            slices.append(piece)
            held_bytes += n_bytes
    free_bytes = card.memory()[0]
    tell("holds", held_bytes=held_bytes, slices=len(slices), refused=refused, free_bytes=free_bytes)
    say(f"the neighbour holds {size_text(held_bytes)}, {size_text(free_bytes)} are free")
    return slices


def next_slice(goal_bytes: int, held_bytes: int, spare_bytes: int) -> int:
    """How much to take next, in CUDA's units; 0 when the goal is reached or nothing can be spared."""
    n_bytes = min(max(goal_bytes // SLICES, GRANULE_BYTES), goal_bytes - held_bytes, spare_bytes)
    return max(n_bytes, 0) // GRANULE_BYTES * GRANULE_BYTES
