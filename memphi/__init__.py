"""memphi runs Phi-4-multimodal-instruct: text, images and speech, within a memory budget.

The public names are imported when first used, so that `memphi --help` and counting tokens load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memphi.engine.engine import Engine as Engine
    from memphi.engine.engine import load as load
    from memphi.inputs.media import open_media as open_media
    from memphi.request import Grammar as Grammar
    from memphi.request import Message as Message
    from memphi.request import Request as Request
    from memphi.request import Result as Result
    from memphi.request import SamplingParams as SamplingParams

_HOMES = {
    "Engine": "memphi.engine.engine",
    "load": "memphi.engine.engine",
    "open_media": "memphi.inputs.media",
    "Grammar": "memphi.request",
    "Message": "memphi.request",
    "Request": "memphi.request",
    "Result": "memphi.request",
    "SamplingParams": "memphi.request",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'memphi' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
