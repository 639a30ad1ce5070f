"""`losart prebuild`: compiles the CUDA kernels in advance, for installations without a compiler."""

from __future__ import annotations

import argparse
from pathlib import Path

from losart.backends.cuda.prebuild import prebuild
from losart.backends.cuda.variants import CARDS
from losart.cli.arguments import listed
from losart.cli.progress import Progress
from losart.cli.tables import size
from losart.config.precision import DTYPES
from losart.errors import OptionError
from losart.kernels_cu.compiler import is_known
from losart.kernels_cu.prebuilt import FOLDER

HELP = "compile the CUDA kernels for installations without a compiler"
DESCRIPTION = """Compile the CUDA kernels into this installation, so that it no longer needs NVRTC; with an
editable installation, into the sources, and wheels then built from them hold the kernels. Needs NVRTC and
no GPU; takes minutes. An architecture's kernels are replaced, in the named dtypes alone. Lists are
separated by commas."""
EXAMPLE = "example: losart prebuild --architectures sm_90a --dtypes bfloat16"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument(
        "--architectures",
        type=listed(str),
        metavar="LIST",
        help=f"({','.join(CARDS)}: those that NVRTC knows)",
    )
    command.add_argument(
        "--dtypes", type=listed(str), default=DTYPES, metavar="LIST", help=f"({','.join(DTYPES)})"
    )
    command.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help="(where this installation looks)"
    )


def run(args: argparse.Namespace) -> None:
    """Compile, and say what was written."""
    for name, known in (("architectures", tuple(CARDS)), ("dtypes", DTYPES)):
        for value in getattr(args, name) or ():
            if value not in known:
                raise OptionError(f"{name} must be of {', '.join(known)}, not {value!r}")
    architectures = args.architectures or tuple(filter(is_known, CARDS))
    with Progress("compiling", "kernels") as progress:
        archives = prebuild(args.output, architectures, args.dtypes, progress=progress)
    for path, count in archives.items():
        print(f"{path}: {count} kernels, {size(path.stat().st_size)}")
