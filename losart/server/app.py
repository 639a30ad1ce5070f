"""The routes: what each gets, from the request to the response."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from losart.api.engine import Engine
from losart.api.model import Model
from losart.server import protocol
from losart.server.errors import SERVER, ApiError
from losart.server.exchange import Exchange
from losart.server.limits import Keys, RequestLog, read_body
from losart.server.page import about, page
from losart.server.service import Service
from losart.server.settings import Settings

GONE = 499  # the status in the log where the client went away


class Routes:
    """What each path gives."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())
        self._about = about(service.model, service.settings.options)
        self._page = page()

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions"""
        return await self._complete(request, protocol.ChatRequest)

    async def complete(self, request: Request) -> Response:
        """/v1/completions"""
        return await self._complete(request, protocol.CompletionRequest)

    async def _complete(self, request: Request, kind: type[protocol.Request]) -> Response:
        exchange = Exchange(self._service, request)
        try:
            body = await read_body(request, self._service.settings)
            return await exchange.response(protocol.parsed(kind, body))
        except ClientDisconnect:
            return Response(status_code=GONE)

    async def models(self, request: Request) -> Response:
        """/v1/models"""
        models = [self._model(name) for name in self._service.settings.names]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME"""
        name = request.path_params["name"]
        self._service.check_name(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        positions = self._service.model.config.max_positions
        made = {"id": name, "object": "model", "created": self._created, "owned_by": "losart"}
        return {**made, "max_model_len": positions, "losart": self._about}

    async def health(self, request: Request) -> Response:
        """/health"""
        alive, stats = self._service.driver.alive, self._service.engine.stats
        state = {"status": "ok" if alive else "stopped", "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(state, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """/metrics"""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._service.metrics.text(), media_type=kind)

    async def page(self, request: Request) -> Response:
        """/"""
        return self._page


def _of_http(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        message = f"there is nothing at {request.method} {request.url.path}"
    else:
        message = error.detail
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


def _of_bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server had an error", code="internal_error", kind=SERVER).response()


def make_app(model: Model, engine: Engine, settings: Settings) -> Starlette:
    """The server of a model, as an application of ASGI."""
    service = Service(model, engine, settings)
    answers = Routes(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.driver.start()
        yield
        await service.driver.stop()

    def route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        return Route(path, answer, methods=[method])

    routes = [
        route("/v1/chat/completions", answers.chat, "POST"),
        route("/v1/completions", answers.complete, "POST"),
        route("/v1/models", answers.models),
        route("/v1/models/{name:path}", answers.model),
        route("/health", answers.health),
        route("/metrics", answers.metrics),
        route("/", answers.page),
    ]
    paths = [one.path for one in routes]
    middleware = [Middleware(RequestLog, metrics=service.metrics, paths=paths)]
    if settings.origins:
        allowed = {"allow_origins": settings.origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, **allowed))
    if settings.api_keys:
        middleware.append(Middleware(Keys, keys=settings.api_keys))

    def of_api(request: Request, error: ApiError) -> Response:
        return error.response()

    handlers: dict[Any, Any] = {ApiError: of_api, HTTPException: _of_http, Exception: _of_bug}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
