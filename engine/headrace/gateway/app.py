"""Everything that is not inference: health, readiness, metrics, the list of models, and clear refusals."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException

from headrace.errors import HeadraceError, MethodNotAllowed, NotFound
from headrace.gateway import openai
from headrace.gateway.context import GatewayContext
from headrace.gateway.prefix_metrics import PrefixMetrics
from headrace.gateway.queue_measures import QueueCollector
from headrace.gateway.timed_router import DecisionMetrics


class Group(Protocol):
    """The gateway processes that share this one's port."""

    async def metrics(self) -> bytes:
        """Of all of them, in Prometheus's text."""

    async def decisions(self, last: int) -> list[dict[str, Any]]:
        """The last ones of all of them, newest first."""


def make_registry(context: GatewayContext, collectors: Iterable[Collector] = ()) -> CollectorRegistry:
    """Everything that this process measures; `collectors`: what /metrics shows besides the gateway's own."""
    registry = CollectorRegistry()
    own = (
        context.metrics,
        DecisionMetrics(context.router),
        PrefixMetrics(context),
        QueueCollector(context.admission),
    )
    for collector in (*own, *collectors):
        registry.register(collector)
    return registry


def build_app(
    context: GatewayContext, registry: CollectorRegistry | None = None, group: Group | None = None
) -> FastAPI:
    """The FastAPI app of one gateway. Where it is one of a `group`, any of them speaks for all."""
    app = FastAPI(title="Headrace", openapi_url=None, docs_url=None, redoc_url=None)
    registry = registry or make_registry(context)
    started = int(time.time())

    @app.middleware("http")
    async def name_request(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Every answer names its request, as those of the relay do."""
        given = request.headers.get("x-request-id")
        response = await call_next(request)
        response.headers["x-request-id"] = openai.request_id(given.encode() if given else None).decode()
        return response

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The gateway itself runs."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """200 when every model has a replica that takes requests, or one that comes when it is asked for and whose
        requests wait here, and the gateway is not draining: a fleet that sleeps at zero is not out of order."""
        router, coming = context.router, context.membership.coming
        models = {model: len(router.eligible(model)) for model in router.models()}
        is_ready = bool(models) and not context.draining
        is_ready &= all(count or model in coming for model, count in models.items())
        body = {"ready": is_ready, "replicas": models, "coming": list(coming)}
        return JSONResponse(body, status_code=200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(registry) if group is None else await group.metrics()
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_card(context, model, started) for model in _served_models(context)],
        }

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model not in _served_models(context):
            if not model:
                return await models()
            raise HTTPException(404, openai.unknown_model(model, context.router.models()))
        return _card(context, model, started)

    @app.get("/headrace/decisions")
    async def decisions(request: Request, last: int = 10) -> dict[str, Any]:
        """What `headrace explain` shows; only for this machine, since it names replicas and their loads."""
        if request.client is None or not ip_address(request.client.host).is_loopback:
            raise HTTPException(404)
        latest = context.decisions.latest(last) if group is None else await group.decisions(last)
        return {"policy": context.router.policy.name, "decisions": latest}

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        known: HeadraceError
        if error.status_code == 405 or request.url.path.encode() in openai.INFERENCE_PATHS:
            known = MethodNotAllowed(f"{request.method} is not allowed on {request.url.path}")
        elif error.detail == "Not Found":
            known = NotFound(f"no such path: {request.method} {request.url.path}")
        else:
            known = NotFound(str(error.detail))
            known.code, known.param = "model_not_found", "model"
        response = _error_response(known)
        if known.status == 405:
            is_inference = request.url.path.encode() in openai.INFERENCE_PATHS
            response.headers["allow"] = "POST" if is_inference else "GET"
        return response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return _error_response(openai.as_headrace_error(error))

    return app


def _served_models(context: GatewayContext) -> list[str]:
    """Those that have a replica, or get one when they are asked for."""
    router, coming = context.router, context.membership.coming
    return [model for model in router.models() if router.eligible(model) or model in coming]


def _card(context: GatewayContext, model: str, started: int) -> dict[str, Any]:
    lengths = [load.replica.max_model_len for load in context.router.eligible(model)]
    known = [length for length in lengths if length is not None]
    return {
        "id": model,
        "object": "model",
        "created": started,
        "owned_by": "headrace",
        "max_model_len": min(known) if known else None,
    }


def _error_response(error: HeadraceError) -> Response:
    return Response(openai.error_body(error), error.status, media_type="application/json")
