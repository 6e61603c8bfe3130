"""POST /v1/tokenize: what a request would take, to the token, without running it."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Discriminator, Tag
from starlette.requests import Request as HttpRequest

from memphi.request import Footprint
from memphi.server import chat, completions
from memphi.server.answers import unless_left
from memphi.server.bodies import JsonRoute
from memphi.server.chat import ChatRequest
from memphi.server.completions import CompletionRequest
from memphi.server.errors import ApiError
from memphi.server.service import service_of

router = APIRouter(route_class=JsonRoute)


def _form_of(value: object) -> str:
    has_prompt = "prompt" in value if isinstance(value, dict) else isinstance(value, CompletionRequest)
    return "<completion>" if has_prompt else "<chat>"


AnyRequest = Annotated[
    Annotated[ChatRequest, Tag("<chat>")] | Annotated[CompletionRequest, Tag("<completion>")], Discriminator(_form_of)
]


@router.post("/v1/tokenize")
async def count_tokens(http: HttpRequest, body: AnyRequest) -> dict[str, Any]:
    """The price of the same body sent to /v1/chat/completions, or with a `prompt` to /v1/completions."""
    service = service_of(http)
    if isinstance(body, ChatRequest):
        _, work = await unless_left(http, chat.begin(service, body))
    else:
        work = await unless_left(http, completions.begin(service, body))
    return {
        "object": "tokenization",
        "model": service.settings.model,
        **work.price,
        "context_tokens": service.engine.bounds.tokens,
        "attachments": [item for footprint in work.footprints for item in _attachments(footprint)],
        "degraded": list(work.degraded),
        "errors": [ApiError.of(error).message for error in work.errors],
        "ignored": body.ignored(),
    }


def _attachments(footprint: Footprint) -> list[dict[str, Any]]:
    """Each image and clip: what it takes, and how it is seen or heard."""
    images = [
        {"kind": "image", "tokens": image.tokens, "crops": image.crops, "width": image.width, "height": image.height}
        for image in footprint.images
    ]
    return [*images, *({"kind": "audio", "tokens": clip.tokens, "seconds": clip.seconds} for clip in footprint.clips)]
