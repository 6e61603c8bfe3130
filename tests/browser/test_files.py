"""The page's files as they are served and kept; needs no browser."""

import hashlib
import re

import pytest
from starlette.testclient import TestClient

from memphi.server.app import make_app
from memphi.server.page import PAGE_FOLDER, TYPES
from memphi.server.settings import ServerSettings
from tests.server.fakes import FakeEngine

OWN = sorted(path for path in PAGE_FOLDER.iterdir() if path.is_file())


@pytest.fixture(scope="module")
def client():
    """A server that wants a key, asked without one."""
    with TestClient(make_app(FakeEngine(), ServerSettings("demo", api_keys=("key",))), "http://localhost") as client:
        yield client


@pytest.mark.parametrize("path", ["/", *(f"/page/{path.name}" for path in OWN), "/page/vendor/purify.es.mjs"])
def test_files_are_open_and_under_the_policy(client, path):
    answer = client.get(path)
    assert answer.status_code == 200
    suffix = "." + path.rpartition(".")[2] if "." in path else ".html"
    assert answer.headers["content-type"] == TYPES[suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_a_file_that_is_known_is_not_sent_again(client):
    tag = client.get("/page/app.js").headers["etag"]
    answer = client.get("/page/app.js", headers={"if-none-match": tag})
    assert (answer.status_code, answer.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fapp.py"]
)
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code in (401, 404)


def test_the_page_needs_nothing_from_elsewhere():
    for path in OWN:
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()))
        assert addresses <= {"http://www.w3.org"}, path.name  # The name of SVG, which nobody asks for.


def test_the_page_has_no_inline_scripts_and_styles():
    page = (PAGE_FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)


def test_every_icon_and_element_that_scripts_ask_for_is_there():
    page = (PAGE_FOLDER / "index.html").read_text()
    scripts = "".join(path.read_text() for path in OWN if path.suffix == ".js")
    icons = {*re.findall(r'\bicon\("([a-z]+)"\)', scripts), *re.findall(r'(?:note|iconButton)\("([a-z]+)"', scripts)}
    assert icons
    assert icons <= set(re.findall(r'id="icon-([a-z]+)"', page))
    assert set(re.findall(r'byId\("([a-z-]+)"\)', scripts)) <= set(re.findall(r'\bid="([A-Za-z-]+)"', page))


def test_vendored_files_are_those_that_their_page_names():
    vendor = PAGE_FOLDER / "vendor"
    told = dict(
        re.findall(r"^\| `([\w.]+)` \|.*`([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE)
    )
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.iterdir() if path.suffix in TYPES
    }
    assert told == found
    assert {path.name for path in vendor.glob("LICENSE-*")} == {"LICENSE-marked", "LICENSE-dompurify"}
