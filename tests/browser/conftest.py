"""A real browser on real servers: Chromium from the system (`apt-get install chromium`), driven by Playwright.

Where either is missing, these tests are skipped. Every page is watched: an error in its console, and with it anything
that its own policy refuses, fails the test; so does a request to anywhere but the server.
"""

import shutil
import wave
from urllib.parse import urlsplit

import pytest

import memphi
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.browser.scripted import scripted
from tests.server.conftest import listening, sample

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FAKE_MICROPHONE = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")


@pytest.fixture(scope="session")
def microphone(tmp_path_factory):
    """What Chromium's microphone hears, again and again: the sample of spoken words between stretches of silence."""
    path = tmp_path_factory.mktemp("microphone") / "words.wav"
    path.write_bytes(sample("words.wav"))
    with wave.open(str(path)) as words:
        settings, frames = words.getparams(), words.readframes(words.getnframes())
    silence = bytes(settings.framerate // 4 * settings.sampwidth * settings.nchannels)
    with wave.open(str(path), "wb") as file:
        file.setparams(settings)
        file.writeframes(silence + frames + silence)
    return path


@pytest.fixture(scope="package")
def browser(microphone):
    """Chromium, for these tests alone: Playwright's loop runs as long, and no other test could run one of its own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        hears = f"--use-file-for-fake-audio-capture={microphone}"
        arguments = [*FAKE_MICROPHONE, hears, "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def demo():
    """The address of a server of the demo model."""
    engine = memphi.load("demo", device="cpu", dtype="fp32")
    with listening(make_app(engine, ServerSettings("demo"))) as address:
        yield address
    engine.close()


@pytest.fixture
def server():
    """A server that says what the test wants: its address, and its script."""
    with scripted() as server:
        yield server


class Watched:
    """What went wrong in a page, as far as the test does not expect it."""

    def __init__(self, address, expected):
        self._address, self._expected = urlsplit(address).netloc, expected
        self.problems = []

    def watch(self, page):
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", self._see)

    def _hear(self, message):
        # A server that the test has ended is still asked how it is.
        expected = (*self._expected, "ERR_CONNECTION_REFUSED")
        if message.type in ("error", "warning") and not any(word in message.text for word in expected):
            self.problems.append(message.text)

    def _see(self, request):
        if not request.url.startswith(("data:", "blob:")) and urlsplit(request.url).netloc != self._address:
            self.problems.append(f"asked for {request.url}")


@pytest.fixture
def visit(browser):
    """visit(address, expected=(), script="", **settings) opens the page.

    expected: words of errors that may come; script: what runs before those of the page.
    """
    opened = []

    def visit(address, expected=(), script="", **settings):
        context = browser.new_context(**settings)
        context.add_init_script(script)
        context.set_default_timeout(8000)
        watched = Watched(address, expected)
        page = context.new_page()
        watched.watch(page)
        page.goto(address)
        page.wait_for_selector("body[data-started]")
        opened.append((context, watched))
        return page

    yield visit
    for context, watched in opened:
        context.close()
        assert watched.problems == []
