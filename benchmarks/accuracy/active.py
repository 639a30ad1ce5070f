"""How many tokens of a block are active in a layer of LoSA's later passes, by its defaults.

    python -m benchmarks.accuracy.active --json FILE
    python -m benchmarks.accuracy.active --grid english --json FILE

The study's model answers its questions; a row per way of remasking and length.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import losart
from benchmarks.accuracy.grid import GRIDS, Grid, remaskings
from benchmarks.support.environment import command, commit
from benchmarks.support.markdown_table import markdown_table
from losart.cli.arguments import listed, positive
from losart.errors import LosartError
from losart.eval import TASKS
from losart.eval.evaluation import ANSWER_TOKENS
from losart.eval.questions import make_questions
from losart.measure.environment import environment

BUDGET = 128
GROUPS = {"0": (0,), "1": (1,), "2": (2,), "3-4": (3, 4), "5-8": range(5, 9), "9-16": range(9, 17)}


def row(
    model: losart.Model, grid: Grid, remasking: dict[str, Any], candidates: str, length: int, samples: int
) -> dict[str, Any]:
    """Shares of layers of later passes with so many active tokens, and their mean."""
    counts: Counter[int] = Counter()

    def observe(step: losart.Step) -> None:
        if step.kind == "later":
            counts.update(len(layer.active) for layer in step.layers)

    options = {"attention": "losa", "budget": BUDGET, "candidates": candidates, **remasking}
    session = model.session(max_new_tokens=ANSWER_TOKENS[grid.style], **options)
    for task in grid.groups["dynamic"].tasks:
        for question in make_questions(model, TASKS[task], length, samples, 0, grid.style):
            session.generate(question.prompt, observer=observe)
    layers = counts.total()
    if not layers:  # each block was fixed by its first pass
        return {"layers": 0}
    shares = {name: sum(counts[count] for count in group) / layers for name, group in GROUPS.items()}
    return {"layers": layers, "mean": sum(count * n for count, n in counts.items()) / layers, **shares}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--device", default="auto", help="(auto)")
    parser.add_argument("--grid", choices=GRIDS, default="symbols", help="(symbols)")
    parser.add_argument("--lengths", type=listed(int), default=(), metavar="LIST", help="(the grid's)")
    parser.add_argument(
        "--samples", type=positive, default=20, metavar="N", help="questions of each task (20)"
    )
    args = parser.parse_args()
    grid = GRIDS[args.grid]
    try:
        model = losart.load(grid.model, args.device)
        facts = {"device": environment()["gpu" if model.device == "cuda" else "cpu"]["name"]}
        facts |= {"commit": commit(), "command": command(__file__), "samples": args.samples, "budget": BUDGET}
        rows = []
        for (name, (_, remasking)), candidates in (
            (way, c) for way in remaskings(grid.block).items() for c in ("all", "masked")
        ):
            for length in args.lengths or grid.lengths:
                where = {"remasking": name, "candidates": candidates, "length": length}
                rows.append(where | row(model, grid, remasking, candidates, length, args.samples))
                print(rows[-1], flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", "utf-8")
        print(markdown_table(rows))
    except (LosartError, OSError) as error:
        print(f"losart: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
