"""`losart generate`: text from a prompt, printed as it is fixed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from losart.attention import POLICIES
from losart.config import DTYPES
from losart.errors import PromptError
from losart.model import Model, load
from losart.options import CHOICES
from losart.remasking import STRATEGIES
from losart.results import GenerationResult, Stats

EXAMPLE = 'example: losart generate path/to/SDAR-1.7B-Chat --chat --prompt "Why is the sky blue?" --stats'


def _active(text: str) -> int | float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(
        f"must be a count of tokens, such as 5, or a fraction of the block, such as 0.3, not {text!r}"
    )


def add_command(commands: Any) -> None:
    """Add this command to the subparsers of `losart`."""
    command = commands.add_parser(
        "generate",
        help="generate text from a prompt",
        description="Generate text from a prompt and print it as it is fixed.",
        epilog=EXAMPLE,
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt")
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file; - (and the default): standard input",
    )
    command.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    command.add_argument("--stats", action="store_true", help="print figures at the end, to standard error")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    command.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    _add_options(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    """The options of `Model.generate`, left out of the namespace unless they are given."""
    group = command.add_argument_group("generation", argument_default=argparse.SUPPRESS)
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="new tokens at most (128)")
    group.add_argument("--block-length", type=int, metavar="N", help="tokens of a block (the checkpoint's)")
    group.add_argument("--denoising-steps", type=int, metavar="N", help="passes a block (the block length)")
    group.add_argument("--remasking", choices=STRATEGIES, help="(low_confidence_dynamic)")
    group.add_argument("--confidence-threshold", type=float, metavar="P", help="(0.85)")
    group.add_argument("--eb-threshold", type=float, metavar="NATS", help="(0.35)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (0)")
    group.add_argument("--top-k", type=int, metavar="K", help="0 keeps all (0)")
    group.add_argument("--top-p", type=float, metavar="P", help="(1.0)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same output")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--stop-token-ids", type=int, nargs="*", metavar="ID", help="(the checkpoint's)")
    group.add_argument("--mask-token-id", type=int, metavar="ID", help="(the checkpoint's)")
    group = command.add_argument_group("attention", argument_default=argparse.SUPPRESS)
    group.add_argument("--attention", choices=POLICIES, help="how passes read the prefix (dense)")
    group.add_argument("--budget", type=int, metavar="N", help="prefix positions that a query selects (512)")
    group.add_argument(
        "--active",
        type=_active,
        metavar="N",
        help="losa: recomputed tokens, or as 0.3 their fraction of the block (5)",
    )
    group.add_argument(
        "--selector", choices=CHOICES["selector"], help="losa: what ranks pages for a query (quest)"
    )
    group.add_argument(
        "--drift", choices=CHOICES["drift"], help="losa: against which pass change is measured (previous)"
    )
    group.add_argument(
        "--candidates", choices=CHOICES["candidates"], help="losa: tokens that can be recomputed (all)"
    )
    group.add_argument("--page-size", type=int, metavar="N", help="a multiple of 16 (16)")
    group.add_argument("--dense-layers", type=int, metavar="N", help="first layers that stay dense (0)")
    group.add_argument("--commit", choices=CHOICES["commit"], help="(dense)")


OTHER_ARGUMENTS = ("run", "model", "prompt", "prompt_file", "chat", "stats", "device", "dtype")


def run(args: argparse.Namespace) -> None:
    """Generate and print."""
    text = _prompt_text(args)
    options = {name: value for name, value in vars(args).items() if name not in OTHER_ARGUMENTS}
    model = load(args.model, args.device, args.dtype)
    prompt = [{"role": "user", "content": text}] if args.chat else text
    result = _print_stream(model, prompt, options)
    if args.stats:
        print(_table(result.stats, result.finish_reason), file=sys.stderr)


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    file = args.prompt_file or "-"
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{file}: the prompt is not UTF-8 text: {error}") from error


def _print_stream(model: Model, prompt: Any, options: dict[str, Any]) -> GenerationResult:
    printed = 0
    progress = _show_prefill if sys.stderr.isatty() else None
    for step in model.stream(prompt, progress=progress, **options):
        print(step.text[printed:], end="", flush=True)
        printed = len(step.text)
        result = step.result
    print()
    assert result is not None
    return result


def _show_prefill(done: int, total: int) -> None:
    end = "\r" if done < total else "\r\033[K"
    print(f"reading the prompt: {done} of {total} tokens", end=end, file=sys.stderr, flush=True)


def _table(stats: Stats, finish_reason: str) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        ("prompt tokens", f"{stats.prompt_tokens} in {stats.prefill_seconds:.2f} s"),
        ("new tokens", f"{stats.new_tokens} in {stats.decode_seconds:.2f} s ({finish_reason})"),
        ("tokens per second", f"{stats.tokens_per_second:.1f}"),
        ("forward passes", f"{stats.denoising_passes} denoising, {stats.commit_passes} commit"),
        ("active fraction", share(stats.active_fraction)),
        ("density", f"{share(stats.sparse_density)} in sparse passes, {share(stats.density)} in all"),
    ]
    return "\n".join(f"{name:18} {value}" for name, value in rows)
