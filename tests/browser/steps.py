"""What a person does with the page, step by step."""

from memphi.checkpoint.locate import locate

MEDIA = locate("demo").folder.parent / "media"


def attach(page, *names):
    """Choose sample files of the demo."""
    if names:
        page.set_input_files("#picker", [MEDIA / name for name in names])
        page.wait_for_function("n => document.querySelectorAll('.chip').length === n", arg=len(names))


def ask(page, text, *names):
    """Attach sample files, write, and send with Enter."""
    attach(page, *names)
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_for_answer(page, number=-1):
    """The text of an answer that is complete."""
    page.wait_for_selector("#stop", state="hidden")
    article = page.locator(".answer").nth(number)
    article.locator(".foot").wait_for()
    return article.locator(".prose").inner_text().strip()
