"""The chat page at /: static files that come with the package, under a policy that lets nothing else in.

Knows how files are served, nothing of the API that the page speaks to. `app` mounts it.
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

PAGE_FOLDER = Path(__file__).with_name("page")
PAGE_PREFIX = "/page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    # Whatever would parse a string as HTML has to come from the sanitiser.
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A newer memphi's page must not run with an older one's scripts.
    "Cache-Control": "no-cache",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""By suffix, not by what the machine believes: browsers told nosniff refuse a script of any other type."""


class _PageFiles(StaticFiles):
    """The page's own files, with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        response.headers["Content-Type"] = TYPES.get(Path(path).suffix, "text/plain; charset=utf-8")
        return response


def mount_page(app: FastAPI) -> None:
    """Serve the page at / and its files under /page."""
    app.mount(PAGE_PREFIX, _PageFiles(directory=PAGE_FOLDER), name="page")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        """The chat page."""
        return FileResponse(PAGE_FOLDER / "index.html", media_type=TYPES[".html"], headers=HEADERS)
