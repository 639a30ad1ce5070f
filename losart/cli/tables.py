"""Facts on the terminal: rows of a table, and numbers that are easy to read."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def print_rows(rows: Sequence[tuple[str, object]]) -> None:
    """Print names and values in two columns, long values over several lines."""
    column = max(len(name) for name, _ in rows) + 2
    width = max(shutil.get_terminal_size().columns, 2 * column)
    wrap = textwrap.TextWrapper(
        width, subsequent_indent=" " * column, break_long_words=False, break_on_hyphens=False
    )
    for name, value in rows:
        print(wrap.fill(f"{name:{column}}{value}"))


def size(count: float) -> str:
    """A number of bytes in the unit that suits it: 3 bytes, 1.5 GiB."""
    for unit in UNITS:
        if count < 1024 or unit == UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def formats(sizes: Mapping[str, int]) -> str:
    """Bytes by format: bfloat16 (1.1 GiB), int8 (148.5 MiB)."""
    return ", ".join(f"{name} ({size(count)})" for name, count in sizes.items())


def share(value: float | None) -> str:
    """A share in percent, a dash where there is none."""
    return "-" if value is None else f"{value:.1%}"
