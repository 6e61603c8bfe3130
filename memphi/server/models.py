"""GET /v1/models: the one model that is loaded, and what it can do."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from memphi.request import InputMode
from memphi.server.service import Service, service_of

MODES = {
    InputMode.TEXT: "text",
    InputMode.VISION: "image",
    InputMode.SPEECH: "audio",
    InputMode.VISION_SPEECH: "image+audio",
}

router = APIRouter()


@router.get("/v1/models")
async def list_models(http: HttpRequest) -> dict[str, Any]:
    """The models there are to ask for."""
    return {"object": "list", "data": [describe(service_of(http))]}


@router.get("/v1/models/{model:path}")
async def show_model(http: HttpRequest, model: str) -> dict[str, Any]:
    """One of them."""
    service = service_of(http)
    service.check_model(model)
    return describe(service)


def describe(service: Service) -> dict[str, Any]:
    engine = service.engine
    return {
        "id": service.settings.model,
        "object": "model",
        "created": service.started,
        "owned_by": "memphi",
        "memphi": {
            "input_modes": [name for mode, name in MODES.items() if engine.bounds.merged in (None, mode.adapter)],
            "context_tokens": engine.bounds.tokens,
            "answers_at_once": service.rows,
        },
    }
