"""Rows of figures as a Markdown table."""

from __future__ import annotations

from typing import Any

LENGTHS = ("prefix", "prompt")  # counted in K


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A table with one column per key, in the order in which keys first appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_lines(keys, [[cell(key, row.get(key)) for key in keys] for row in rows])


def markdown_lines(head: list[str], lines: list[list[str]]) -> str:
    """A table of texts under a head."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def cell(key: str, value: Any) -> str:
    """Three digits or so; "4.10x" for ratios, "2.5%" for what is read; why a figure is missing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("|", "/")[:60]
    if key in LENGTHS and value % 1024 == 0:
        return f"{value // 1024}K"
    if isinstance(value, int):
        return str(value)
    if key == "density" or key.endswith(" read"):
        return f"{value:.1%}"
    if "/" in key and not key.endswith("/s"):
        return f"{value:.2f}x"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
