"""Fetching attachments from https URLs, for clients that nobody vouches for: named hosts only, public addresses only.

Every URL, a redirect's too, is checked before anything is connected to, its host is looked up once, and the connection
goes to the very address that was checked, whatever the name server says a moment later. No proxies, no cookies, no
credentials. Knows nothing of what it fetches; `content` calls it.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, ip_address, ip_network
from urllib.parse import urljoin, urlsplit

import h11

from memphi.errors import MediaError, RequestError

HTTPS_PORT = 443
REDIRECTS = 4
SECONDS = 30.0
"""For all URLs of one request, from the first look-up to the last byte."""
CONNECT_SECONDS = 10.0
"""For one of a host's addresses, before the next is tried."""
CHUNK_BYTES = 1 << 16
AT_ONCE = 8
"""URLs of one request that are fetched at the same time."""
LOOK_UPS = 32
"""Of names, at the same time."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""A host and a port to addresses; raises OSError."""
Connect = Callable[[str, int, str], Awaitable[Streams]]
"""An address, a port and the host whose certificate is wanted to an encrypted connection; raises OSError."""

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?"
_NAME = rf"(?:{_LABEL}\.)*{_LABEL}"
_RULE = re.compile(rf"(?P<any>\*\.)?(?P<host>{_NAME}|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?", re.ASCII)
_HOST = re.compile(rf"{_NAME}|[0-9a-f:.]*:[0-9a-f:.]*", re.ASCII)
_URL = re.compile(r"[!-\[\]-~]+")  # Visible ASCII, but no backslash: some take it for a slash and some do not.
# Python versions differ in what they call global, so the blocks they differ on are named here.
_IPV6_UNICAST = ip_network("2000::/3")
_SPECIAL = tuple(
    ip_network(block)
    for block in (
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's own services for the machine that asks
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
)


@dataclass(frozen=True)
class HostRule:
    """One host that may be fetched from, or every name below it, on one port."""

    host: str
    below: bool
    port: int

    @classmethod
    def parse(cls, text: str) -> "HostRule":
        """From `images.example.org`, `*.example.org` or either with `:port`; raises RequestError."""
        match = _RULE.fullmatch(text.lower())
        if match is None or (match["any"] and match["host"].startswith("[")):
            raise RequestError(
                f"{text!r} is no host to fetch from; write it as images.example.org, *.example.org or "
                "images.example.org:8443, and an international name as xn--…"
            )
        return cls(match["host"].strip("[]"), match["any"] is not None, int(match["port"] or HTTPS_PORT))

    def allows(self, host: str, port: int) -> bool:
        named = host.endswith("." + self.host) if self.below else host == self.host
        return named and port == self.port


@dataclass(frozen=True)
class Place:
    """Where a URL leads, after it was checked."""

    url: str
    host: str
    port: int
    target: str
    """Path and query."""


def resolver() -> Resolve:
    """Asks the system for addresses, in threads that do nothing else: names that hang keep no other work waiting."""
    threads = ThreadPoolExecutor(LOOK_UPS, "look-up")

    async def resolve(host: str, port: int) -> list[str]:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(threads, look_up)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    return resolve


def connector(context: ssl.SSLContext | None = None) -> Connect:
    """Connections that trust whom the context trusts; None: whom the system trusts."""
    trust = context or ssl.create_default_context()

    async def connect(address: str, port: int, host: str) -> Streams:
        return await asyncio.open_connection(address, port, ssl=trust, server_hostname=host)

    return connect


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet and carries no other address inside."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if "%" in address or any(parsed in block for block in _SPECIAL):
        return False
    if isinstance(parsed, IPv4Address):
        return parsed.is_global and not parsed.is_multicast
    return parsed in _IPV6_UNICAST and parsed.is_global


@dataclass
class Allowance:
    """How much may still be fetched for one request."""

    limit_bytes: int
    taken_bytes: int = 0

    def check(self, more_bytes: int) -> None:
        """Raise MediaError where so many more are too many."""
        if self.taken_bytes + more_bytes > self.limit_bytes:
            most = f"{self.limit_bytes} bytes, the most that is fetched for one request"
            raise MediaError(f"has more than is left of {most}; send fewer or smaller files")

    def take(self, more_bytes: int) -> None:
        self.check(more_bytes)
        self.taken_bytes += more_bytes


@dataclass(frozen=True)
class Fetcher:
    """Fetches from the hosts that it is told, within limits."""

    rules: tuple[HostRule, ...]
    limit_bytes: int
    """For all URLs of one request together."""
    seconds: float = SECONDS
    resolve: Resolve = field(default_factory=resolver)
    connect: Connect = field(default_factory=connector)

    async def fetch(self, urls: Iterable[str]) -> dict[str, bytes | MediaError]:
        """What the https URLs of one request hold, as it is sent; or the reason, one sentence each, why it is not here.

        Cancelling this ends all connections, and so does a defect.
        """
        distinct = list(dict.fromkeys(urls))
        allowance, places = Allowance(self.limit_bytes), asyncio.Semaphore(AT_ONCE)
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def fetch(url: str) -> bytes | MediaError:
            try:
                async with asyncio.timeout_at(deadline), places:
                    return await self._follow(url, allowance)
            except TimeoutError:
                return MediaError(f"did not arrive within {self.seconds:g} seconds")
            except MediaError as error:
                return error

        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(fetch(url)) for url in distinct}
        return {url: task.result() for url, task in tasks.items()}

    async def _follow(self, url: str, allowance: Allowance) -> bytes:
        place = self._check("", url)
        for _ in range(REDIRECTS + 1):
            answer = await self._ask(place, allowance)
            if isinstance(answer, bytes):
                return answer
            place = self._check(place.url, answer.url)
        raise MediaError(f"is redirected more than {REDIRECTS} times; give the address where it ends")

    def _check(self, base: str, reference: str) -> Place:
        """Where a URL leads, or one that is relative to another, if this server goes there."""
        if not _URL.fullmatch(reference):
            raise MediaError("holds characters that no URL has; write them percent-encoded, a host's name as xn--…")
        try:
            url = urljoin(base, reference)
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as wrong:
            raise MediaError(f"is no URL ({wrong})") from None
        if parts.scheme != "https":
            raise MediaError("only https URLs are fetched; send anything else as a data URI")
        if "@" in parts.netloc:
            raise MediaError("carries a user name or password; give a URL without")
        port = HTTPS_PORT if port is None else port
        if not _HOST.fullmatch(host) or not any(rule.allows(host, port) for rule in self.rules):
            raise MediaError(
                f"this server does not fetch from {host} on port {port}; send the content as a data URI, "
                "or have the host named in --allow-urls"
            )
        return Place(url, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))

    async def _ask(self, place: Place, allowance: Allowance) -> "bytes | _Redirect":
        try:
            reader, writer = await self._open(place)
            try:
                return await _exchange(place, reader, writer, allowance)
            finally:
                writer.transport.abort()  # One that does not read cannot make anybody wait for a good-bye.
        except (OSError, h11.RemoteProtocolError) as wrong:
            raise MediaError(f"{place.host} cannot be fetched from ({str(wrong) or 'it does not answer'})") from None

    async def _open(self, place: Place) -> Streams:
        """A connection to an address that was looked up once and checked; raises OSError, MediaError."""
        addresses = await self.resolve(place.host, place.port)
        # All of them: a name that leads inside and outside is a trick, whichever comes first.
        if not addresses or not all(is_public(address) for address in addresses):
            raise MediaError(f"{place.host} does not lead to the public internet alone, so nothing is fetched from it")
        failure: OSError | None = None
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    return await self.connect(address, place.port, place.host)
            except OSError as wrong:
                failure = wrong
        assert failure is not None
        raise failure


@dataclass(frozen=True)
class _Redirect:
    url: str


async def _exchange(
    place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowance: Allowance
) -> bytes | _Redirect:
    """Ask for a place's content over a connection, and read it."""
    connection = h11.Connection(h11.CLIENT)
    name = f"[{place.host}]" if ":" in place.host else place.host
    headers = [
        ("Host", name if place.port == HTTPS_PORT else f"{name}:{place.port}"),
        ("User-Agent", "memphi"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    for event in (h11.Request(method="GET", target=place.target, headers=headers), h11.EndOfMessage()):
        writer.write(connection.send(event) or b"")
    content = bytearray()
    while not isinstance(received := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
        if received is h11.NEED_DATA:
            connection.receive_data(await reader.read(CHUNK_BYTES))
        elif isinstance(received, h11.Response):
            if (redirect := _read_head(place, received, allowance)) is not None:
                return redirect
        elif isinstance(received, h11.Data):
            allowance.take(len(received.data))
            content += received.data
    return bytes(content)


def _read_head(place: Place, response: h11.Response, allowance: Allowance) -> _Redirect | None:
    """Where a response sends us; None: its content follows. Raises MediaError for any other."""
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    if response.status_code in (301, 302, 303, 307, 308) and b"location" in headers:
        return _Redirect(headers[b"location"])
    if response.status_code != 200:
        raise MediaError(f"{place.host} answered {response.status_code}")
    if headers.get(b"content-encoding", "identity").lower() != "identity":
        raise MediaError(f"{place.host} sent it compressed though it was asked not to; send the content as a data URI")
    allowance.check(int(headers.get(b"content-length", "0")))
    return None
