"""A generation on its way, as an iterator over its steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from losart.errors import LosartError
from losart.observe.step import GenerationResult, Step


class Stream:
    """A generation on its way: an iterator over its steps, one per denoising pass.

    It may be left before its end.

    Parameters
    ----------
    steps : iterator of Step
        The last one has the result.
    start : callable, optional
        Lets the generation take part in passes that other streams ask for, from now on and not from the
        first step on that is asked for.
    close : callable, optional
        Frees what `start` holds.
    ready : callable, optional
        Whether the next step can be had without a pass.
    """

    def __init__(
        self,
        steps: Iterator[Step],
        start: Callable[[], None] | None = None,
        close: Callable[[], None] | None = None,
        ready: Callable[[], bool] | None = None,
    ) -> None:
        self._steps = steps
        self._start = start
        self._ready = ready
        self._close = None if close is None else weakref.finalize(self, close)
        self._last: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._last = next(self._steps)
        return self._last

    def start(self) -> None:
        """Take part in passes that other streams of the engine ask for."""
        if self._start is not None:
            self._start()

    @property
    def ready(self) -> bool:
        """Whether asking for the next step runs no pass: it is there, or none follows."""
        return self._ready is not None and self._ready()

    def result(self) -> GenerationResult:
        """Run what is left to the end; may be called again.

        Raises
        ------
        LosartError
            It was closed before its end.
        """
        for _ in self:
            pass
        if self._last is None or self._last.result is None:
            raise LosartError("the stream was closed before its end")
        return self._last.result

    def close(self) -> None:
        """Leave it, from any thread; memory that it holds is free for others."""
        self._steps = iter(())
        if self._close is not None:
            self._close()

    def cancel(self) -> None:
        """The same as `close`."""
        self.close()
