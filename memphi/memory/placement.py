"""The map of the weights: which group lies on the device, which on the host until a step needs it, and why.

Knows bytes and reasons; what moves them is `model/rooms.py`. `memphi plan` prints it.
"""

from dataclasses import dataclass

from memphi.config import ROOMS, AdapterForm, ModelConfig, Place, Placement
from memphi.memory import costs

HOST_LINK_BYTES = 12 * 10**9
"""What a second brings from pinned memory of the host: an estimate, PCIe 4.0 with 8 lanes or 3.0 with 16."""
PLACEMENT_WORDS: dict[Placement, str] = {
    "resident": "everything on the device",
    "towers": "the idle tower on the host",
    "adapters": "the idle tower and the idle adapter on the host",
    "shared": "all towers and adapters but the one at work on the host",
    "streamed": "all these and the decoder's layers on the host",
}


@dataclass(frozen=True)
class PlacedGroup:
    """One group of the weights, and where it lies."""

    name: str
    where: Place
    bytes: int
    reason: str


def place_groups(
    config: ModelConfig, dtype_bytes: int, form: AdapterForm, placement: Placement
) -> tuple[PlacedGroup, ...]:
    """The map of a placement; a group without weights of its own is left out."""
    guests = {name: [other for other in room if other != name] for room in ROOMS[placement] for name in room}
    groups = ((cost.name.removeprefix("weights: "), cost.bytes) for cost in costs.weights(config, dtype_bytes, form))
    return tuple(
        PlacedGroup(name, "host", n_bytes, _why_on_host(name, n_bytes, guests[name]))
        if name in guests
        else PlacedGroup(name, "host", n_bytes, _why_streamed(config, dtype_bytes))
        if name == "language" and placement == "streamed"
        else PlacedGroup(name, "device", n_bytes, _why_on_device(name))
        for name, n_bytes in groups
        if n_bytes
    )


def _why_on_host(name: str, n_bytes: int, others: list[str]) -> str:
    use = "while a request of its mode is computed" if name.endswith(" adapter") else "to encode"
    milliseconds = max(round(1000 * n_bytes / HOST_LINK_BYTES), 1)
    return (
        f"brought {use}, in about {milliseconds} ms (an estimate: {HOST_LINK_BYTES / 1e9:.0f} GB/s), "
        f"into one room with the {', '.join(others)}"
    )


def _why_streamed(config: ModelConfig, dtype_bytes: int) -> str:
    """What streaming costs, told beforehand."""
    step_bytes = config.language.layers * costs.layer_room_bytes(config, dtype_bytes)
    seconds = step_bytes / HOST_LINK_BYTES
    return (
        f"every step brings its layers one after another, {costs.size_text(step_bytes)}: {seconds:.2g} s a step at "
        f"least, so {1 / seconds:.1f} tokens a second at most for each row "
        f"(an estimate: {HOST_LINK_BYTES / 1e9:.0f} GB/s)"
    )


def _why_on_device(name: str) -> str:
    reasons = {"language": "every step computes with it", "embedding": "every step computes with it, twice"}
    return reasons.get(name, "there is room, and nothing has to be brought")
