"""What `losart eval` shows while it measures, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import losart
from losart.eval import Cell


class JsonReport:
    """A JSON file that has all cells so far, at any time whole.

    Parameters
    ----------
    file : str or None
        None writes nothing.
    facts : dict
        What was measured.
    key : str
        Of the list of cells.
    """

    def __init__(self, file: str | None, facts: dict[str, Any], key: str = "cells") -> None:
        self._file = Path(file) if file else None
        self._cells: list[dict[str, Any]] = []
        self._report = {"losart": losart.__version__, **facts, key: self._cells}
        self._write()

    def add(self, cell: Any) -> None:
        """Take a cell, a dataclass, and write the file anew."""
        self._cells.append(dataclasses.asdict(cell))
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        text = json.dumps(self._report, indent=2, ensure_ascii=False) + "\n"
        if not self._file.exists() or self._file.is_file():
            part = self._file.with_name(f"{self._file.name}.part")
            part.write_text(text, encoding="utf-8")
            os.replace(part, self._file)
        else:  # such as /dev/stdout
            self._file.write_text(text, encoding="utf-8")


class CellTable:
    """A table whose rows are printed as they come."""

    HEAD = (
        f"{'length':>6}  {'task':10} {'attention':10} {'budget':>6} {'active':>6}  {'accuracy':>8} "
        f"{'95% interval':>15}  {'sparse':>7} {'density':>7} {'active':>7} {'tokens/s':>8}"
    )

    def __init__(self) -> None:
        self._begun = False

    def print(self, cell: Cell) -> None:
        """Print a row, and the head before the first."""
        if not self._begun:
            print(self.HEAD, flush=True)
        self._begun = True
        interval = f"{cell.low:.1%} - {cell.high:.1%}"
        print(
            f"{cell.length:6}  {cell.task:10} {cell.attention:10} {_or_dash(cell.budget):>6} "
            f"{_or_dash(cell.active):>6}  {cell.accuracy:8.1%} {interval:>15}  "
            f"{share(cell.sparse_density):>7} {share(cell.density):>7} {share(cell.active_fraction):>7} "
            f"{cell.tokens_per_second:8.1f}",
            flush=True,
        )


class TimeLeft:
    """Shows on standard error how far a measurement is: in one line on a terminal, else a line a minute."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown = self._began

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._terminal and now - self._shown < 60 and done < total:
            return
        self._shown = now
        text = f"question {done} of {total}, {_duration((now - self._began) / done * (total - done))} left"
        print(
            f"\r\033[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr
        )
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room on the terminal for a line on standard output."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def share(value: float | None) -> str:
    """A share in percent, a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
