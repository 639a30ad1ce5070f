"""The routes: what each gets, from the request to the response."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from losart.api.engine import Engine
from losart.api.model import Model
from losart.loaders.tokenizer import prompt_ids
from losart.observe.step import GenerationResult
from losart.server import protocol, tools
from losart.server.answers import Writer
from losart.server.driver import Answers, Driver, Event, Submission
from losart.server.errors import SERVER, ApiError, of_generation, of_request, timed_out
from losart.server.limits import Keys, RequestLog, read_body
from losart.server.metrics import Metrics
from losart.server.page import about, page
from losart.server.settings import Settings

GONE = 499  # the status in the log where the client went away
GRACE = 30.0  # seconds beyond a request's, for a client that reads slowly
Answer = TypeVar("Answer")


class Service:
    """One model, its engine, and what answers requests with them."""

    def __init__(self, model: Model, engine: Engine, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.engine = engine
        self.driver = Driver(engine, settings.queue)
        self.metrics = Metrics(engine)
        self._created = int(time.time())
        self._about = about(model, settings.options)
        self._page = page()

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions"""
        return await self._complete(request, protocol.ChatRequest)

    async def complete(self, request: Request) -> Response:
        """/v1/completions"""
        return await self._complete(request, protocol.CompletionRequest)

    async def models(self, request: Request) -> Response:
        """/v1/models, /v1/models/NAME"""
        models = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "losart",
                "max_model_len": self.model.config.max_positions,
                "losart": self._about,
            }
            for name in self.settings.names
        ]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": models})
        self.check_name(name)
        return JSONResponse(models[self.settings.names.index(name)])

    async def health(self, request: Request) -> Response:
        """/health"""
        alive, stats = self.driver.alive, self.engine.stats
        state = {"status": "ok" if alive else "stopped", "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(state, 200 if alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        """/metrics"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        """/"""
        return self._page

    def check_name(self, name: str) -> None:
        if name not in self.settings.names:
            message = f"The model '{name}' does not exist; there is: {', '.join(self.settings.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _complete(self, request: Request, kind: type[protocol.Request]) -> Response:
        exchange = Exchange(self, request)
        try:
            return await exchange.response(protocol.parsed(kind, await read_body(request, self.settings)))
        except ClientDisconnect:
            return Response(status_code=GONE)

    def submissions(self, asked: protocol.Request) -> list[Submission]:
        """The generations that a request asks for; takes as long as its prompts are."""
        model, longest = self.model, self.settings.longest_prompt
        if (offered := asked.offered) is not None:
            tools.check_template(model.chat_template)
        options, made = asked.options(model.config, self.settings.options), list[Submission]()
        for prompt in asked.prompts:
            ids = prompt_ids(prompt, model.config, model.tokenizer, model.chat_template, offered)
            if longest is not None and len(ids) > longest:
                message = f"the prompt has {len(ids)} tokens; this server takes {longest}"
                raise ApiError(400, message, code="context_length_exceeded")
            for choice in range(asked.choices):
                seed = options.get("seed")
                own = {} if seed is None else {"seed": (seed + choice) % protocol.SEEDS}
                made.append(Submission(ids, options | own))
        return made


class Exchange:
    """A request that is being answered."""

    def __init__(self, service: Service, request: Request) -> None:
        self._service = service
        self._request = request
        self._noted = request.state.noted
        self._arrived = time.monotonic()
        self._before = 0.0  # seconds until its generations were under way
        self._results: dict[int, GenerationResult] = {}
        self._prompts = 1

    async def response(self, asked: protocol.Request) -> Response:
        """What answers a request; of a stream the beginning."""
        service = self._service
        service.check_name(asked.model)
        self._prompts = len(asked.prompts)
        streams, settings = bool(asked.stream), service.settings
        if settings.log_prompts:
            self._noted["prompts"] = json.dumps(asked.prompts)

        def prepare() -> list[Submission]:
            return service.submissions(asked)

        count = self._prompts * asked.choices
        try:
            answers = await service.driver.submit(count, prepare, streams, asked.extra.steps)
        except ApiError:
            raise
        except Exception as error:
            raise of_request(error) from error
        self._before = time.monotonic() - self._arrived
        events = aiter(answers)
        writer = Writer(asked, asked.model, service.model.tokenizer, answers.prompt_tokens)
        self._noted["id"] = writer.id
        try:
            if streams:
                first = await self._unless_gone(self._next(events))
                return EventStream(self._chunks(first, events, writer), self, answers)
            await self._unless_gone(self._all(events))
            self.end(answers)
        except BaseException as error:
            self.end(answers, error)
            raise
        return JSONResponse(writer.whole(self._in_order(), self._prompts))

    @property
    def seconds_left(self) -> float:
        """Until the answer must be complete."""
        return max(0.0, self._arrived + self._service.settings.seconds - time.monotonic())

    def _in_order(self) -> list[GenerationResult]:
        return [self._results[index] for index in sorted(self._results)]

    async def _unless_gone(self, answer: Awaitable[Answer]) -> Answer:
        """Wait for something while the client does."""
        got, failed = list[Answer](), list[Exception]()
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await self._request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            async def wait() -> None:
                try:
                    got.append(await answer)
                except Exception as error:  # which the group would put into one of its own
                    failed.append(error)
                group.cancel_scope.cancel()

            group.start_soon(watch)
            group.start_soon(wait)
        if failed:
            raise failed[0]
        if not got:
            raise ClientDisconnect()
        return got[0]

    async def _next(self, events: AsyncIterator[Event]) -> Event | None:
        """The next event, in time; None after the last one."""
        try:
            with anyio.fail_after(self.seconds_left):
                event = await anext(events, None)
        except TimeoutError:
            raise timed_out(self._service.settings.seconds) from None
        if event is not None and event.error is not None:
            self._service.metrics.ended("error")
            raise of_generation(event.error)
        if event is not None and event.step is not None and event.step.result is not None:
            self._results[event.choice] = event.step.result
            took = time.monotonic() - self._arrived
            self._service.metrics.finished(event.step.result, self._before, took)
        return event

    async def _all(self, events: AsyncIterator[Event]) -> None:
        while await self._next(events) is not None:
            pass

    async def _chunks(
        self, event: Event | None, events: AsyncIterator[Event], writer: Writer
    ) -> AsyncIterator[str]:
        """A stream's events of SSE."""
        try:
            while event is not None and event.step is not None:
                if (chunk := writer.chunk(event.choice, event.step, event.passes)) is not None:
                    yield _sse(chunk)
                event = await self._next(events)
        except ApiError as error:  # too late for a status
            self._noted["error"] = error.code
            yield _sse(error.object)
            return
        if (last := writer.last_chunk(self._in_order(), self._prompts)) is not None:
            yield _sse(last)
        yield "data: [DONE]\n\n"

    def end(self, answers: Answers, error: BaseException | None = None) -> None:
        """Free what is left, and note what the answer came to."""
        if isinstance(error, ApiError):
            self._noted["error"] = error.code
        if left := answers.left:
            answers.cancel()
            reason = "timeout" if self._noted.get("error") == "timeout" else "cancelled"
            self._service.metrics.ended(reason, left)
            self._noted[reason] = left
        if results := self._in_order():
            self._noted |= {
                "prompt": sum(one.stats.prompt_tokens for one in results),
                "reused": sum(one.stats.reused_tokens for one in results),
                "new": sum(one.stats.new_tokens for one in results),
                "finish": ",".join(one.finish_reason for one in results),
            }
            first = [one.stats.first_token_seconds for one in results if one.stats.first_token_seconds]
            if first:
                self._noted["first_token"] = f"{self._before + min(first):.3f}s"
            if self._service.settings.log_prompts:
                self._noted["answers"] = json.dumps([one.text for one in results])


class EventStream(StreamingResponse):
    """A stream of SSE that frees its generations however it ends."""

    def __init__(self, chunks: AsyncIterator[str], exchange: Exchange, answers: Answers) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._exchange = exchange
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            with anyio.move_on_after(self._exchange.seconds_left + GRACE):
                await super().__call__(scope, receive, send)
        finally:
            self._exchange.end(self._answers)


def _sse(values: Any) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


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

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.driver.start()
        yield
        await service.driver.stop()

    def route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
        return Route(path, answer, methods=[method])

    routes = [
        route("/v1/chat/completions", service.chat, "POST"),
        route("/v1/completions", service.complete, "POST"),
        route("/v1/models", service.models),
        route("/v1/models/{name:path}", service.models),
        route("/health", service.health),
        route("/metrics", service.show_metrics),
        route("/", service.page),
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
