"""Answers on the terminal: their text as it is fixed, and their figures."""

from __future__ import annotations

import dataclasses
import json
import sys

from losart.cli.tables import share
from losart.engine.stream import Stream
from losart.observe.step import GenerationResult, Stats


def print_json(result: GenerationResult, indent: int | None = 2) -> None:
    """Print a result as one JSON object; with an indent of None on one line."""
    values = dataclasses.asdict(result)
    values["stats"]["tokens_per_second"] = result.stats.tokens_per_second
    print(json.dumps(values, indent=indent), flush=True)


def print_steps(stream: Stream) -> GenerationResult:
    """Print a stream's text as it grows."""
    printed = 0
    for step in stream:
        print(step.text[printed:], end="", flush=True)
        printed = len(step.text)
    print()
    return stream.result()


def print_figures(result: GenerationResult) -> None:
    """Print an answer's figures to standard error."""
    print(_table(result.stats, result.finish_reason), file=sys.stderr)


def _table(stats: Stats, finish_reason: str) -> str:
    passes = f"{stats.denoising_passes} denoising, {stats.commit_passes} commit"
    together = f", {stats.rides} of each together" if stats.rides else ""
    rows = [
        (
            "prompt tokens",
            f"{stats.prompt_tokens}: {stats.reused_tokens} reused, {stats.prefilled_tokens} prefilled "
            f"in {stats.prefill_seconds:.2f} s",
        ),
        ("new tokens", f"{stats.new_tokens} in {stats.decode_seconds:.2f} s ({finish_reason})"),
        ("tokens per second", f"{stats.tokens_per_second:.1f}"),
        ("first token", _first_token(stats)),
        ("forward passes", passes + together),
        ("active fraction", share(stats.active_fraction)),
        ("density", f"{share(stats.sparse_density)} in sparse passes, {share(stats.density)} in all"),
    ]
    return "\n".join(f"{name:18} {value}" for name, value in rows)


def _first_token(stats: Stats) -> str:
    after = "none" if stats.first_token_seconds is None else f"after {stats.first_token_seconds:.2f} s"
    return (
        f"{after}, {stats.queue_seconds:.2f} of them in the queue" if stats.queue_seconds > 0.005 else after
    )
