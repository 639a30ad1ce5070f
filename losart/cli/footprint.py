"""`losart footprint`: what losart takes, beside torch + transformers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from losart.cli.arguments import add_model_or_size, positive
from losart.cli.progress import Steps, write_weights
from losart.errors import OptionError
from losart.loaders import open_checkpoint
from losart.measure.footprint.comparison import compare, generation_of
from losart.measure.footprint.sides import installed_sides, new_sides
from losart.measure.footprint.table import markdown

HELP = "compare size, memory and start-up with torch + transformers"
DESCRIPTION = """Install losart, and torch + transformers, into new virtual environments, let both do the
same generation of the same checkpoint, and print a table in Markdown of what each takes: on disk, in
memory, and in time until the first token. Takes a few minutes; downloads what pip needs. --installed makes
no environments and needs no network."""
EXAMPLE = "example: losart footprint path/to/SDAR-1.7B-Chat --json footprint.json --table footprint.md"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model_or_size(command)
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(cpu)")
    command.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help="(512)")
    command.add_argument("--new-tokens", type=positive, default=32, metavar="N", help="(32)")
    command.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="processes whose median counts (3)"
    )
    command.add_argument(
        "--losart",
        action="append",
        metavar="SPEC",
        help="what pip installs as losart (what this one was installed from); repeatable",
    )
    command.add_argument(
        "--rival",
        action="append",
        metavar="SPEC",
        help="what pip installs as torch and transformers (as the extra parity has them); repeatable",
    )
    command.add_argument(
        "--installed",
        action="store_true",
        help="measure what is installed here; sizes are those of each side's packages and all they require",
    )
    command.add_argument(
        "--rival-python",
        type=Path,
        metavar="FILE",
        help="with --installed: the interpreter that has torch and transformers (this one)",
    )
    command.add_argument(
        "--sizes-only", action="store_true", help="measure sizes on disk alone: no MODEL and no device needed"
    )
    command.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep environments and random weights in this new directory"
    )
    command.add_argument("--json", metavar="FILE", help="write the figures; -: print them, not the table")
    command.add_argument("--table", type=Path, metavar="FILE", help="also write the table to a file")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    if args.installed and (args.losart or args.rival):
        raise OptionError("--losart and --rival are what pip is to install, and --installed installs nothing")
    if args.rival_python and not args.installed:
        raise OptionError("--rival-python is for --installed")
    if args.sizes_only and args.model:
        raise OptionError("--sizes-only runs no MODEL")
    with ExitStack() as stack:
        if args.keep:
            args.keep.mkdir(parents=True)
            folder = args.keep.resolve()
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="losart-footprint-")))
        generation = None
        if not args.sizes_only:
            checkpoint = open_checkpoint(args.model or write_weights(folder, args.family, args.size))
            generation = generation_of(checkpoint, args.device, args.prompt_tokens, args.new_tokens)
        processes = 0 if args.sizes_only else args.repeats + 1
        steps = stack.enter_context(Steps(2 * (processes + (not args.installed))))
        if args.installed:
            sides = installed_sides(args.device, args.rival_python)
        else:
            sides = new_sides(folder, args.device, args.losart, args.rival, steps.begin)
        figures = compare(sides, args.device, generation, folder, args.repeats, steps.begin)
    figures = {"command": " ".join(["losart", *sys.argv[1:]])} | figures
    table, text = markdown(figures), json.dumps(figures, indent=2) + "\n"
    print(text if args.json == "-" else table, end="")
    if args.json and args.json != "-":
        Path(args.json).write_text(text)
    if args.table:
        args.table.write_text(table)
