"""Parses the command line, runs a command, and turns errors into messages and exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from losart.errors import LosartError, OptionError
from losart.version import __version__

if TYPE_CHECKING:
    import argparse

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """The command line's parser; its `run` is the command, a function of the parsed arguments."""
    # Imported here, so that `main` catches an interrupt during the imports.
    import argparse

    from losart.cli import (
        batch,
        bench,
        chat,
        convert,
        eval,
        fetch,
        footprint,
        generate,
        info,
        inspect,
        plot,
        prebuild,
        prefix,
        quantize,
        serve,
    )

    top = argparse.ArgumentParser(prog="losart", description="Runs block-wise diffusion language models.")
    top.add_argument("--version", action="version", version=f"losart {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        *(generate, chat, serve, batch, prefix, eval, plot, bench, footprint),
        *(fetch, inspect, quantize, convert, info, prebuild),
    ):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLE,
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns
    -------
    int
        0; 1 when it failed, 2 for a wrong option, 130 when it was interrupted.
    """
    _replace_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        args = parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nlosart: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Python flushes again at exit, and needs somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OptionError as error:
        print(f"losart: {error}", file=sys.stderr)
        return USAGE
    except (LosartError, MemoryError) as error:
        print(f"losart: {error or type(error).__name__}", file=sys.stderr)
        return FAILED
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"losart: {where}{error.strerror or error}", file=sys.stderr)
        return FAILED
    return 0


def _replace_closed_streams() -> None:
    """Open the null device for standard streams that were closed, which Python leaves as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"losart: {message}", file=sys.stderr)
