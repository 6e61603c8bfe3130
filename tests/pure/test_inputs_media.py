"""Attachments are opened by their content, within limits, and every refusal is one sentence."""

import base64
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from memphi.errors import MediaError
from memphi.inputs import media
from memphi.inputs.media import MediaLimits, audio_media, image_media, open_media
from tests.pure.inputs_samples import PICTURE_FORMATS, SOUND_FORMATS, picture, sound

PNG = picture(20, 10)


class Trickle(io.BytesIO):
    """A file without a buffer: a read gives what there is."""

    def read(self, size=-1):
        return super().read(min(size, 7))


@pytest.mark.parametrize("format", PICTURE_FORMATS)
def test_a_picture_is_known_by_its_content(tmp_path, format):
    path = tmp_path / "sound.wav"
    path.write_bytes(picture(20, 10, format))
    media = open_media(path)
    assert (media.kind, media.name) == ("image", "sound.wav")


@pytest.mark.parametrize(("container", "codec"), [entry[:2] for entry in SOUND_FORMATS])
def test_a_sound_is_known_by_its_content(container, codec):
    assert open_media(sound(container, codec), "picture.png").kind == "audio"


def test_all_sources_give_the_same_media(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    encoded = base64.b64encode(PNG).decode()
    percent = "".join(f"%{byte:02x}" for byte in PNG)
    sources = (
        *(path, str(path), PNG, io.BytesIO(PNG), Trickle(PNG)),
        *(f"data:image/png;base64,{encoded}", f"DATA:image/png;BASE64,{encoded.rstrip('=')}"),
        f"data:image/png,{percent}",
    )
    media = [open_media(source) for source in sources]
    assert {item.digest for item in media} == {media[0].digest}
    assert {item.content for item in media} == {PNG}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "there is no file nowhere.png"),
        ("/", "^/: is neither a file nor a pipe"),
        (Path("/"), "^/: is neither a file nor a pipe"),
        ("", "attachment: has an empty name"),
        ("nul\0byte", "cannot be read"),
        (io.StringIO("words"), "open it as bytes, with mode 'rb'"),
        (None, "is a NoneType; give a path, a URL, bytes or a file"),
        (np.zeros((2, 2, 3), np.uint8), "is a ndarray; give a path"),
        (b"", "is empty"),
        (b"just some text", "neither a picture nor a sound"),
        (b"\xff\xfet\0e\0x\0t\0", "neither a picture nor a sound"),
        (b"%PDF-1.7", "turn its pages into"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "save it as JPEG or PNG"),
        ("ftp://example.org/a.png", "only http, https and data"),
        ("file:///etc/hostname", "only http, https and data"),
        ("data:image/png;base64", "is not a data URI"),
        ("data:image/png;base64,???", "damaged base64"),
        ("http://", "cannot be fetched"),
        ("http://[::1", "cannot be fetched"),
        ("http://ex\u2100mple.org/a.png", "cannot be fetched"),
        (type("Words", (), {"read": lambda self, size: "words"})(), "gives str where it is read"),
    ],
)
def test_a_refusal_says_what_is_wrong(source, message):
    with pytest.raises(MediaError, match=message) as caught:
        open_media(source)
    assert "\n" not in str(caught.value)


def test_the_size_is_limited_before_reading(tmp_path):
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    limits = MediaLimits(bytes=len(PNG) - 1)
    for source in (path, PNG, io.BytesIO(PNG), "data:image/png;base64," + base64.b64encode(PNG).decode()):
        with pytest.raises(MediaError, match=f"more than {len(PNG) - 1} bytes"):
            open_media(source, limits=limits)
    assert open_media(PNG, limits=MediaLimits(bytes=len(PNG))).content == PNG


def test_a_pipe_is_read_as_far_as_the_limit(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for limits in (MediaLimits(), MediaLimits(bytes=len(PNG) - 1)):
        writer = threading.Thread(target=path.write_bytes, args=(PNG,), daemon=True)
        writer.start()
        if limits.bytes > len(PNG):
            assert open_media(path, limits=limits).content == PNG
        else:
            with pytest.raises(MediaError, match=f"more than {limits.bytes} bytes"):
                open_media(str(path), limits=limits)
        writer.join()


class _Pages(BaseHTTPRequestHandler):
    goes_on = threading.Event()
    """Whether who asked for /drops has looked at what came first."""

    def do_GET(self):
        if self.path == "/leak":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png?size=1")
            self.end_headers()
        elif self.path == "/circle":
            self.send_response(302)
            self.send_header("Location", "/circle")
            self.end_headers()
        elif self.path == "/half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:20])
        elif self.path == "/drops":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG[:20])
            assert self.goes_on.wait(60)
            self.wfile.write(PNG[20:])
        elif self.path.startswith(("/a.png", "/f%C3%BCr%20a.png?q=%C3%BC")):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = HTTPServer(("127.0.0.1", 0), _Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched(site):
    for page in ("/a.png?x=1", "/moved"):
        assert open_media(site + page).content == PNG
    assert open_media(site + "/a.png?x=1").name == "a.png"
    assert open_media(site + "/für a.png?q=ü").content == PNG
    assert open_media(site + "/f%C3%BCr%20a.png?q=%C3%BC#part").content == PNG


def test_what_breaks_off_is_not_taken_for_whole(site):
    with pytest.raises(MediaError, match=f"broke off after 20 of {len(PNG)} bytes"):
        open_media(site + "/half")


def test_what_comes_drop_by_drop_is_given_up(site, monkeypatch):
    """The second time that the clock is looked at, the first part is there; the third time it is late."""
    times = iter((0, media.FETCH_SECONDS - 1, media.FETCH_SECONDS + 1))

    def clock():
        if (now := next(times)) > 0:
            _Pages.goes_on.set()
        return now

    monkeypatch.setattr(media, "time", SimpleNamespace(monotonic=clock))
    with pytest.raises(MediaError, match="did not arrive within"):
        open_media(site + "/drops")


@pytest.mark.parametrize(
    ("page", "message"), [("/none", "404"), ("/leak", "file"), ("/a.png", "more than 5 bytes"), ("/circle", "302")]
)
def test_bad_urls_are_refused(site, page, message):
    with pytest.raises(MediaError, match=message) as caught:
        open_media(site + page, limits=MediaLimits(bytes=5))
    assert "\n" not in str(caught.value)


def test_arrays_of_the_same_numbers_are_the_same_media():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_media(pixels) == image_media(pixels.copy())
    assert image_media(pixels) != image_media(pixels + 1)
    sound = np.linspace(-1, 1, 16, dtype=np.float32)
    assert audio_media(sound, 16_000) == audio_media(sound.copy(), 16_000) != audio_media(sound, 8_000)


def test_arrays_are_media():
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert image_media(pixels).digest == image_media(pixels.copy()).digest
    assert image_media(pixels).digest != image_media(pixels.reshape(6, 4, 3)).digest
    stereo = np.array([[16384, 0], [-32768, 0]], np.int16)
    media = audio_media(stereo, 16000)
    assert media.content.values.tolist() == [0.25, -0.5]
    assert media.digest != audio_media(stereo, 8000).digest


@pytest.mark.parametrize(("shape", "kind"), [((4, 4), "u1"), ((4, 4, 4), "u1"), ((4, 4, 3), "f4"), ((0, 4, 3), "u1")])
def test_other_pixels_are_refused(shape, kind):
    with pytest.raises(MediaError, match="pixels must be uint8"):
        image_media(np.zeros(shape, kind))


@pytest.mark.parametrize(
    "values", [np.zeros((2, 2, 2), np.float32), np.zeros(4, np.int32), np.zeros((4, 0), np.float32)]
)
def test_other_samples_are_refused(values):
    with pytest.raises(MediaError, match="samples must be"):
        audio_media(values, 16000)


def test_pixels_are_an_array():
    with pytest.raises(MediaError, match="pixels must be an array"):
        image_media(Image.new("RGB", (4, 4)))


def test_who_writes_over_an_array_changes_no_attachment():
    pixels, sound = np.zeros((4, 6, 3), np.uint8), np.zeros(16, np.float32)
    kept = image_media(pixels), audio_media(sound, 16000)
    pixels[:], sound[:] = 7, 1
    assert not kept[0].content.any()
    assert not kept[1].content.values.any()


def test_a_rate_is_a_whole_number():
    values = np.zeros(16, np.float32)
    media = audio_media(values, 16000.0)
    assert media.digest == audio_media(values, 16000).digest
    assert type(media.content.rate) is int
    for rate in (16000.5, float("nan"), float("inf"), "16000", None):
        with pytest.raises(MediaError, match="audio: the rate must be a whole number"):
            audio_media(values, rate)
