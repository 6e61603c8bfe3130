"""What a device and who asks leave to choose from: schemes, placements, forms; the sizes are `sizing`'s."""

from collections.abc import Sequence

from memphi.config import AdapterForm, EngineConfig, ModelConfig, Place, Placement, Scheme
from memphi.errors import DeviceError
from memphi.memory.devices import DeviceFacts

AUTO_SCHEMES: tuple[Scheme, ...] = ("bf16", "int8", "int4")
"""What --scheme auto tries, from the exact to the small; fp8 has to be asked for."""
USEFUL_TOKENS = 10240
"""A scheme or placement is passed over that leaves less context: an A4 page in full detail, a question and its
answer."""
ENOUGH_TOKENS = 16384
"""Room for so many is worth more than exact keys and values: a page of print in full detail and its answer, or as many
typical requests as make good use of a GPU."""
ASKED = "as asked for"


def enough_tokens(config: ModelConfig) -> int:
    """From how many tokens on the pool of a plan keeps keys and values as they are."""
    return min(ENOUGH_TOKENS, config.language.max_tokens)


def placements_of(
    device: DeviceFacts, engine: EngineConfig, scheme: Scheme, can_shrink: bool = False
) -> Sequence[Placement]:
    """Where weights may lie, the fastest first; towers and adapters share a room only where no smaller scheme is left.

    In 16 bits adapters stay, as columns of the weights they adapt: apart and on their way they would cost more time
    than fewer bits cost in exactness.
    """
    if engine.placement != "auto":
        return (engine.placement,)
    if device.kind != "cuda":
        return ("resident",)
    if scheme == "bf16" or engine.merge:
        return ("resident", "towers")
    return (
        ("resident", "towers", "adapters") if can_shrink else ("resident", "towers", "adapters", "shared", "streamed")
    )


def adapter_form(device: DeviceFacts, engine: EngineConfig, placement: Placement) -> AdapterForm:
    """Packed ones cost a GPU a third of plain ones' time; a CPU gains little by them, and answers to text slow down.

    Those that come and go are by themselves: in one matrix, both would have to be there.
    """
    if engine.merge:
        return "merged"
    return "packed" if device.kind == "cuda" and placement in ("resident", "towers") else "plain"


def preprocessing_place(device: DeviceFacts, engine: EngineConfig) -> Place:
    """A GPU makes crops and frames faster than a host; a CPU is the host, whose threads make them ahead of need."""
    if engine.preprocessing == "auto":
        return "device" if device.kind == "cuda" else "host"
    if engine.preprocessing == "device" and device.kind == "mps":
        raise DeviceError(f'{device.name} has no fp64, which log-mel frames need; use preprocessing="host"')
    return engine.preprocessing
