"""The errors a caller can meet; each message says what is wrong and what would work.

Knows nothing of what raises them. Every floor raises them, the CLI turns them into one line and an exit code.
"""


class MemphiError(Exception):
    """Anything memphi refuses; the message is one sentence for a person."""

    exit_code = 1


class RequestError(MemphiError):
    """A request that is wrong in itself: its messages, its sampling settings, its length."""

    exit_code = 4


class MediaError(RequestError):
    """An attachment that cannot be opened, decoded or used."""


class CheckpointError(MemphiError):
    """A model folder or file that is missing, damaged or not Phi-4-multimodal."""

    exit_code = 4


class DeviceError(MemphiError):
    """A device or number format that this machine does not have."""

    exit_code = 4


class DoesNotFitError(MemphiError):
    """Work that needs more memory or context than there is."""

    exit_code = 3


class BusyError(DoesNotFitError):
    """Work that would fit later, from somebody who does not wait."""


class WorkerError(MemphiError):
    """The engine has stopped, or an answer was lost in it."""


class LostError(WorkerError):
    """The engine's process has ended, and what was asked of it with it: the same may be asked again."""
