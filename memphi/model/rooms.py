"""Where weights lie: those that stay on the device in one piece, and groups of them on the host, with the rooms on the
device that they are brought into when they are needed.

A room never moves and is as large as the largest of its groups: a group that comes back comes to the same addresses.
Weights do not change in inference, so nothing is ever carried back: the next group is written over the last. Copies go
on the current stream, behind what still reads the last group; those of a decoder's layers on one beside it. Which
groups these are the plan says (`config.ROOMS`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from memphi.memory.costs import MIB, ROOM_STEP
from memphi.model.adapters import AdaptedLinear

CHUNK_BYTES = 64 * MIB
"""The host's memory is pinned in such pieces: torch rounds each up to a power of two."""

Slot = tuple[nn.Module, str, Tensor, int]
"""A tensor's module, its name there, itself, and where in a room it begins."""


class Room:
    """One place on the device, and the groups of which one is in it at a time."""

    def __init__(self, groups: Mapping[str, Sequence[nn.Module]], device: torch.device) -> None:
        """Move groups to the host and make their tensors views of the room, which holds none of them yet.

        Host memory: the groups, and one of them more for a while where they are there already.
        """
        self.holds: str | None = None
        """Which group is there; None while one is on its way, too."""
        self._memory = torch.empty(max(map(room_bytes, groups.values())), dtype=torch.uint8, device=device)
        self._chunks: dict[str, list[Tensor]] = {}
        for group, modules in groups.items():
            self._chunks[group] = _keep(modules, device.type == "cuda")
            for slot in list(slots(modules)):
                self._view(*slot)

    def bring(self, name: str) -> None:
        """See to it that a group is there for what is launched next.

        Raises what the device raises; then the room counts as empty.
        """
        if self.holds == name:
            return
        self.holds = None
        chunks = self._chunks[name]
        for chunk, part in zip(chunks, self._memory.split(CHUNK_BYTES), strict=False):
            part[: len(chunk)].copy_(chunk, non_blocking=True)
        self.holds = name

    def _view(self, module: nn.Module, name: str, tensor: Tensor, start: int) -> None:
        """Make a module's tensor a view of the room."""
        view = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
        else:
            module._buffers[name] = view


class LayerStream:
    """Two rooms for the layers of a decoder: one layer is computed while the next one comes."""

    def __init__(self, layers: Sequence[Sequence[nn.Module]], device: torch.device) -> None:
        """Move the layers to the host; needs two layers' memory on the device."""
        named = {str(i): modules for i, modules in enumerate(layers)}
        halves = [{name: named[name] for name in list(named)[first::2]} for first in range(min(2, len(layers)))]
        self._rooms = [Room(half, device) for half in halves]
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def through(self, layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """The layers in their order, each as soon as it is there for what is launched next."""
        some = list(layers)
        self._fetch(0)
        for number, layer in enumerate(some):
            if self._copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
            if number + 1 < len(some):
                self._fetch(number + 1)
            yield layer

    def _fetch(self, number: int) -> None:
        """Bring a layer beside what is computed, behind all that was launched: what reads its room is among that."""
        room = self._rooms[number % 2]
        if self._copies is None:
            room.bring(str(number))
            return
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            room.bring(str(number))


def lay_out(model: nn.Module, device: torch.device | str) -> None:
    """Give all tensors that are on the meta device their places in one piece of a device's memory, one after another.

    Each begins at a multiple of ROOM_STEP; what is in them is whatever was there.
    """
    end = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal end
        end += _rounded(tensor.nbytes) if tensor.is_meta else 0
        return tensor

    model._apply(count)
    memory, start = torch.empty(end, dtype=torch.uint8, device=device), 0

    def move(tensor: Tensor) -> Tensor:
        nonlocal start
        if not tensor.is_meta:
            return tensor
        first, start = start, start + _rounded(tensor.nbytes)
        return memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    model._apply(move)


def groups_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of the groups that may lie on the host, by the names that prices have for them."""
    towers = {"vision tower": "vision", "audio encoder": "audio"}
    groups = {name: list(model.get_submodule(path).modules()) for name, path in towers.items()}
    linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    for name in {name for linear in linears for name in linear.adapters}:
        groups[f"{name} adapter"] = [part for linear in linears for part in linear.adapter(name).modules()]
    return groups


def layers_of(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each of the decoder's layers, its adapters left out."""
    adapters = {part for name, group in groups_of(model).items() if name.endswith(" adapter") for part in group}
    layers = model.get_submodule("language.layers").children()
    return [[module for module in layer.modules() if module not in adapters] for layer in layers]


def slots(modules: Sequence[nn.Module]) -> Iterator[Slot]:
    """The modules' own tensors, one behind the other, each at a multiple of ROOM_STEP."""
    start = 0
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor, start
                start += _rounded(tensor.nbytes)


def room_bytes(modules: Sequence[nn.Module]) -> int:
    """What a group takes of a room."""
    return sum(_rounded(tensor.nbytes) for _, _, tensor, _ in slots(modules))


def _keep(modules: Sequence[nn.Module], pinned: bool) -> list[Tensor]:
    """A copy of a group on the host, as it will lie in its room, in chunks; pinned for a GPU."""
    total = room_bytes(modules)
    sizes = [min(CHUNK_BYTES, total - first) for first in range(0, total, CHUNK_BYTES)]
    chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    for _, _, tensor, start in slots(modules):
        source = tensor.detach().contiguous().view(-1).view(torch.uint8)
        while len(source):
            chunk, place = chunks[start // CHUNK_BYTES], start % CHUNK_BYTES
            part = source[: len(chunk) - place]
            chunk[place : place + len(part)].copy_(part)
            source, start = source[len(part) :], start + len(part)
    return chunks


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ROOM_STEP) * ROOM_STEP
