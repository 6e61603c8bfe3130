"""What a server allows, shows and takes by default; plain numbers and names."""

from dataclasses import dataclass

from memphi.inputs.media import DEFAULT_LIMITS, MediaLimits
from memphi.request import OnPressure


@dataclass(frozen=True)
class Limits:
    """What one request, one key and all together may take at most; checked before anything is decoded."""

    body_bytes: int = 64 << 20
    recording_bytes: int = 352 << 20
    """Of a form with a recording to transcribe, which waits on disk: three hours of 16 bits at 16 kHz fit."""
    images: int = 64
    """In one request: as many as the model was trained with."""
    pixels: int = DEFAULT_LIMITS.pixels
    """Of one image."""
    audio_seconds: float = DEFAULT_LIMITS.seconds
    """Of one clip."""
    prompt_tokens: int | None = None
    """None: as many as the engine has room for."""
    queue: int = 256
    """Answers that wait while as many run as the engines' plans have rows."""
    key_requests: int = 128
    """Open requests of one key, where there are several."""

    @property
    def media(self) -> MediaLimits:
        """Of one attachment."""
        return MediaLimits(self.recording_bytes, self.pixels, self.audio_seconds)


@dataclass(frozen=True)
class ServerSettings:
    """How one server behaves."""

    model: str
    """The name that clients see and ask for."""
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    """Names under which the server may be asked for, besides those of this machine."""
    allow_urls: tuple[str, ...] = ()
    """Hosts that attachments may be fetched from; none: URLs are refused."""
    limits: Limits = Limits()
    on_pressure: OnPressure = "wait"
    max_tokens: int | None = None
    """Of an answer whose request does not say; None: as many as there is room for."""
    log_requests: bool = False
    """Log what is asked and answered, not only sizes and times."""
