"""`losart plot`: pictures of a trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from losart.errors import OptionError, TraceError
from losart.observe.plot import KINDS, draw
from losart.observe.trace import read_trace

HELP = "draw a trace of `losart generate --trace`"
DESCRIPTION = """Draw a trace: density by pass and layer, which pages of the prefix were read by pass, and
with --kind active which tokens were active in which layer, and why.
Needs matplotlib: pip install 'losart[plot]'."""
EXAMPLE = "example: losart plot run.jsonl -o run.png --kind pages --layer 12"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("file", metavar="FILE", help="the trace")
    command.add_argument(
        "-o", "--output", metavar="OUT", help="the picture; its suffix is the format (FILE with .png)"
    )
    command.add_argument("--kind", choices=KINDS, default="both", help="what to draw (both)")
    command.add_argument(
        "--layer", type=int, metavar="N", help="show this layer's pages (the mean over the layers)"
    )


def run(args: argparse.Namespace) -> None:
    """Draw, and print where the picture is."""
    trace = read_trace(args.file)
    output = Path(args.output) if args.output else Path(args.file).with_suffix(".png")
    if output == Path(args.file):
        raise OptionError(f"the picture would overwrite the trace {args.file}: give --output")
    try:
        figure = draw(trace, args.kind, args.layer)
    except TraceError as error:
        raise TraceError(f"{args.file}: {error}") from error
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix[1:] not in formats:
        raise OptionError(f"output must end in .{', .'.join(formats)}, not {str(output)!r}")
    figure.savefig(output)
    print(output)
