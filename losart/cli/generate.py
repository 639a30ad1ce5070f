"""`losart generate`: text from a prompt, printed as it is fixed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from losart.cli.answers import prefill_progress, print_figures, print_steps
from losart.cli.arguments import add_generation, add_model, generation_options
from losart.errors import PromptError
from losart.model import load

EXAMPLE = 'example: losart generate path/to/SDAR-1.7B-Chat --chat --prompt "Why is the sky blue?" --stats'


def add_command(commands: Any) -> None:
    """Add this command to the subparsers of `losart`."""
    command = commands.add_parser(
        "generate",
        help="generate text from a prompt",
        description="Generate text from a prompt and print it as it is fixed.",
        epilog=EXAMPLE,
    )
    command.set_defaults(run=run)
    add_model(command)
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt")
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file; - (and the default): standard input",
    )
    command.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    command.add_argument("--stats", action="store_true", help="print figures at the end, to standard error")
    add_generation(command)


def run(args: argparse.Namespace) -> None:
    """Generate and print."""
    text = _prompt_text(args)
    model = load(args.model, args.device, args.dtype)
    prompt = [{"role": "user", "content": text}] if args.chat else text
    result = print_steps(model.stream(prompt, progress=prefill_progress(), **generation_options(args)))
    if args.stats:
        print_figures(result)


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    file = args.prompt_file or "-"
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: the prompt is not UTF-8 text: {error}") from error
