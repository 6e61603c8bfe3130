"""The pictures of the page in docs/, with true answers of the demo: `python -m tests.browser.screenshots` renews them.

They look best where the font Inter is installed (`apt-get install fonts-inter`); without it, it is the system's own.
"""

from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import memphi
from memphi.config import EngineConfig
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.browser.conftest import CHROMIUM
from tests.browser.steps import ask, attach, wait_for_answer
from tests.server.conftest import listening

DOCS = Path(__file__).parents[2] / "docs"
MOST_BYTES = 200_000
DIAL_BYTES = 600 << 20
WIDE = {"viewport": {"width": 1200, "height": 780}, "device_scale_factor": 1.5}
PHONE = {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


def main() -> None:
    """Write page-light.png, page-dark.png and page-phone.png."""
    engine = memphi.load("demo", device="cpu", dtype="fp32", config=EngineConfig(memory_bytes=DIAL_BYTES))
    with listening(make_app(engine, ServerSettings("demo"))) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_context(**WIDE).new_page()
        page.goto(address)
        _talk(page)
        _draft(page)
        _take(page, "page-light.png")
        page.emulate_media(color_scheme="dark")
        _degrade(page, engine.bounds.tokens)
        _take(page, "page-dark.png")
        phone = browser.new_context(**PHONE).new_page()
        phone.goto(address)
        for text, files in (("Hello", ()), ("What is in the picture?", ("red-circle.png",))):
            ask(phone, text, *files)
            wait_for_answer(phone)
        attach(phone, "words.wav")
        _take(phone, "page-phone.png")
        browser.close()
    engine.close()


def _talk(page: Page) -> None:
    """A few conversations, to be listed; the last is about a recording and a picture."""
    for text, files in (
        ("Who are you?", ()),
        ("What shape is shown?", ("green-triangle.png",)),
        ("Reverse the word: lion", ()),
        ("Transcribe the audio.", ("words.wav",)),
    ):
        page.click("#new")
        ask(page, text, *files)
        wait_for_answer(page)
    ask(page, "What is in the picture?", "red-circle.png")
    wait_for_answer(page)


def _draft(page: Page) -> None:
    """Something that is about to be asked."""
    attach(page, "shapes.png", "question.wav")
    page.fill("#text", "And how many stars are there here?")
    page.wait_for_selector("#price >> text=token")


def _degrade(page: Page, most_tokens: int) -> None:
    """Two pictures, and an answer so long that they do not fit together."""
    page.click("#new")
    for name in ("shapes.png", "question.wav"):
        page.click(f"[aria-label='Remove {name}']")
    page.click("#settings-open")
    page.fill("[name=maxTokens]", str(most_tokens - 90))
    page.select_option("[name=onPressure]", "one-by-one")
    page.keyboard.press("Escape")
    ask(page, "What colour is the shape?", "red-circle.png", "green-triangle.png")
    wait_for_answer(page)


def _take(page: Page, name: str) -> None:
    page.mouse.move(600, 300)
    page.wait_for_function("() => !document.querySelector('.tokens.pending')")
    page.wait_for_timeout(700)  # Bars and shadows come to rest.
    path = DOCS / name
    page.screenshot(path=path)
    assert path.stat().st_size < MOST_BYTES, f"{name} has {path.stat().st_size} bytes, more than {MOST_BYTES}"
    print(f"{name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
