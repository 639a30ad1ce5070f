"""A server in a thread, for tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from losart.api.engine import Engine
from losart.server.app import make_app
from losart.server.serving import listen, make_server, serve, url
from losart.server.settings import Settings

SETTINGS = {"names": ("tiny",), "options": {"max_new_tokens": 12, "stop_token_ids": []}}


@dataclass
class Served:
    """Where it is, and the engine behind it."""

    url: str
    engine: Engine

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)


@contextmanager
def served(
    model: Any, engine: Engine | None = None, connections: int = 1000, **settings: Any
) -> Iterator[Served]:
    """Serve a model until the block ends; settings as of `Settings`."""
    engine = engine or Engine(model)
    app = make_app(model, engine, Settings(**SETTINGS | settings))
    server, listener = make_server(app, connections, grace=20), listen("127.0.0.1", 0)
    thread = threading.Thread(target=serve, args=(server, listener))
    where = url(listener)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Served(where, engine)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def eventually(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def post(body: bytes, path: str = "/v1/completions", headers: str = "") -> bytes:
    """A request as it goes over a socket; the connection is closed after it."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)
