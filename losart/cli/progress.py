"""How far a long command has come, on standard error."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

from losart.api.model import Model, load
from losart.measure.random_checkpoint import write_size

Shown = TypeVar("Shown", bound="Progress")

QUIET_SECONDS = 60.0  # between lines that do not go to a terminal


class Progress:
    """How far something is, at which rate, and the time left.

    On a terminal one line that is redrawn, and cleared at the end; elsewhere one line per minute. As a
    context it also clears the line when it is left early.

    Parameters
    ----------
    doing : str
        What is done.
    unit : str
        What is counted, in the plural.
    """

    def __init__(self, doing: str, unit: str) -> None:
        self._doing = doing
        self._unit = unit
        self._terminal = sys.stderr.isatty()
        self._drawn = False
        self._began = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show how many are done, of how many in all."""
        if done >= total:
            self.clear()
        elif self._terminal or time.monotonic() - self._shown >= QUIET_SECONDS:
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        self._shown = time.monotonic()
        line = f"{self._doing}: {done} of {total} {self._unit}"
        if done:
            seconds = max(self._shown - self._began, 1e-9) / done
            pace = f"{seconds:.0f} s each" if seconds > 1 else f"{1 / seconds:.0f} a second"
            line += f", {pace}, {_duration(seconds * (total - done))} left"
        if self._terminal:
            line = f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}"
        print(line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._drawn = self._terminal

    def clear(self) -> None:
        """Clear the line on the terminal, for another one."""
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._drawn = False

    def __enter__(self: Shown) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


class Steps(Progress):
    """Progress in named steps, each shown as it begins, on a terminal or not.

    Parameters
    ----------
    count : int
        How many there will be.
    """

    def __init__(self, count: int) -> None:
        super().__init__("", "steps")
        self._count = count
        self._begun = 0

    def begin(self, step: str) -> None:
        """Show which step begins."""
        self._doing = step
        self._show(self._begun, self._count)
        self._begun += 1


def load_model(
    model: str | Path | None,
    device: str,
    dtype: str,
    weights: str = "auto",
    kv: str = "auto",
    adapter: str | None = None,
    merge: str = "dtype",
    activations: str = "auto",
) -> Model:
    """Load a checkpoint, with progress."""
    with Progress("loading the weights", "layers") as progress:
        held: dict[str, Any] = {"weights": weights, "kv": kv, "adapter": adapter, "merge": merge}
        return load(model, device, dtype, progress=progress, activations=activations, **held)


def write_weights(folder: Path, family: str, size: str | None, **options: Any) -> Path:
    """Write random weights of a size into a new subfolder, with progress; options as `write_size`'s."""
    size = size or ("0.6B" if family == "sdar" else "tiny")
    with Progress(f"writing random weights of {family} {size}", "MiB") as progress:
        to = folder / f"random-{family}-{size}"
        return write_size(to, size, family=family, progress=progress, **options)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
