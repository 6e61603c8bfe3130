"""Where a server may listen: on this machine for anybody, elsewhere only with a key, or where a person insists.

Checked before anything is loaded; called by `cli.serve`.
"""

import re
import socket
import ssl
from collections.abc import Sequence
from ipaddress import ip_address

from memphi.errors import RequestError

_KEY = re.compile(r"[!-~]+")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|[0-9A-Fa-f:.]+")


def check_address(host: str, api_keys: Sequence[str], insecure: bool) -> None:
    """Raise RequestError where everybody who reaches an address would be answered without a key."""
    if api_keys or insecure or is_loopback(host):
        return
    raise RequestError(
        f"{host} can be reached from other machines, and whoever reaches it could use this server: "
        "give --api-key (and --tls-cert and --tls-key), or --insecure if that is meant"
    )


def check_keys(api_keys: Sequence[str]) -> None:
    """Raise RequestError for a key that no client could send."""
    if not all(_KEY.fullmatch(key) for key in api_keys):
        raise RequestError("an API key is visible ASCII without spaces, and not empty; make one: openssl rand -hex 24")


def check_names(allowed_hosts: Sequence[str]) -> None:
    """Raise RequestError for what no Host header names."""
    for name in allowed_hosts:
        if not _NAME.fullmatch(name):
            raise RequestError(f"--allowed-host {name!r} is no host name; write it without scheme and port: chat.lan")


def check_tls(certificate: str | None, key: str | None) -> None:
    """Raise RequestError unless both files are there and belong together, or neither is given."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise RequestError("--tls-cert and --tls-key go together; give both")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal, once here and once more by the server.
        context.load_cert_chain(certificate, key, password=_no_password)
    except OSError as wrong:  # ssl.SSLError is one.
        what = wrong.strerror or wrong
        raise RequestError(f"{certificate} and {key} cannot be used for TLS: {what}; give PEM files") from None


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address, or all addresses of a name."""
    try:
        addresses = {str(address[0]) for *_, address in socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return bool(host) and all(ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _no_password() -> str:
    raise RequestError("--tls-key is encrypted; give a key file without a password")
