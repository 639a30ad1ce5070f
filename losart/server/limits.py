"""What comes before a request's route: its log, its key, and its body."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from typing import Any

import anyio
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from losart.server.errors import ApiError
from losart.server.metrics import Metrics
from losart.server.settings import Settings

OPEN_PATHS = ("/", "/health")  # without a key
logger = logging.getLogger("losart.server.requests")


class RequestLog:
    """Writes a line per request, when its answer has ended, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nobody was there to be answered
        noted: dict[str, Any] = {}
        scope.setdefault("state", {})["noted"] = noted

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.monotonic()
        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"]
            self._metrics.answered(path if path in self._paths else "other", status)
            facts = "".join(f" {name}={value}" for name, value in noted.items())
            seconds = time.monotonic() - began
            logger.info("%s %.200r %d %.3fs%s", scope["method"], path, status, seconds, facts)


class Keys:
    """Lets those in who have a key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, key = given.partition(b" ")
            # Each is compared, in a time that does not say how much of it is right.
            right = [hmac.compare_digest(key.strip(), one) for one in self._keys]
            if kind.lower() != b"bearer" or not any(right):
                message = "the request needs an API key of this server: Authorization: Bearer KEY"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, message, code="invalid_api_key", headers=headers)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def read_body(request: Request, settings: Settings) -> bytes:
    """A request's body, which must be JSON, and come in time.

    Raises
    ------
    ApiError
        It is too large, too slow, or of another type.
    ClientDisconnect
        The client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, "the Content-Type must be application/json", code="invalid_content_type")
    most = settings.largest_body
    close = {"Connection": "close"}  # what follows is not read
    large = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", headers=close)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise large
    body = bytearray()
    try:
        with anyio.fail_after(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise large
    except TimeoutError:
        message = f"the body was not complete within {settings.body_seconds:g} seconds"
        raise ApiError(408, message, code="timeout", headers=close) from None
    return bytes(body)
