"""`losart chat`: a conversation, line by line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

from losart.api.chat import Chat
from losart.cli.answers import print_figures, print_json, print_steps
from losart.cli.arguments import add_generation, add_model, generation_options
from losart.cli.progress import Progress, load_model
from losart.errors import LosartError

EXAMPLE = 'example: losart chat path/to/SDAR-1.7B-Chat --system "Be brief." --attention losa --stats'
COMMANDS = (
    "Ctrl-C stops an answer, Ctrl-D or /quit leaves, /reset clears, /system TEXT sets the system message"
)
HELP = "talk with a model"
DESCRIPTION = f"""Talk with a model, one line per turn, through the checkpoint's chat template. What earlier
turns left in the KV cache is not recomputed. {COMMANDS}."""
PROMPT = ">>> "


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model(command, required=True)  # the checkpoint that comes with losart does not chat
    command.add_argument("--system", metavar="TEXT", help="the system message")
    command.add_argument(
        "--stats", action="store_true", help="print figures after each answer, to standard error"
    )
    command.add_argument(
        "--json", action="store_true", help="print each answer as one JSON object on its own line"
    )
    add_generation(command)


def run(args: argparse.Namespace) -> None:
    """Talk until the input ends.

    At a terminal an interrupt stops the answer, and a mistake costs the turn; elsewhere either ends
    the command.
    """
    terminal = sys.stdin.isatty()
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    chat = Chat(model, args.system, **generation_options(args))
    if terminal:
        print(COMMANDS, file=sys.stderr)
    for line in _lines(terminal):
        if line == "/quit":
            return
        try:
            _take(line, chat, args)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
        except LosartError as error:
            if not terminal:
                raise
            print(f"losart: {error}", file=sys.stderr)


def _take(line: str, chat: Chat, args: argparse.Namespace) -> None:
    command, _, text = line.partition(" ")
    if command == "/reset":
        chat.reset()
    elif command == "/system":
        chat.system = text.strip() or None
    elif re.fullmatch("/[a-z]+", command):
        print(f"losart: there is no {command}: {COMMANDS}", file=sys.stderr)
    else:
        with Progress("reading the prompt", "tokens") as progress:
            steps = chat.stream(line, progress=progress)
            result = steps.result() if args.json else print_steps(steps)
        if args.json:
            print_json(result, indent=None)
        if args.stats:
            print_figures(result)


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of standard input that are not blank."""
    if hasattr(sys.stdin, "reconfigure"):
        # What is not UTF-8 is then an error of the prompt, not of reading.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401, for `input`
    interrupted = False
    while True:
        try:
            line = _read_line(terminal).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal or interrupted:
                raise
            interrupted = True
            print("\nCtrl-C once more, Ctrl-D or /quit leaves", file=sys.stderr)
            continue
        interrupted = False
        if line:
            yield line


def _read_line(terminal: bool) -> str:
    if terminal and sys.stdout.isatty():
        try:
            return input(PROMPT)
        except EOFError:
            print()
            raise
    if terminal:
        print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
