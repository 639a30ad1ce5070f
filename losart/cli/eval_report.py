"""What `losart eval` shows while it measures, and what it writes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losart.cli.progress import Progress
from losart.cli.tables import share
from losart.eval.locality import KINDS, TOP
from losart.version import __version__


class JsonReport:
    """A JSON file of all cells so far, complete at any time; it does not exist before the first cell.

    Parameters
    ----------
    file : str or None
        None writes nothing.
    facts : dict
        What was measured.
    key : str
        Of the list of cells.
    done : sequence of dataclasses
        Cells that were measured earlier, which the file begins with when it is next written.
    """

    def __init__(
        self, file: str | None, facts: dict[str, Any], key: str = "cells", done: Sequence[Any] = ()
    ) -> None:
        self._file = Path(file) if file else None
        self._cells: list[dict[str, Any]] = [dataclasses.asdict(cell) for cell in done]
        self._report = {"losart": __version__, **facts, key: self._cells}
        if self._file is not None and (self._file.is_dir() or not self._file.parent.is_dir()):
            code = errno.EISDIR if self._file.is_dir() else errno.ENOENT
            raise OSError(code, os.strerror(code), str(self._file))

    def add(self, cell: Any) -> None:
        """Add a cell, a dataclass, and rewrite the file."""
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


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, its width, and its text for a row."""

    head: str
    width: int
    text: Callable[[Any], str]


class Table:
    """A table whose rows are printed, and written as JSON, as they come.

    Parameters
    ----------
    columns : sequence of Column
    report : JsonReport
    progress : Progress
        Is cleared before a row is printed.
    """

    def __init__(self, columns: Sequence[Column], report: JsonReport, progress: Progress) -> None:
        self._columns = columns
        self._report = report
        self._progress = progress
        self._begun = False

    def add(self, row: Any) -> None:
        """Add a row, a dataclass; the head is printed before the first."""
        self._report.add(row)
        self._progress.clear()
        if not self._begun:
            print("  ".join(f"{column.head:>{column.width}}" for column in self._columns))
        self._begun = True
        print("  ".join(f"{column.text(row):>{column.width}}" for column in self._columns), flush=True)


_SETTING = (
    Column("attention", 9, lambda row: row.attention),
    Column("budget", 6, lambda row: _or_dash(row.budget)),
    Column("active", 6, lambda row: _or_dash(row.active)),
)
_FIGURES = (
    Column("sparse", 6, lambda row: share(row.sparse_density)),
    Column("density", 7, lambda row: share(row.density)),
    Column("active", 6, lambda row: share(row.active_fraction)),
    Column("tokens/s", 8, lambda row: f"{row.tokens_per_second:.1f}"),
)
CELL_COLUMNS = (
    Column("length", 6, lambda row: str(row.length)),
    Column("task", 8, lambda row: row.task),
    *_SETTING,
    Column("accuracy", 8, lambda row: share(row.accuracy)),
    Column("95% interval", 15, lambda row: f"{row.low:.1%} - {row.high:.1%}"),
    *_FIGURES,
)
SCORE_COLUMNS = (
    Column("data set", 15, lambda row: row.dataset),
    *_SETTING,
    Column("questions", 9, lambda row: str(row.samples)),
    Column("F1", 6, lambda row: f"{row.f1:.2f}"),
    *_FIGURES,
)


def _share_of(name: str, key: str) -> Callable[[Any], str]:
    return lambda row: share(getattr(row, name)[key])


DIVERGENCE_COLUMNS = (
    Column("length", 6, lambda row: str(row.length)),
    *_SETTING,
    Column("positions", 9, lambda row: str(row.positions)),
    Column("mean KL", 9, lambda row: f"{row.mean:.2e}"),
    Column("99% KL", 9, lambda row: f"{row.high:.2e}"),
    Column("same token", 10, lambda row: share(row.agreement)),
    Column("sparse", 6, lambda row: share(row.sparse_density)),
    Column("active", 6, lambda row: share(row.active_fraction)),
)
LOCALITY_COLUMNS = (
    Column("layer", 5, lambda row: "all" if row.layer is None else str(row.layer)),
    Column("passes", 6, lambda row: str(row.passes)),
    *(Column(f"top {count}", 6, _share_of("top", str(count))) for count in TOP),
    *(Column(kind, len(kind), _share_of("change", kind)) for kind in KINDS),
    *(Column(f"top 5 {kind}", len(kind) + 6, _share_of("active", kind)) for kind in KINDS),
)
