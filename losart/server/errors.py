"""Errors as OpenAI's server gives them: a status, and an object that says what is wrong."""

from __future__ import annotations

import logging
import re
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from losart.config.options import OPTIONS
from losart.errors import CheckpointError, LosartError, NumericalError, OptionError, PromptError

UNKNOWN = "unknown_key"  # of pydantic's errors; their messages are the key
LONGEST_MESSAGE = 500  # characters: it may repeat what a request has
BRANCHES = {"str", "int", "float", "bool"}  # of unions, which are no part of a request
INVALID, SERVER, LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
logger = logging.getLogger("losart.server")


class ApiError(Exception):
    """What a request gets instead of an answer.

    Attributes
    ----------
    status : int
        Of HTTP.
    code : str or None
    headers : dict of str to str
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        message = message.encode("utf-8", "replace").decode()  # of half a surrogate pair
        self.object = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """As a response of HTTP."""
        return JSONResponse(self.object, self.status, self.headers)


def unsupported(param: str, message: str) -> ApiError:
    """A part of OpenAI's API that losart has not."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def of_validation(error: ValidationError) -> ApiError:
    """Of a body that is no request: its first mistake, by the branch of a union that comes furthest."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    root = _path(mistakes[0]["loc"])
    of_root = [one for one in mistakes if _path(one["loc"]).startswith(root)]
    first = max(of_root, key=lambda one: len(one["loc"]))
    kind, message, param = first["type"], first["msg"], _path(first["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body of the request is not JSON: {message}", code="invalid_json")
    if not param:
        return ApiError(400, "the body of the request must be a JSON object", code="invalid_json")
    if kind == "missing":
        message, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    elif kind == UNKNOWN:
        return unknown(f"{param}.{message}")
    else:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
        message = f"Invalid value for '{param}': {message}."
    return ApiError(400, message, param=param, code=code)


def unknown(param: str) -> ApiError:
    """A parameter that neither OpenAI's API nor losart has."""
    param = param[:LONGEST_MESSAGE]
    return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


def of_request(error: Exception) -> ApiError:
    """What became of a request before its first pass."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, PromptError):
        long = "tokens; the model has" in message or "leaves no room" in message
        return ApiError(400, message, code="context_length_exceeded" if long else "invalid_prompt")
    if isinstance(error, CheckpointError):  # of the chat template, which other messages suit
        return ApiError(400, f"the prompt cannot be made: {message}", param="messages", code="invalid_prompt")
    if isinstance(error, MemoryError) and isinstance(error, LosartError):  # it never fits
        return ApiError(400, message, code="context_length_exceeded")
    return of_generation(error)


def of_generation(error: Exception) -> ApiError:
    """What ended a generation on its way."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OptionError):  # a grammar's may come late
        named = re.match(r"\w+", str(error))
        param = named[0] if named and named[0] in OPTIONS else None
        return ApiError(400, str(error), param=param, code="invalid_value")
    if isinstance(error, MemoryError):
        return ApiError(503, f"the server has no memory left: {error}", code="out_of_memory", kind=SERVER)
    if isinstance(error, NumericalError):
        return ApiError(500, str(error), code="numerical_error", kind=SERVER)
    logger.error("a generation failed", exc_info=error)
    return ApiError(500, "the server had an error", code="internal_error", kind=SERVER)


def timed_out(seconds: float) -> ApiError:
    """A request that took too long."""
    message = f"the answer was not complete within {seconds:g} seconds"
    return ApiError(504, message, code="timeout", kind=SERVER)


def _path(location: tuple[Any, ...]) -> str:
    """Where in a request, as OpenAI's server says it: messages[0].content."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[a-z_]\w*", part) and part not in BRANCHES:
            path += f".{part}" if path else part
        elif not path:
            path = part[:LONGEST_MESSAGE]
    return path
