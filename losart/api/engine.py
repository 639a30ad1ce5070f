"""Many generations at once, asked for from any thread."""

from __future__ import annotations

from typing import Any

from losart.api.model import Model
from losart.config.checks import is_int
from losart.engine import engine
from losart.engine.engine import MAX_SEQUENCES, Stream
from losart.engine.kv_pool import KVPool
from losart.errors import OptionError
from losart.loaders.tokenizer import Prompt
from losart.observe.step import Observer, Progress


class Engine:
    """Runs the passes of many generations together where the device can, else one after another.

    Generations join and leave between passes, and may differ in all options. Each gives what it gives alone,
    to rounding. Passes are run by the threads that ask streams for steps or results, one at a time, for all
    generations that are under way: nothing happens while nobody asks.

    What a prompt begins with in common with another one, under way or answered, is prefilled once, in whole
    pages and blocks; who comes while another prefills it waits for that. Answers' finished blocks belong to
    it too, unless `commit="sparse"` wrote them. Only generations of equal `block_length` and `page_size`
    share, whose caches have chunks of the same size: 256 positions where prompt and answer have 8,192 tokens
    at most, else 1,024. Of generations that have ended as many prefixes are held as `max_sequences` says,
    those used last.

    Parameters
    ----------
    model : Model
    max_sequences : int, default 16
        Generations under way at a time; others wait, in the order in which they came. With 1 each has passes
        of its own, as its stream is asked.

    Raises
    ------
    OptionError
        `max_sequences` is not a whole number above 0.
    """

    def __init__(self, model: Model, *, max_sequences: int = MAX_SEQUENCES) -> None:
        if not is_int(max_sequences) or max_sequences < 1:
            raise OptionError(f"max_sequences must be a whole number above 0, not {max_sequences!r}")
        self._model = model
        self._engine = engine.Engine(model._engine.runner, max_sequences, KVPool(max_sequences))

    def submit(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Stream:
        """Begin a generation.

        Returns a stream: an iterator over a `Step` per denoising pass, with `result()`, and `cancel()`, which
        frees what the generation holds. An error in one generation ends that one alone.

        Parameters, and errors, which are raised at once, are those of :meth:`losart.Model.stream`.
        """
        stream = self._model._submit(self._engine, prompt, progress, observer, options)
        stream.start()
        return stream
