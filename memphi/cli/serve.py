"""`memphi serve`: an OpenAI-compatible server and a chat page."""

import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memphi.cli import options
from memphi.cli.terminal import byte_progress, tell, warn_of_device
from memphi.config import DEFAULT_MODEL
from memphi.errors import MemphiError

if TYPE_CHECKING:
    from memphi.engine.messages import Loading
    from memphi.engine.spread import SpreadEngine
    from memphi.server.service import Load, Progress
    from memphi.server.settings import ServerSettings

KEYS_VARIABLE = "MEMPHI_API_KEYS"
NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")

Host = Annotated[str, typer.Option(help="The address to listen on; any but this machine's own wants a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")]
ApiKey = Annotated[
    list[str], typer.Option(help=f"A key that clients must send. May be repeated; or several in {KEYS_VARIABLE}.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen elsewhere without a key.")]
AllowedHost = Annotated[
    list[str], typer.Option(metavar="NAME", help="A name by which this server is asked for. May be repeated.")
]
AllowUrls = Annotated[
    list[str],
    typer.Option(metavar="HOST", help="Fetch images from this host by https, or from *.HOST. May be repeated."),
]
TlsCert = Annotated[str | None, typer.Option(metavar="FILE", help="A certificate (PEM): speak https.")]
TlsKey = Annotated[str | None, typer.Option(metavar="FILE", help="The certificate's key (PEM).")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="New tokens at most where a request does not say; else what there is room for."),
]
Queue = Annotated[int, typer.Option(min=0, help="How many answers may wait for their turn.")]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="How long open requests may go on after SIGTERM or the first Ctrl-C.")
]
LogRequests = Annotated[
    bool, typer.Option("--log-requests", help="Log what is asked and answered, not only sizes and times.")
]


def serve(
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = [],  # noqa: B006
    insecure: Insecure = False,
    allowed_host: AllowedHost = [],  # noqa: B006
    allow_urls: AllowUrls = [],  # noqa: B006
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    model: options.Model = DEFAULT_MODEL,
    device: options.Devices = "auto",
    dtype: options.Dtype = "bf16",
    attention: options.AttentionBackend = "auto",
    memory: options.Memory = None,
    kv_cache: options.KvCache = "on",
    cache_format: options.CacheFormat = "auto",
    pin: options.Pins = [],  # noqa: B006
    merge: options.Merge = None,
    kernels: options.Kernels = "auto",
    scheme: options.Scheme = "auto",
    allocator: options.Allocator = "default",
    on_pressure: options.OnPressure = "wait",
    max_tokens: MaxTokens = None,
    queue: Queue = 256,
    drain_seconds: DrainSeconds = 60.0,
    log_requests: LogRequests = False,
) -> None:
    """Answer OpenAI's API over HTTP, and show a chat page."""
    _check_installed()
    from memphi.engine.messages import Loading
    from memphi.server.bind import check_address, check_keys, check_names, check_tls
    from memphi.server.settings import Limits, ServerSettings

    keys = (*api_key, *os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split())
    check_keys(keys)
    check_names(allowed_host)
    check_tls(tls_cert, tls_key)
    check_address(host, keys, insecure)
    settings = ServerSettings(
        model=_shown_name(model),
        api_keys=keys,
        allowed_hosts=tuple(allowed_host),
        allow_urls=tuple(allow_urls),
        limits=Limits(queue=queue),
        on_pressure=on_pressure,
        max_tokens=max_tokens,
        log_requests=log_requests,
    )
    warn_of_device(device[0])
    config = options.engine_config(
        memory, kv_cache, pin, merge, kernels=kernels, scheme=scheme, cache_format=cache_format
    )
    load = _loading(Loading(model, device[0], dtype, attention, config, allocator), device)
    _run(load, settings, host, port, tls_cert, tls_key, drain_seconds)


def _check_installed() -> None:
    """Raise MemphiError where the extra is missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        needed = ", ".join(missing)
        raise MemphiError(f'memphi serve needs {needed}; install it from your copy of memphi: pip install ".[server]"')


def _shown_name(model: str) -> str:
    """What clients call the model: a folder by its own name only."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _loading(loading: "Loading", devices: tuple[str, ...]) -> "Load":
    """What loads the model on each device in a process of its own, telling on stderr how far it is."""
    from memphi.engine.spread import find_gpus, start

    def load(progress: "Progress") -> "SpreadEngine":
        with byte_progress(f"loading {loading.model}") as show:

            def note(done_bytes: int, total_bytes: int) -> None:
                progress(done_bytes, total_bytes)
                show(done_bytes, total_bytes)

            named = find_gpus() if devices == (options.ALL_GPUS,) else devices
            engine = start([replace(loading, device=device) for device in named], note)
        tell(f"{loading.model} is ready" + (f" on {', '.join(named)}" if len(named) > 1 else ""))
        return engine

    return load


def _run(
    load: "Load",
    settings: "ServerSettings",
    host: str,
    port: int,
    certificate: str | None,
    key: str | None,
    drain_seconds: float,
) -> None:
    """Serve until a signal comes; raises what went wrong with loading."""
    from memphi.server.app import make_app
    from memphi.server.serving import Server, address_of, bind

    app = make_app(load, settings)
    listener = bind(host, port)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("memphi").setLevel(logging.INFO)
    tell(f"listening on {address_of(listener, certificate is not None)}")
    Server(app, drain_seconds, certificate, key).run([listener])
    if app.state.service.failure is not None:
        raise app.state.service.failure
