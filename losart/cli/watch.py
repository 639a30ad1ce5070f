"""The block that is being denoised, shown on standard output pass by pass."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from losart.loaders import Tokenizer
from losart.observe.observation import ObservedPass
from losart.observe.results import GenerationResult, Step

MASKED = "_"


class Watch:
    """An observer that prints a line for each pass: what it fixed, what was active, what it read.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None: tokens are shown as their ids.
    page_size : int
        Of the KV cache.
    """

    def __init__(self, tokenizer: Tokenizer | None, page_size: int) -> None:
        self._tokenizer = tokenizer
        self._page_size = page_size
        self.text = ""  # generated before the pass that is shown

    def __call__(self, seen: ObservedPass) -> None:
        """Show one pass."""
        fixed = " ".join(map(str, seen.fixed)) or "-"
        active = " ".join(map(str, active_layers(seen)))
        block = " ".join(self.words(seen))
        print(
            f"{self.summary(seen)}; fixed: {fixed}; active, of {len(seen.layers)} layers: {active}; "
            f"block: {block}",
            flush=True,
        )

    def follow(self, steps: Iterable[Step]) -> GenerationResult:
        """Run a stream to its end while its passes are shown; then print its text."""
        for step in steps:
            self.text = step.text
            result = step.result
        self.close()
        assert result is not None
        print(result)
        return result

    def close(self) -> None:
        """Take away what is not to stay on the terminal."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def summary(self, seen: ObservedPass) -> str:
        """Kind of a pass, and what it read as means over layers and kv heads."""
        counts = [len(pages) for layer in seen.layers for pages in layer.pages]
        there = -(-seen.block_start // self._page_size)
        density = "no prefix" if seen.density is None else f"density {seen.density:.1%}"
        return (
            f"block at {seen.block_start}, {seen.kind} pass: {seen.block.count(None)} of {len(seen.block)} "
            f"masked, {sum(counts) / len(counts):.1f} of {there} pages read, {density}"
        )

    def words(self, seen: ObservedPass) -> list[str]:
        """The block's tokens as text without control characters."""
        return [MASKED if token is None else self._word(token) for token in seen.block]

    def _word(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special=False) if self._tokenizer else ""
        return repr(text) if text else str(token)


def active_layers(seen: ObservedPass) -> list[int]:
    """In how many layers each token of the block was active."""
    counts = [0] * len(seen.block)
    for layer in seen.layers:
        for token in layer.active.tolist():
            counts[token] += 1
    return counts


def watch(tokenizer: Tokenizer | None, page_size: int) -> Watch:
    """What shows passes here: a block redrawn in place, by rich on a terminal that can, else lines."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            from losart.cli.watch_live import LiveWatch
        except ImportError:
            message = "rich is not installed, so passes are plain lines: pip install 'losart[watch]'"
            print(f"losart: {message}", file=sys.stderr)
        else:
            return LiveWatch(tokenizer, page_size)
    return Watch(tokenizer, page_size)
