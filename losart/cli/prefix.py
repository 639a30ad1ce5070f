"""`losart prefix`: a prompt that is prefilled once, and kept in a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from losart.api.engine import Engine
from losart.api.requests import message
from losart.cli.arguments import add_model_option, generation_options
from losart.cli.progress import Progress, load_model
from losart.cli.prompts import read_prompt
from losart.cli.tables import print_rows, size
from losart.engine.saved_prefix import read_facts

HELP = "prefill a prompt into a file, for many later ones that begin with it"
DESCRIPTION = """Prefill what a prompt has in whole pages and blocks into a file, or show what a file was made
with. `losart generate` and `losart batch` begin with it by --prefix: same model, device, dtype and kv."""
EXAMPLE = (
    "example: losart prefix save document.kv --model path/to/SDAR-1.7B-Chat --prompt-file document.txt, then "
    "losart batch questions.jsonl answers.jsonl --model path/to/SDAR-1.7B-Chat --prefix document.kv"
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    text = "prefill a prompt and write it"
    save = actions.add_parser("save", help=text, description=f"{text.capitalize()}.")
    save.set_defaults(act=_save)
    save.add_argument("file", metavar="FILE", type=Path, help="is overwritten")
    add_model_option(save)
    save.add_argument(
        "--prompt-file",
        metavar="PROMPT",
        default="-",
        help="read the prompt from a file; - (and the default): standard input",
    )
    save.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    group = save.add_argument_group("as in the generations to come", argument_default=argparse.SUPPRESS)
    group.add_argument("--block-length", type=int, metavar="N", help="tokens of a block (the checkpoint's)")
    group.add_argument("--page-size", type=int, metavar="N", help="a multiple of 16 (16)")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="so that caches have chunks of the same size; else each prompt gets a copy (128)",
    )
    text = "show which model, dtype, kv and device a file was made with"
    show = actions.add_parser("show", help=text, description=f"{text.capitalize()}.")
    show.set_defaults(act=_show)
    show.add_argument("file", metavar="FILE", type=Path)
    show.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Save or show."""
    args.act(args)


def _save(args: argparse.Namespace) -> None:
    text = read_prompt(args.prompt_file)
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    prompt = message(text) if args.chat else text
    with Progress("reading the prompt", "tokens") as progress:
        tokens = Engine(model).save_prefix(prompt, args.file, progress=progress, **generation_options(args))
    print(f"{args.file}: {tokens} tokens, {size(args.file.stat().st_size)}")


def _show(args: argparse.Namespace) -> None:
    facts = read_facts(args.file)
    facts = {"tokens": facts.pop("positions"), **facts, "bytes": args.file.stat().st_size}
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_rows([(name.replace("_", " "), value) for name, value in facts.items()])
