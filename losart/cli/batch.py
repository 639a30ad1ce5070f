"""`losart batch`: many prompts from a file, answered together."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from losart.api import requests
from losart.cli.arguments import add_generation, add_logprobs, add_model_option, generation_options
from losart.cli.engines import add_engine, open_engine
from losart.cli.progress import Progress, load_model
from losart.config.options import OPTIONS
from losart.errors import DataError, LosartError
from losart.observe.step import GenerationResult

HELP = "answer the prompts of a file"
DESCRIPTION = """Answer the prompts of a JSON lines file, and write the answers to another.

A line is an object with a "prompt" (text, chat messages or token ids), and if need be an "id" and options of
its own, by their names in Python. An answer's line has the number of its prompt's line, from 1. Answers are
in order, each written when it is there. Where OUT exists already, what it answers is not asked again."""
EXAMPLE = (
    "example: losart batch prompts.jsonl answers.jsonl --model path/to/SDAR-1.7B-Chat --max-new-tokens 256"
)
BEGINNING = b'{"line": '  # of every answer


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    command.add_argument("input", metavar="IN", type=Path, help="prompts, one JSON object per line")
    command.add_argument("output", metavar="OUT", type=Path, help="answers, one JSON object per line")
    add_model_option(command)
    command.add_argument("--chat", action="store_true", help="take text as a user's message")
    add_engine(command)
    add_logprobs(command)
    add_generation(command)


def run(args: argparse.Namespace) -> None:
    """Answer all prompts that have no answer yet."""
    with ExitStack() as stack:
        prompts = stack.enter_context(args.input.open("rb"))
        total = sum(1 for line in prompts if line.strip())
        prompts.seek(0)
        output = stack.enter_context(args.output.open("a+b"))
        if args.input.samefile(args.output):
            raise DataError(f"{args.output}: the answers need a file of their own")
        answered, end = _answered(output)
        model = load_model(
            args.model,
            args.device,
            args.dtype,
            args.weights,
            args.kv,
            args.adapter,
            args.merge,
            args.activations,
        )
        engine = open_engine(model, args)
        defaults = generation_options(args)
        model.session(**defaults)  # which refuses options that are wrong for every line
        output.truncate(end)
        output.seek(0, os.SEEK_END)
        progress = stack.enter_context(Progress("answering", "prompts"))
        done, skipped = len(answered), 0

        def skip(number: int, error: Exception) -> None:
            nonlocal skipped
            skipped += 1
            progress.clear()
            print(f"losart: {args.input}, line {number}: {error}", file=sys.stderr)

        def asked() -> Iterator[tuple[tuple[int, Any], Any, dict[str, Any]]]:
            for number, line in _numbered(prompts):
                if number not in answered:
                    try:
                        prompt, name, options = _request(line, args.chat)
                    except DataError as error:
                        skip(number, error)
                    else:
                        yield (number, name), prompt, defaults | options

        for (number, name), answer in requests.answers(engine, asked()):
            if isinstance(answer, LosartError):
                skip(number, answer)
            else:
                _write(output, number, name, answer)
                done += 1
                progress(done + skipped, total)
    if skipped:
        raise DataError(f"{skipped} of {total} prompts have no answer")


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _request(line: bytes, chat: bool) -> tuple[Any, Any, dict[str, Any]]:
    """A line's prompt, id and options."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError("not a JSON object")
    prompt, options = requests.request(values, chat=chat)
    unknown = values.keys() - {*OPTIONS, "prompt", "id"}
    if unknown:
        raise DataError(f"unknown keys: {', '.join(sorted(unknown))}")
    return prompt, values.get("id"), options


def _answered(answers: BinaryIO) -> tuple[set[int], int]:
    """Numbers of the lines that have an answer, and where the last whole one ends."""
    answers.seek(0)
    numbers, end = set(), 0
    for place, line in enumerate(answers, start=1):
        cut_short = not line.endswith(b"\n")
        try:
            if not cut_short:
                numbers.add(int(json.loads(line)["line"]))
            elif line[: len(BEGINNING)] != BEGINNING[: len(line)]:
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{answers.name}, line {place}: not an answer of losart batch") from error
        end += 0 if cut_short else len(line)
    return numbers, end


def _write(answers: BinaryIO, number: int, name: Any, result: GenerationResult) -> None:
    values = {"line": number, "id": name, **dataclasses.asdict(result)}
    values["stats"]["tokens_per_second"] = result.stats.tokens_per_second
    answers.write(json.dumps(values).encode() + b"\n")
    answers.flush()
