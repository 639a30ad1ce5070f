"""How far a long command is, on standard error."""

from __future__ import annotations

import sys
import time


class Progress:
    """Numbered steps, with the time left as far as the steps before tell.

    Parameters
    ----------
    steps : int
        How many there will be.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._begun = 0
        self._start = time.monotonic()

    def begin(self, step: str) -> None:
        """Say which step begins."""
        left = ""
        if self._begun > 1:  # the first step alone tells too little
            seconds = (time.monotonic() - self._start) / self._begun * (self._steps - self._begun)
            left = f", about {duration(seconds)} left"
        self._begun += 1
        print(f"[{self._begun}/{self._steps}] {step}{left}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """12 s, 3 min."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
