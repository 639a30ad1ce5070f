"""Whose turn it is, and who may change an engine's state."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """Threads have turns one at a time, in the order in which they asked.

    A thread that has a turn may ask for another within it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asking: deque[object] = deque()
        self._thread: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it."""
        mine, asking = threading.get_ident(), object()
        has_one = self._thread == mine
        try:  # from here on, so that an interrupt gives back what was taken
            if not has_one:
                with self._changed:
                    self._asking.append(asking)
                    while self._thread is not None or self._asking[0] is not asking:
                        self._changed.wait()
                    self._thread = mine
                    self._asking.popleft()
            yield
        finally:
            if not has_one:
                with self._changed:
                    if asking in self._asking:
                        self._asking.remove(asking)
                    if self._thread == mine:
                        self._thread = None
                    self._changed.notify_all()


class Guard:
    """A lock that a thread may take again, and that finalizers need not wait for.

    The garbage collector calls these anywhere: where the same thread is changing what they would change, or
    holds a lock that the one which has this lock waits for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self._depth:
            self._catch_up()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()
        self._try()

    def soon(self, action: Callable[[], None]) -> None:
        """Do something with the lock: now if it is free, else when it is, by who has it."""
        self._later.append(action)
        self._try()

    def _try(self) -> None:
        while self._later and self._lock.acquire(blocking=False):
            try:
                if self._depth:  # this thread is within
                    return
                self._catch_up()
            finally:
                self._lock.release()

    def _catch_up(self) -> None:
        self._depth += 1
        try:
            while self._later:
                self._later.popleft()()
        finally:
            self._depth -= 1
