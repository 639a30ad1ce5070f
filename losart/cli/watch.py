"""The block that is being denoised, shown on standard output pass by pass."""

from __future__ import annotations

import numpy as np

from losart.config.options import AttentionConfig
from losart.engine.stream import Stream
from losart.loaders import Tokenizer
from losart.observe.step import GenerationResult, Step

MASKED = "_"


class Watch:
    """An observer that prints a line for each pass: what it fixed, what was active, what it read.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None: tokens are shown as their ids.
    attention : AttentionConfig
        Of the generation.
    """

    def __init__(self, tokenizer: Tokenizer | None, attention: AttentionConfig) -> None:
        self._tokenizer = tokenizer
        self._attention = attention
        self.text = ""  # generated before the pass that is shown

    def __call__(self, step: Step) -> None:
        """Show one pass."""
        fixed = " ".join(map(str, step.fixed)) or "-"
        active = " ".join(map(str, active_layers(step)))
        parts = [self.summary(step), f"fixed: {fixed}", f"active, of {len(step.layers)} layers: {active}"]
        if step.edited:
            parts.insert(2, f"changed: {' '.join(map(str, step.edited))}")
        if changes := largest_changes(step):
            parts.append(f"{self.of_changes()}: {' '.join(map(shown, changes))}")
        print("; ".join([*parts, f"block: {' '.join(self.words(step))}"]), flush=True)

    def of_changes(self) -> str:
        """What `largest_changes` are."""
        attention = self._attention
        above = f", active above {attention.change_threshold:g}" if attention.active == "auto" else ""
        return f"largest change of the query{above}"

    def follow(self, stream: Stream) -> GenerationResult:
        """Run a stream to its end while its passes are shown; then print its text."""
        for step in stream:
            self.text = step.text
        self.close()
        print(stream.result())
        return stream.result()

    def close(self) -> None:
        """Remove what must not stay on the terminal."""

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def summary(self, step: Step) -> str:
        """Kind of a pass, and what it read as means over layers and kv heads."""
        counts = [len(pages) for layer in step.layers for pages in layer.pages]
        prefix_pages = -(-step.block_start // self._attention.page_size)
        density = "no prefix" if step.density is None else f"density {step.density:.1%}"
        return (
            f"block at {step.block_start}, {step.kind} pass: {step.block.count(None)} of {len(step.block)} "
            f"masked, {sum(counts) / len(counts):.1f} of {prefix_pages} pages read, {density}"
        )

    def words(self, step: Step) -> list[str]:
        """The block's tokens as text without control characters."""
        return [MASKED if token is None else self._word(token) for token in step.block]

    def _word(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special=False) if self._tokenizer else ""
        return repr(text) if text else str(token)


def largest_changes(step: Step) -> list[float]:
    """The largest change of each token's query in any layer; empty where none was measured."""
    changes = [layer.change for layer in step.layers if layer.change is not None]
    return np.max(changes, axis=0).tolist() if changes else []


def shown(change: float) -> str:
    """A change in two digits."""
    return f"{change:.2g}"


def active_layers(step: Step) -> list[int]:
    """In how many layers each token of the block was active."""
    counts = [0] * len(step.block)
    for layer in step.layers:
        for token in layer.active.tolist():
            counts[token] += 1
    return counts
