"""`losart generate`: text from a prompt, printed as it is fixed."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from contextlib import ExitStack

from losart.api.model import Model
from losart.api.requests import message
from losart.cli.answers import print_figures, print_json, print_steps
from losart.cli.arguments import add_generation, add_logprobs, add_model, generation_options
from losart.cli.engines import add_engine, open_engine
from losart.cli.progress import Progress, load_model
from losart.cli.prompts import read_prompt
from losart.cli.watch import Watch
from losart.config.options import AttentionConfig
from losart.errors import OptionError
from losart.loaders import Tokenizer
from losart.observe.step import Observer, Step
from losart.observe.trace import TraceWriter

HELP = "generate text from a prompt"
DESCRIPTION = """Generate text from a prompt and print it as it is fixed."""
EXAMPLE = 'example: losart generate path/to/SDAR-1.7B-Chat --chat --prompt "Why is the sky blue?" --stats'


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_model(command)
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the prompt; of several the answers come in order, decoded together",
    )
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read the prompt from a file; - (and the default): standard input",
    )
    command.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    command.add_argument("--stats", action="store_true", help="print figures at the end, to standard error")
    shown = command.add_mutually_exclusive_group()
    shown.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, of several prompts a line each",
    )
    shown.add_argument(
        "--watch",
        action="store_true",
        help="show the block being denoised pass by pass, and the text at the end",
    )
    command.add_argument(
        "--trace", metavar="FILE", help="write what every pass read, as JSON lines for `losart plot`"
    )
    add_engine(command)
    add_logprobs(command)
    add_generation(command)


def run(args: argparse.Namespace) -> None:
    """Generate and print."""
    if hasattr(args, "logprobs") and not args.json:
        raise OptionError("--logprobs goes with --json")
    if args.prompt is not None and len(args.prompt) > 1:
        _answer_all(args)
        return
    text = args.prompt[0] if args.prompt else read_prompt(args.prompt_file or "-")
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    if args.model is None:
        _warn_of_unknown_words(model, text)
    options = generation_options(args)
    session, engine = model.session(**options), open_engine(model, args)
    prompt = message(text) if args.chat else text
    observers: list[Observer] = []

    def tell(step: Step) -> None:
        for observer in observers:
            observer(step)

    observer = tell if args.trace or args.watch else None
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("reading the prompt", "tokens"))
        steps = engine.submit(prompt, progress=progress, observer=observer, **options)
        if args.trace:  # only now: a mistake in the prompt leaves an older file as it is
            trace = stack.enter_context(TraceWriter(args.trace, session, args.model or "small_checkpoint"))
            observers.append(trace)
        if args.watch:
            passes = stack.enter_context(_watch(model.tokenizer, session.options.attention))
            observers.append(passes)
            result = passes.follow(steps)
        else:
            result = steps.result() if args.json else print_steps(steps)
        if args.trace:
            trace.finish(result)
    if args.json:
        print_json(result)
    if args.stats:
        print_figures(result)


def _answer_all(args: argparse.Namespace) -> None:
    """Answer several prompts together, and print the answers in order."""
    if args.watch or args.trace:
        raise OptionError("--watch and --trace show one prompt, not several")
    model = load_model(
        args.model, args.device, args.dtype, args.weights, args.kv, args.adapter, args.merge, args.activations
    )
    engine = open_engine(model, args)
    prompts = [message(text) if args.chat else text for text in args.prompt]
    streams = [engine.submit(prompt, **generation_options(args)) for prompt in prompts]
    for index, stream in enumerate(streams):
        if args.json:
            print_json(stream.result(), indent=None)
        else:
            if index:
                print()
            print_steps(stream)
        if args.stats:
            print_figures(stream.result())


def _watch(tokenizer: Tokenizer | None, attention: AttentionConfig) -> Watch:
    """What shows passes here: a block redrawn in place by rich, on a terminal that can do so, else lines."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            from losart.cli.watch_live import LiveWatch
        except ImportError:
            message = "rich is not installed, so passes are plain lines: pip install 'losart[watch]'"
            print(f"losart: {message}", file=sys.stderr)
        else:
            return LiveWatch(tokenizer, attention)
    return Watch(tokenizer, attention)


def _warn_of_unknown_words(model: Model, text: str) -> None:
    from losart.eval.vocabulary import UNKNOWN

    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text)
    unknown = model.tokenizer.token_to_id(UNKNOWN)
    count = 0 if unknown is None else ids.count(unknown)
    if count:
        warnings.warn(
            f"{count} of {len(ids)} words of the prompt are unknown to the small checkpoint that comes with "
            f"losart, which knows no natural language: name a MODEL",
            stacklevel=2,
        )
