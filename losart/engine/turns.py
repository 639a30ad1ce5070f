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
        self._lock = threading.RLock()  # whose own `with` an interrupt cannot cut, other than a condition's
        self._changed = threading.Condition(self._lock)
        self._asking: deque[object] = deque()
        self._thread: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it."""
        mine, asking = threading.get_ident(), object()
        has_one = self._thread == mine
        try:  # from here on, so that an interrupt gives back what was taken
            if not has_one:
                with self._lock:
                    self._asking.append(asking)
                    while self._thread is not None or self._asking[0] is not asking:
                        self._changed.wait()
                    self._thread = mine
                    self._asking.popleft()
            yield
        finally:
            if not has_one:
                with self._lock:
                    if asking in self._asking:
                        self._asking.remove(asking)
                    if self._thread == mine:
                        self._thread = None
                    self._changed.notify_all()
