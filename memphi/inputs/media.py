"""Attachments: from a path, URL, data URI or bytes to a Media with a kind and a digest, within limits.

Knows where bytes come from and how a format is told from its first bytes; decodes nothing (`image` and `audio` do).
Called by whoever takes attachments from people: cli, server, jobs.
"""

import base64
import binascii
import hashlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from io import TextIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from memphi.errors import MediaError
from memphi.request import Float32, Media, MediaKind, Pixels, Samples

KNOWN_FORMATS = "PNG, JPEG, WebP, GIF, TIFF and BMP pictures and WAV, FLAC, MP3, M4A, OGG and WebM sound"
FETCH_SECONDS = 60.0
CHUNK_BYTES = 1 << 20
STANDS_IN_URLS = "%/:=&?~+!$,;'@()*[]"
"""What is no letter or digit, and is not encoded there; all else is."""
TAG = b"ID3"
"""How titles before a sound begin."""
LOUDEST = 1e6
"""Full scale is 1; some float files hold 16-bit integers as they are."""


@dataclass(frozen=True)
class MediaLimits:
    """What one attachment may be at most; checked before it is read (bytes) and before it is decoded."""

    bytes: int = 512 << 20
    pixels: int = 100_000_000
    """Width times height of a picture."""
    seconds: float = 3 * 3600.0


DEFAULT_LIMITS = MediaLimits()


def open_media(
    source: str | Path | bytes | BinaryIO, name: str | None = None, limits: MediaLimits = DEFAULT_LIMITS
) -> Media:
    """Read an attachment and tell its kind from its content, never from its name.

    A str is an http(s) URL, a data: URI or a path; a file is open in binary. Raises MediaError, naming the attachment.
    """
    label = name or label_of(source)
    with attached(label):
        content = _read(source, limits.bytes)
        return Media(sniff(content)[0], label, content, hashlib.sha256(content).hexdigest())


def image_media(pixels: Pixels, name: str = "image") -> Media:
    """Wrap decoded pixels, uint8 [height, width, 3]; raises MediaError for any other array."""
    with attached(name):
        if not isinstance(pixels, np.ndarray):
            raise MediaError("pixels must be an array; of a PIL picture take np.asarray(picture.convert('RGB'))")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise MediaError(f"pixels must be uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        pixels = np.array(pixels, order="C")  # Whoever gave them may write others there.
    return Media("image", name, pixels, _array_digest(pixels, "image"))


def audio_media(values: NDArray[np.floating | np.int16], rate: float, name: str = "audio") -> Media:
    """Wrap decoded sound, [samples] or [samples, channels], float in [-1, 1] or int16, at `rate` Hz.

    Channels are averaged. Raises MediaError for any other array, and for a rate that is no whole number.
    """
    with attached(name):
        mono, whole = _mono(np.asarray(values)), _whole(rate)
    return Media("audio", name, Samples(mono, whole), _array_digest(mono, f"audio {whole}"))


def _whole(rate: float) -> int:
    with suppress(TypeError, ValueError, OverflowError):  # also of NaN and infinity
        if (whole := int(rate)) == rate:
            return whole
    raise MediaError(f"the rate must be a whole number of samples a second, not {rate!r}")


def check_samples(values: NDArray[np.floating | np.int16]) -> None:
    """Raise MediaError for samples that are no numbers, or so big that their power would overflow float32."""
    if values.size and not -LOUDEST <= values.min() <= values.max() <= LOUDEST:  # NaN is neither
        raise MediaError("holds samples that are no numbers or beyond all measure; convert or record it anew")


@contextmanager
def attached(name: str) -> Iterator[None]:
    """Put the attachment's name before the message of any MediaError raised inside."""
    try:
        yield
    except MediaError as wrong:
        raise MediaError(f"{name}: {wrong}") from None


def sniff(content: bytes) -> tuple[MediaKind, str]:
    """Kind and format by the first bytes; the format is Pillow's name of a picture's, FFmpeg's of a sound's.

    Raises MediaError for anything else.
    """
    if not content:
        raise MediaError("is empty")
    for kind, format, pattern in _SIGNATURES:
        if pattern.match(content):
            return kind, _tagged(content) if content.startswith(TAG) else format
    for reason, pattern in _REFUSALS:
        if pattern.match(content):
            raise MediaError(reason)
    raise MediaError(f"is neither a picture nor a sound that memphi reads; it reads {KNOWN_FORMATS}")


def _tagged(content: bytes) -> str:
    """The format of a sound behind its titles, which MP3 begins with, and others sometimes do."""
    start = 0
    while content.startswith(TAG, start) and start + 10 <= len(content):
        size = [byte & 0x7F for byte in content[start + 6 : start + 10]]
        start += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    for _, format, pattern in _SIGNATURES:
        if format in ("flac", "aac") and pattern.match(content, start):
            return format
    return "mp3"


def _signature(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


_REFUSALS = (
    (
        "is a HEIC or AVIF picture, which memphi does not read; save it as JPEG or PNG",
        _signature(rb".{4}ftyp(hei|hev|mif1|msf1|avi)"),
    ),
    ("is a PDF; turn its pages into PNG or JPEG pictures first", _signature(rb"%PDF")),
)

# The refused kinds of ftyp are excluded from mp4 by name: both are the same container.
_SIGNATURES: tuple[tuple[MediaKind, str, re.Pattern[bytes]], ...] = (
    ("image", "PNG", _signature(rb"\x89PNG\r\n\x1a\n")),
    ("image", "JPEG", _signature(rb"\xff\xd8\xff")),
    ("image", "WEBP", _signature(rb"RIFF.{4}WEBP")),
    ("image", "GIF", _signature(rb"GIF8[79]a")),
    ("image", "TIFF", _signature(rb"II\*\x00|MM\x00\*")),
    ("image", "BMP", _signature(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00")),
    ("audio", "wav", _signature(rb"RIFF.{4}WAVE")),
    ("audio", "flac", _signature(rb"fLaC")),
    ("audio", "ogg", _signature(rb"OggS")),
    ("audio", "matroska", _signature(rb"\x1a\x45\xdf\xa3")),
    ("audio", "mp4", _signature(rb".{4}ftyp(?!hei|hev|mif1|msf1|avi)")),
    ("audio", "aac", _signature(rb"\xff[\xf0\xf1\xf8\xf9]")),
    ("audio", "mp3", _signature(rb"ID3|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]")),
)


def label_of(source: str | Path | bytes | BinaryIO) -> str:
    """What an attachment is called that was given no name."""
    if isinstance(source, Path):
        return source.name or str(source)
    if isinstance(source, str) and source:
        if _is_data(source):
            return "data URI"
        return (_path_of(source) if "://" in source else source).rpartition("/")[2] or source
    return "attachment"


def _is_data(source: str) -> bool:
    return source[: len("data:")].lower() == "data:"


def _path_of(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).path
    except ValueError:  # Whoever fetches it says so.
        return url


def _read(source: str | Path | bytes | BinaryIO, limit: int) -> bytes:
    if isinstance(source, bytes):
        content = source
    elif isinstance(source, Path):
        content = _read_file(source, limit)
    elif isinstance(source, str):
        content = _read_named(source, limit)
    else:
        content = _read_open(source, limit)
    _check_bytes(len(content), limit)
    return content


def _read_named(source: str, limit: int) -> bytes:
    if not source:
        raise MediaError("has an empty name; give a path or a URL")
    if _is_data(source):
        return _decode_uri(source, limit)
    return _fetch(source, limit) if "://" in source else _read_file(Path(source), limit)


def _read_open(source: Any, limit: int) -> bytes:  # noqa: ANN401  # callers may give anything
    if not hasattr(source, "read"):
        raise MediaError(f"is a {type(source).__name__}; give a path, a URL, bytes or a file that is open")
    if isinstance(source, TextIOBase):
        raise MediaError("is open as text; open it as bytes, with mode 'rb'")
    content = bytearray()
    while len(content) <= limit:  # One without a buffer gives what there is.
        piece = source.read(limit + 1 - len(content))
        if not isinstance(piece, bytes):
            raise MediaError(
                f"gives {type(piece).__name__} where it is read; open it as bytes, with mode 'rb', to wait"
            )
        if not piece:
            break
        content += piece
    return bytes(content)


def _check_bytes(size: int, limit: int) -> None:
    if size > limit:
        raise MediaError(f"has more than {limit} bytes, the most that an attachment may have; send a smaller file")


def _read_file(path: Path, limit: int) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise MediaError("is neither a file nor a pipe")
        with path.open("rb") as file:
            _check_bytes(path.stat().st_size, limit)
            return file.read(limit + 1)
    except FileNotFoundError:
        raise MediaError(f"there is no file {path}") from None
    except (OSError, ValueError) as wrong:
        raise MediaError(f"cannot be read ({wrong})") from None


def _decode_uri(uri: str, limit: int) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise MediaError("is not a data URI; one looks like data:image/png;base64,iVBORw0…")
    _check_bytes(len(payload) * 3 // 4 - 2, limit)
    raw = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return raw
    digits = b"".join(raw.split())
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("holds damaged base64") from None


def _fetch(url: str, limit: int) -> bytes:
    """Read an http(s) URL; redirects are followed, to http(s) only."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme.lower() not in ("http", "https"):
            raise MediaError("only http, https and data URLs can be opened")
        path, query = (urllib.parse.quote(part, safe=STANDS_IN_URLS) for part in (parts.path, parts.query))
        whole = urllib.parse.urlunsplit(parts._replace(path=path, query=query, fragment=""))
        return _download(whole, limit, deadline=time.monotonic() + FETCH_SECONDS)
    except urllib.error.HTTPError as wrong:
        reason = wrong.reason.partition("\n")[0]  # Of a redirect that leads in circles there are several lines.
        raise MediaError(f"the server answered {wrong.code} {reason}") from None
    except (OSError, ValueError, HTTPException) as wrong:
        raise MediaError(f"cannot be fetched ({wrong})") from None


def _download(url: str, limit: int, deadline: float) -> bytes:
    chunks: list[bytes] = []
    size = 0
    with _http_opener().open(url, timeout=FETCH_SECONDS / 2) as response:
        _check_bytes(int(response.headers.get("Content-Length") or 0), limit)
        while chunk := response.read1(CHUNK_BYTES):
            size += len(chunk)
            _check_bytes(size, limit)
            if time.monotonic() > deadline:
                raise MediaError(f"did not arrive within {FETCH_SECONDS:.0f} seconds")
            chunks.append(chunk)
        if response.length:
            raise MediaError(f"broke off after {size} of {size + response.length} bytes")
    return b"".join(chunks)


def _http_opener() -> urllib.request.OpenerDirector:
    """An opener without the file, ftp and data handlers that urllib's own has, so that no redirect reaches them."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _mono(values: NDArray[np.floating | np.int16]) -> Float32:
    if values.dtype == np.int16:
        values = values.astype(np.float32) / np.float32(32768)
    if not np.issubdtype(values.dtype, np.floating):
        raise MediaError(f"samples must be float in [-1, 1] or int16, not {values.dtype}")
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise MediaError(f"samples must be [samples] or [samples, channels], not {list(values.shape)}")
    check_samples(values)
    if values.ndim == 2:
        values = values.mean(axis=1)
    return np.array(values, dtype=np.float32, order="C")  # Whoever gave them may write others there.


def _array_digest(values: Pixels | Float32, kind: str) -> str:
    digest = hashlib.sha256(f"{kind} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values).reshape(-1).data)
    return digest.hexdigest()
