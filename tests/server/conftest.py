"""A model that chats, at random, and a server of it; tests are skipped where the extras are missing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import losart

if TYPE_CHECKING:
    from served import Served

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks, after all that is installed


@pytest.fixture(scope="session")
def model(tiny_checkpoint) -> losart.Model:
    for name in ("starlette", "uvicorn", "pydantic", "prometheus_client", "httpx"):
        pytest.importorskip(name)
    return losart.load(tiny_checkpoint, "cpu")


@pytest.fixture(scope="module")
def server(model) -> Iterator[Served]:
    from served import served

    with served(model) as one:
        yield one


@pytest.fixture
def ask(server) -> Callable[..., tuple[int, Any]]:
    """POST JSON, and get the status and the object."""
    import httpx

    def ask(path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
        prompt = {"prompt": [1, 2, 3]} if path == "/v1/completions" else {}
        response = httpx.post(server.url + path, json={"model": "tiny", **prompt, **body}, timeout=60)
        return response.status_code, response.json()

    return ask
