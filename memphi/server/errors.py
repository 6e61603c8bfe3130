"""What goes wrong, in OpenAI's shape: a status, a sentence, the offending field and a code."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from memphi.errors import BusyError, DoesNotFitError, MemphiError, RequestError

RETRY_SECONDS = 5
"""After so long it is worth while to ask again."""
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""What OpenAI calls each kind; any other is an invalid_request_error."""

ADVICE = {
    "--max-tokens": "max_tokens",
    "--on-pressure": "memphi.on_pressure",
    "--each": "memphi.each",
    "give more --memory": "start the server with more --memory",
}
"""What the engine advises in the command line's words, and how it is said to clients."""


class ErrorFields(BaseModel):
    """What a refusal says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refusal."""

    error: ErrorFields


class ApiError(Exception):
    """A request that gets no answer, as its sender is told."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def wrong(cls, param: str, what: str) -> "ApiError":
        """A field that is wrong; `what` goes on from its name."""
        return cls(400, f"{param} {what}", param, "invalid_value")

    @classmethod
    def later(cls, status: int, message: str, code: str) -> "ApiError":
        """One that is worth asking again."""
        return cls(status, message, None, code, {"Retry-After": str(RETRY_SECONDS)})

    @classmethod
    def of(cls, error: MemphiError, param: str | None = None) -> "ApiError":
        """What the engine refuses or cannot do."""
        if isinstance(error, RequestError):
            return cls(400, str(error), param, "invalid_value")
        if not isinstance(error, DoesNotFitError):
            return cls.later(503, str(error), "engine_unavailable")
        message = str(error)
        for option, field in ADVICE.items():
            message = message.replace(option, field)
        if isinstance(error, BusyError):
            return cls.later(429, message, "busy")
        return cls(413, message, "max_tokens" if "(max_tokens " in message else param, "does_not_fit")

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same for a client that calls the field otherwise."""
        if self.param is None or self.param not in names:
            return self
        message = self.message.replace(self.param, names[self.param], 1)
        return ApiError(self.status, message, names[self.param], self.code, self.headers)

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        # ASCII: a message may quote half a surrogate pair that its sender wrote.
        content = json.dumps(self.body).encode()
        return Response(content, self.status, self.headers, media_type="application/json")


class ClientLeftError(ApiError):
    """Nobody waits for the answer any more; the status is what nginx logs for this."""

    def __init__(self) -> None:
        super().__init__(499, "the client has left")


def path(steps: Sequence[str | int]) -> str:
    """A place in a document as people write it: messages[0].content[1].image_url."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


def invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request's fields, from pydantic's list."""
    problem = problems[0]
    # The first step says where the field came from; those in <> name a choice, not a place.
    steps = [step for step in problem["loc"][1:] if not str(step).startswith("<")]
    kind = problem["type"]
    where = path(steps)
    if not where:
        return ApiError(400, "the body must be a JSON object, with content-type application/json", None, "invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"{where} is no field that memphi knows; leave it out", where, "unknown_field")
    if kind == "none_required":
        return ApiError(400, f"{where} is not supported; leave it out", where, "unsupported_field")
    if kind == "missing":
        return ApiError(400, f"{where} is missing", where, "missing_field")
    return ApiError(400, f"{where}: {_lower_first(problem['msg'])}", where, "invalid_value")


def _lower_first(sentence: str) -> str:
    sentence = sentence.removeprefix("Value error, ")
    return sentence[:1].lower() + sentence[1:]


async def answer_error(_: Request, error: Exception) -> Response:
    """The response to an ApiError, or to what the engine raises."""
    assert isinstance(error, ApiError | MemphiError)
    return (error if isinstance(error, ApiError) else ApiError.of(error)).response
