"""Answers on the terminal: their text as it is fixed, and their figures."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from losart.cli.tables import share
from losart.decode import Progress
from losart.results import GenerationResult, Stats, Step


def print_steps(steps: Iterable[Step]) -> GenerationResult:
    """Print a stream's text as it grows."""
    printed = 0
    for step in steps:
        print(step.text[printed:], end="", flush=True)
        printed = len(step.text)
        result = step.result
    print()
    assert result is not None
    return result


def prefill_progress() -> Progress | None:
    """What shows how far the prompt is read, where standard error is a terminal."""
    return _show_prefill if sys.stderr.isatty() else None


def _show_prefill(done: int, total: int) -> None:
    end = "\r" if done < total else "\r\033[K"
    print(f"reading the prompt: {done} of {total} tokens", end=end, file=sys.stderr, flush=True)


def print_figures(result: GenerationResult) -> None:
    """Print an answer's figures to standard error."""
    print(_table(result.stats, result.finish_reason), file=sys.stderr)


def _table(stats: Stats, finish_reason: str) -> str:
    rows = [
        (
            "prompt tokens",
            f"{stats.prompt_tokens}: {stats.reused_tokens} reused, {stats.prefilled_tokens} prefilled "
            f"in {stats.prefill_seconds:.2f} s",
        ),
        ("new tokens", f"{stats.new_tokens} in {stats.decode_seconds:.2f} s ({finish_reason})"),
        ("tokens per second", f"{stats.tokens_per_second:.1f}"),
        ("forward passes", f"{stats.denoising_passes} denoising, {stats.commit_passes} commit"),
        ("active fraction", share(stats.active_fraction)),
        ("density", f"{share(stats.sparse_density)} in sparse passes, {share(stats.density)} in all"),
    ]
    return "\n".join(f"{name:18} {value}" for name, value in rows)
