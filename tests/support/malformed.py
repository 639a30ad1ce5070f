"""Requests that are wrong in many ways, by hypothesis; the benchmark of the server sends them too."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from losart.config.options import OPTIONS

OPENAI = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"),
    *("stop", "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "user"),
    *("logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "echo"),
    *("best_of", "suffix", "metadata", "store", "losart", "modalities", "reasoning_effort", "unheard_of"),
)
PATHS = ("/v1/chat/completions", "/v1/completions")
VALID = {
    PATHS[0]: {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    PATHS[1]: {"model": "tiny", "prompt": "hi", "max_tokens": 2},
}
NUMBERS = st.sampled_from(
    [
        *(-1, 0, 1, 3, -(2**31), 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**64), 10**30, 10**400),
        *(0.5, -0.5, 1.0, 1e-300, 1e300, -1e300, 5e-324),
        *(float("nan"), float("inf"), -float("inf")),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "auto", "none", "losa", "text", "user", "\0", "\ud800", "\U0001f600", "<|MASK|>", "a" * 5000]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(TEXTS, st.sampled_from(["role", "content", "type", "function", "name"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
LONG = {"max_tokens", "max_completion_tokens", "max_new_tokens", "n", "best_of"}  # whose numbers take time


def _changed(path: str) -> st.SearchStrategy[bytes]:
    """A request with one or two keys that are something else."""

    def make(changes: dict[str, Any]) -> bytes:
        for name in LONG & changes.keys():
            if isinstance(changes[name], int) and changes[name] > 3:
                changes[name] += 2**31
        return json.dumps(VALID[path] | changes).encode("utf-8", "surrogatepass")

    names = st.sampled_from(OPENAI + OPTIONS)
    return st.dictionaries(names, VALUES, min_size=1, max_size=2).map(make)


def _damaged(path: str) -> st.SearchStrategy[bytes]:
    """A request of which some bytes are others, or the end is missing."""
    whole = json.dumps(VALID[path]).encode()

    def make(places: list[tuple[int, int]], end: int) -> bytes:
        body = bytearray(whole)
        for place, value in places:
            body[place] = value
        return bytes(body[:end])

    place = st.tuples(st.integers(0, len(whole) - 3), st.integers(0, 255))  # not the number of tokens
    return st.builds(make, st.lists(place, max_size=3), st.integers(0, len(whole)))


def bodies(path: str) -> st.SearchStrategy[bytes]:
    """Bodies of requests, few of which are right."""
    deep = st.builds(
        lambda opening, depth: opening * depth,
        st.sampled_from([b"[", b'{"messages":', b'{"a":', b'[{"role":']),
        st.sampled_from([50, 199, 201, 5000, 100_000]),
    )
    any_json = VALUES.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    return st.one_of(_changed(path), _changed(path), _damaged(path), any_json, st.binary(max_size=40), deep)


def heads() -> st.SearchStrategy[bytes]:
    """What comes over a socket and is hardly HTTP."""
    names = st.sampled_from(
        [
            b"Content-Length",
            b"Transfer-Encoding",
            b"Content-Type",
            b"Expect",
            b"Host",
            b"Connection",
            b"Upgrade",
            b"X",
        ]
    )
    values = st.one_of(
        st.sampled_from(
            [
                b"-1",
                b"0",
                b"5",
                b"99999999999999999999999",
                b"chunked",
                b"gzip",
                b"100-continue",
                b"websocket",
                b"\xff",
            ]
        ),
        st.binary(max_size=12),
    )
    lines = st.lists(st.builds(lambda name, value: name + b": " + value, names, values), max_size=4)
    first = st.one_of(
        st.sampled_from(
            [
                b"POST /v1/completions HTTP/1.1",
                b"POST /v1/completions HTTP/9.9",
                b"GET /v1/models/%ff%00 HTTP/1.1",
                b"GET /v1/models/../../etc/passwd HTTP/1.0",
                b"GET " + b"/a" * 40_000 + b" HTTP/1.1",
                b"PRI * HTTP/2.0",
                b"",
            ]
        ),
        st.binary(max_size=40),
    )
    return st.builds(
        lambda begin, rest, body: b"\r\n".join([begin, *rest, b"", body]),
        first,
        lines,
        st.binary(max_size=20),
    )
