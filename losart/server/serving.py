"""The server's process: a socket, uvicorn, and an end that lets running answers end."""

from __future__ import annotations

import logging
import resource
import signal
import socket
import sys
import threading

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE = 30  # seconds; longer than clients keep idle connections
BACKLOG = 2048
SWITCH_SECONDS = 0.0005  # until asyncio's thread gives way to that of the passes, after each of its kernels
OTHER_FILES = 64  # that a process has open beside connections


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; of port 0 the system chooses one.

    Raises
    ------
    OSError
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def url(listener: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: ASGIApp, connections: int, grace: float | None) -> uvicorn.Server:
    """The server of an application.

    Parameters
    ----------
    app : application of ASGI
    connections : int
        At a time; more get a 503.
    grace : float, optional
        Seconds that running answers have to end once the server is asked to.
    """
    _allow_files(connections + OTHER_FILES)
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=connections + 1,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=None if grace is None else max(1, round(grace)),
    )
    return uvicorn.Server(config)


def serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve until a signal: then no connection is taken any more, and running answers end."""
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises it again once it has ended, when there is nothing left to do.
        signal.signal(signal.SIGTERM, lambda *_: None)
    sys.setswitchinterval(SWITCH_SECONDS)
    server.run([listener])


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count and soft != resource.RLIM_INFINITY:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
