"""Tables and pictures of what `study.py` measured, and of `losart eval --locality`.

    python -m benchmarks.accuracy.report benchmarks/results/accuracy.json

writes accuracy.md and pictures beside the JSON; with --locality FILE also those of its locality.
Pictures need matplotlib: pip install 'losart[plot]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy.grid import GRIDS, Grid, Group, cell_key, label
from benchmarks.accuracy.pictures import draw_accuracy, draw_locality
from benchmarks.support.markdown_table import markdown_lines
from losart.cli.tables import share
from losart.errors import DataError, LosartError
from losart.eval import TASKS
from losart.eval.figures import mean
from losart.eval.locality import KINDS, TOP

Cells = dict[str, dict[str, Any]]  # by `cell_key`


def read(file: Path, key: str) -> dict[str, Any]:
    """A report with a list under `key` that is not empty."""
    try:
        report = json.loads(file.read_text("utf-8"))
        measured = bool(report[key])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} has no {key}") from error
    if not measured:
        raise DataError(f"{file} has no {key} yet")
    return dict(report)


def markdown(report: dict[str, Any]) -> str:
    """All groups' tables, for each length."""
    cells = {cell_key(cell["task"], cell["length"], cell["setting"]): cell for cell in report["cells"]}
    grid = grid_of(report)
    commits = ", ".join(sorted({cell["commit"] for cell in report["cells"]}))
    parts = [
        "# Accuracy of attention methods\n\n"
        f"{report['samples']} questions per cell, answered by {grid.title}, in "
        f"blocks of {grid.block}, greedily, with dynamic remasking unless stated otherwise. Percent "
        "answered right, with 95% intervals (Wilson); density of the passes that are read sparsely, and of "
        f"all, means over the tasks shown.\n\n{report['device_name']}, {report['dtype']}, commit {commits}: "
        f"`{report['command']}`\n"
    ]
    for length in sorted({cell["length"] for cell in report["cells"]}):
        parts += [
            f"## {group.title}, {length:,} tokens\n\n{group.note}\n\n{rows}"
            for group in grid.groups.values()
            if (rows := table(group, length, cells, grid.block))
        ]
    return "\n".join(parts)


def grid_of(report: dict[str, Any]) -> Grid:
    """That a study's report is of; the first study's does not say."""
    return GRIDS[report.get("grid", "symbols")]


def table(group: Group, length: int, cells: Cells, block: int) -> str:
    """A row for each setting of which a cell was measured; empty without any. `block` as of `label`."""
    lines = []
    for setting in sorted(group.settings, key=lambda one: one.get("budget", 0)):
        row = [cells.get(cell_key(task, length, setting)) for task in group.tasks]
        measured = [cell for cell in row if cell is not None]
        if measured:
            densities = [mean(cell[name] for cell in measured) for name in ("sparse_density", "density")]
            lines.append([label(setting, block), *map(accuracy, row), *map(share, densities)])
    if not lines:
        return ""
    head = ["setting", *(f"`{task}`" for task in group.tasks), "sparse", "density"]
    return markdown_lines(head, lines)


def accuracy(cell: dict[str, Any] | None) -> str:
    """With its interval; empty where it has not been measured."""
    if cell is None:
        return ""
    low, right, high = (100 * cell[name] for name in ("low", "accuracy", "high"))
    return f"{right:.1f} ({low:.1f} - {high:.1f})"


def locality_markdown(report: dict[str, Any], picture: str) -> str:
    """One row per layer."""
    head = ["layer", *(f"top {count}" for count in TOP), *KINDS]
    lines = [
        [
            "all" if layer["layer"] is None else str(layer["layer"]),
            *(share(layer["top"][str(count)]) for count in TOP),
            *(share(layer["change"][kind]) for kind in KINDS),
        ]
        for layer in report["layers"]
    ]
    text, model = report.get("text"), report["model"]
    of = f"pieces of {Path(text).name} per length" if text else "questions per task and length"
    command = "losart eval --locality" if model == "small_checkpoint" else f"losart eval {model} --locality"
    note = (
        "# Locality\n\nShare of the queries' change from pass to pass in the tokens of a block that changed "
        "most, and in each kind of token ([what the columns mean](../../docs/guide/evaluating.md#locality)). "
        f"`{command}`, {report['samples']} {of}, on the CPU, "
        f"{report['dtype']}, options {report['options']}.\n\n![locality]({picture})\n\n"
    )
    return note + markdown_lines(head, lines)


def write_accuracy(file: Path) -> None:
    """Tables, and a picture for each length."""
    report = read(file, "cells")
    text = markdown(report)
    budgets = grid_of(report).groups["budgets"]
    for length in sorted({cell["length"] for cell in report["cells"]}):
        tasks = [task for task in TASKS if task in budgets.tasks]
        picture = file.with_name(f"{file.stem}_{length}.png")
        draw_accuracy(report["cells"], budgets.settings, tasks, length).savefig(picture)
        text += f"\n![accuracy against density, {length} tokens]({picture.name})\n"
        print(picture)
    file.with_suffix(".md").write_text(text, "utf-8")
    print(file.with_suffix(".md"))


def write_locality(file: Path) -> None:
    """A table and a picture."""
    report = read(file, "layers")
    picture = file.with_suffix(".png")
    draw_locality(report["layers"]).savefig(picture)
    file.with_suffix(".md").write_text(locality_markdown(report, picture.name), "utf-8")
    print(file.with_suffix(".md"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="JSON of the study")
    parser.add_argument("--locality", type=Path, metavar="FILE", help="JSON of losart eval --locality")
    args = parser.parse_args()
    if args.file is None and args.locality is None:
        parser.error("give FILE or --locality FILE")
    try:
        if args.file is not None:
            write_accuracy(args.file)
        if args.locality is not None:
            write_locality(args.locality)
    except (LosartError, OSError) as error:
        print(f"losart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
