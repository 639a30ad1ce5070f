"""Whose turn it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Threads have turns one at a time, in the order in which they asked.

    A thread that has a turn may ask for another within it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asking: deque[object] = deque()
        self._thread: int | None = None
        self._depth = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it."""
        with self._changed:
            if self._thread != threading.get_ident():
                self._wait()
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._thread = None
                self._changed.notify_all()

    def _wait(self) -> None:
        asking = object()
        self._asking.append(asking)
        try:
            while self._thread is not None or self._asking[0] is not asking:
                self._changed.wait()
            self._thread = threading.get_ident()
        finally:
            self._asking.remove(asking)
            self._changed.notify_all()
