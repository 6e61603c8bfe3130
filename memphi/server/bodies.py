"""JSON bodies: read so that nothing in them is dropped, and refused with what is wrong with them."""

import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from memphi.server.errors import ApiError


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(http: HttpRequest) -> Response:
            return await handle(_JsonRequest(http.scope, http.receive))

        return read_and_handle


class _JsonRequest(HttpRequest):
    async def json(self) -> Any:  # noqa: ANN401
        return read_json(await self.body())


def read_json(body: bytes) -> Any:  # noqa: ANN401
    """What a body holds; raises ApiError."""
    try:
        return json.loads(body, object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise _wrong("is not JSON: its bytes are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _wrong(f"is not JSON: {error.msg}") from None
    except RecursionError:
        raise _wrong("is nested too deeply; send lists and objects of fewer levels") from None
    except ValueError:
        raise _wrong("holds a whole number of thousands of digits; send a smaller one") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _wrong(f"has {key!r} twice in one object; send it once")
    return found


def _wrong(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", None, "invalid_json")
