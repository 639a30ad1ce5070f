"""The block that is being denoised, shown on standard output pass by pass."""

from __future__ import annotations

from losart.engine.engine import Stream
from losart.loaders import Tokenizer
from losart.observe.step import GenerationResult, Step

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

    def __call__(self, step: Step) -> None:
        """Show one pass."""
        fixed = " ".join(map(str, step.fixed)) or "-"
        active = " ".join(map(str, active_layers(step)))
        block = " ".join(self.words(step))
        print(
            f"{self.summary(step)}; fixed: {fixed}; active, of {len(step.layers)} layers: {active}; "
            f"block: {block}",
            flush=True,
        )

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
        prefix_pages = -(-step.block_start // self._page_size)
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


def active_layers(step: Step) -> list[int]:
    """In how many layers each token of the block was active."""
    counts = [0] * len(step.block)
    for layer in step.layers:
        for token in layer.active.tolist():
            counts[token] += 1
    return counts
