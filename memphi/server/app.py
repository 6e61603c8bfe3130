"""The application: routes, guards and error responses around one service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from memphi import __version__
from memphi.errors import MemphiError
from memphi.server import chat, completions, health, models, responses, tokenize, transcriptions
from memphi.server.errors import ApiError, ErrorBody, answer_error, invalid
from memphi.server.guard import guard
from memphi.server.page import mount_page
from memphi.server.service import Load, ServedEngine, Service
from memphi.server.settings import ServerSettings

REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What every route may answer instead, for the OpenAPI document."""


def make_app(engine: ServedEngine | Load, settings: ServerSettings) -> FastAPI:
    """The server of an engine; one that is to be loaded yet is loaded while the port is open already.

    Raises RequestError for settings that mean nothing.
    """
    service = Service(engine, settings)
    # The pages of documentation that FastAPI has would come from a network.
    app = FastAPI(title="memphi", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.service = service
    for part in (chat, completions, responses, tokenize, models, transcriptions, health):
        app.include_router(part.router, responses=REFUSALS)
    mount_page(app)
    for kind in (ApiError, MemphiError):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_fault)
    guard(app, service)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.start()
    yield
    await service.stop()


async def _answer_invalid(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors()).response


async def _answer_fault(_: HttpRequest, error: Exception) -> Response:
    """A fault of memphi's own; the framework logs its traceback."""
    return ApiError(500, "the server failed at this request; its log says at what", None, "server_fault").response


async def _answer_http(http: HttpRequest, error: Exception) -> Response:
    """What the framework itself refuses: routes and methods that there are not, bodies that it cannot read."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ApiError):  # Raised while a body was read, and wrapped on its way.
        return error.__cause__.response
    message = f"there is no {http.method} {http.url.path} here" if error.status_code in (404, 405) else error.detail
    return ApiError(error.status_code, message, None, None, error.headers).response
