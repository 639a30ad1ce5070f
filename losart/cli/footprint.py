"""`losart footprint`: what losart takes, beside torch + transformers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from losart.cli.arguments import add_model_or_size, positive
from losart.cli.progress import Steps, write_weights
from losart.footprint.comparison import compare, step_count
from losart.footprint.table import markdown
from losart.loaders import open_checkpoint

EXAMPLE = "example: losart footprint path/to/SDAR-1.7B-Chat --json footprint.json --table footprint.md"


def add_command(commands: Any) -> None:
    """Add this command to the subparsers of `losart`."""
    command = commands.add_parser(
        "footprint",
        help="compare size, memory and start with torch + transformers",
        description="Install losart, and torch + transformers, into new virtual environments, let both do "
        "the same generation of the same checkpoint, and print a table in Markdown of what each takes: on "
        "disk, in memory, and in time until the first token. Takes a few minutes; downloads what pip needs.",
        epilog=EXAMPLE,
    )
    command.set_defaults(run=run)
    add_model_or_size(command)
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    command.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="(512)")
    command.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="(32)")
    command.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="processes whose median counts (3)"
    )
    command.add_argument(
        "--losart", metavar="SPEC", help="what pip installs as losart (what this one was installed from)"
    )
    command.add_argument(
        "--installed",
        action="store_true",
        help="measure the packages that are installed here, in no new environments; leaves out their sizes",
    )
    command.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep environments and random weights in this new directory"
    )
    command.add_argument("--json", metavar="FILE", help="write the figures; -: print them, not the table")
    command.add_argument("--table", type=Path, metavar="FILE", help="also write the table to a file")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    with ExitStack() as stack:
        if args.keep:
            args.keep.mkdir(parents=True)
            folder = args.keep.resolve()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="losart-footprint-")))
        model = args.model or write_weights(folder, args.size)
        steps = stack.enter_context(Steps(step_count(args.installed, args.repeats)))
        figures = compare(
            open_checkpoint(model),
            folder,
            device=args.device,
            installed=args.installed,
            losart_spec=args.losart,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
            say=steps.begin,
        )
    figures = {"command": " ".join(["losart", *sys.argv[1:]])} | figures
    table, text = markdown(figures), json.dumps(figures, indent=2) + "\n"
    print(text if args.json == "-" else table, end="")
    if args.json and args.json != "-":
        Path(args.json).write_text(text)
    if args.table:
        args.table.write_text(table)
