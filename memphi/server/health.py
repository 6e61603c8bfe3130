"""GET /health, /metrics and /memory: how the server is, for machines that watch it and for the page."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from memphi.engine.facade import DeviceEngine
from memphi.memory.devices import this_machine
from memphi.server.errors import RETRY_SECONDS
from memphi.server.service import service_of

router = APIRouter()


@router.get("/health")
async def show_health(http: HttpRequest) -> Response:
    """200 when requests are answered, 503 while the model is loaded and while the server shuts down.

    One engine of several is enough; 503 too where all have ended too often to be started again now.
    """
    service = service_of(http)
    lost = service.state == "ready" and all(engine.state == "failed" for engine in service.engines)
    state = "failed" if lost else service.state
    ready = state == "ready"
    health: dict[str, Any] = {
        "live": True,
        "ready": ready,
        "state": state,
        "loaded_bytes": service.loaded_bytes,
        "total_bytes": service.total_bytes,
    }
    if len(service.engines) > 1:
        health["engines"] = [{"device": engine.device, "state": engine.state} for engine in service.engines]
    headers = {} if ready else {"Retry-After": str(RETRY_SECONDS)}
    return JSONResponse(health, 200 if ready else 503, headers)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
async def show_metrics(http: HttpRequest) -> Response:
    """All counters, for Prometheus."""
    return Response(service_of(http).metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/memory")
async def show_memory(http: HttpRequest) -> dict[str, Any]:
    """The budget: the plan, what each account holds now, and the host's own memory. All in bytes.

    Of several devices, the first two for each, under `engines`.
    """
    engines, host = service_of(http).engine.engines, this_machine()
    budgets = [_budget(engine) for engine in engines]
    devices = [{"device": engine.device} | budget for engine, budget in zip(engines, budgets, strict=True)]
    return {
        **({"engines": devices} if len(engines) > 1 else budgets[0]),
        "host": {"total_bytes": host.total_bytes, "free_bytes": host.free_bytes},
    }


def _budget(engine: DeviceEngine) -> dict[str, Any]:
    """One device's memory."""
    plan, stats = engine.plan, engine.stats
    sizes = {name: value for name, value in asdict(plan).items() if isinstance(value, int)}
    return {
        "plan": {**sizes, "reasons": plan.reasons},
        "accounts": stats.accounts,
        "mapped_bytes": stats.mapped_bytes,
    }
