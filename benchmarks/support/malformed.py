"""Requests that are wrong in many ways, drawn at random: few of them are right."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from losart.config.options import OPTIONS

OPENAI = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"),
    *("stop", "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "user"),
    *("logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "echo"),
    *("best_of", "suffix", "metadata", "store", "losart", "modalities", "reasoning_effort", "unheard_of"),
)
PATHS = ("/v1/chat/completions", "/v1/completions")
SCALARS: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, -(2**31), 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), 10**30),
    *(10**400, 0.5, -0.5, 1.0, 1e-300, 1e300, -1e300, 5e-324, float("nan"), float("inf"), -float("inf")),
    *("", "auto", "none", "losa", "text", "user", "\0", "\ud800", "\U0001f600", "<|MASK|>", "a" * 5000),
)
KEYS = ("role", "content", "type", "function", "name", "text", "arguments", "steps", "", "\ud800", "a" * 600)
LONG = {"max_tokens", "max_completion_tokens", "max_new_tokens", "n", "best_of"}  # whose numbers take time
DEPTHS = (50, 199, 201, 5000, 100_000)
HEADERS = (
    b"Content-Length: -1",
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: 99999999999999999999999",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip",
    b"Content-Type: application/json",
    b"Content-Type: \xff",
    b"Expect: 100-continue",
    b"Connection: close",
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Host: \0",
    b" folded: line",
    b"X" * 70_000,
)
BEGINNINGS = (
    b"POST /v1/completions HTTP/1.1",
    b"POST /v1/completions HTTP/9.9",
    b"GET /v1/models/%ff%00 HTTP/1.1",
    b"GET /v1/models/../../etc/passwd HTTP/1.0",
    b"GET " + b"/a" * 40_000 + b" HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"",
)


def valid(path: str, model: str) -> dict[str, Any]:
    """A request that is right, and short."""
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == PATHS[0] else {"prompt": "hi"}
    return {"model": model, **asked, "max_tokens": 2}


def body(random: Random, path: str, model: str) -> bytes:
    """A request's body."""
    kind = random.randrange(8)
    if kind < 4:
        return _json(_changed(random, valid(path, model)))
    if kind < 6:
        return _damaged(random, _json(valid(path, model)))
    if kind == 6:
        return _json(_value(random, 3))
    opening = random.choice([b"[", b'{"messages":', b'{"a":', b'[{"role":'])
    return opening * random.choice(DEPTHS)


def head(random: Random) -> bytes:
    """What comes over a socket and is hardly HTTP."""
    first = random.choice([*BEGINNINGS, random.randbytes(random.randrange(40))])
    lines = [random.choice(HEADERS) for _ in range(random.randrange(4))]
    return b"\r\n".join([first, *lines, b"", random.randbytes(random.randrange(20))])


def _changed(random: Random, request: dict[str, Any]) -> dict[str, Any]:
    """With one or two keys that are something else."""
    for _ in range(random.randrange(1, 3)):
        name = random.choice(OPENAI + OPTIONS)
        value = _value(random, 2)
        if name in LONG and (value is None or (isinstance(value, int) and value > 3)):
            value = 2**31 + (value or 0)  # too much, and not only much
        request[name] = value
    return request


def _damaged(random: Random, whole: bytes) -> bytes:
    """With some other bytes, or without the end."""
    damaged = bytearray(whole)
    for _ in range(random.randrange(3)):
        damaged[random.randrange(len(whole) - 2)] = random.randrange(256)  # not the number of tokens
    return bytes(damaged[: random.choice([len(whole), random.randrange(len(whole))])])


def _value(random: Random, depth: int) -> Any:
    kind = random.randrange(4) if depth else 0
    if kind < 2:
        return random.choice(SCALARS)
    values = [_value(random, depth - 1) for _ in range(random.randrange(4))]
    return values if kind == 2 else {random.choice(KEYS): value for value in values}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
