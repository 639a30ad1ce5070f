"""Many generations at once, asked for from any thread."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from losart.api.model import Model
from losart.config.checks import is_int
from losart.config.options import generation_config
from losart.engine import engine
from losart.engine.engine import HELD_PREFIXES
from losart.engine.kv_pool import KVPool
from losart.engine.saved_prefix import open_prefix, save_prefix
from losart.engine.stream import Stream
from losart.errors import OptionError, PromptError
from losart.loaders.tokenizer import Prompt, prompt_ids
from losart.observe.engine_stats import EngineStats
from losart.observe.step import Observer, Progress


class Engine:
    """Runs the passes of many generations together where the device can, else one after another.

    Generations join and leave between passes, and may differ in all options. Each gives what it gives alone,
    to rounding. Passes are run by the threads that ask streams for steps or results, one at a time, for all
    generations that are under way: nothing happens while nobody asks, or calls `step`.

    What a prompt begins with in common with another one, under way or answered, is prefilled once, in whole
    pages and blocks; who comes while another prefills it waits for that. Answers' finished blocks belong to
    it too, unless `commit="sparse"` wrote them, and so does what a cancelled generation had come to. Only
    generations of equal `block_length` and `page_size` share. They share memory where their caches have
    chunks of the same size, 256 positions where prompt and answer have 8,192 tokens at most, else 1,024; else
    what they share is copied. Without `kv_memory`, 16 prefixes are held for nobody at most, those used last.

    Where an allocation fails all the same, held prefixes are given up, and where a cache still cannot grow,
    the generation that began last is set back: it gives its cache up and waits, is prefilled again when
    another one has ended, and goes on where it was. One whose answer was committed sparsely is not, since
    prefill would not give the same. A pass for which there is no memory is divided; only a sparse commit that
    fails within a page ends its generation.

    Parameters
    ----------
    model : Model
    max_sequences : int, optional
        Generations under way at a time: 16 by default on the CPU, 128 on a GPU. Others wait, in the order in
        which they came. With 1 each has passes of its own, as its stream is asked.
    kv_memory : int, optional
        Bytes for the KV caches of generations under way and for what is held of those that have ended. A
        generation begins when the room fits that its prompt and `max_new_tokens` take, in whole chunks, less
        what it shares; what is held for nobody makes room for it, that first which was used least recently.
        Without it, on a GPU too, there is no limit but the device's memory: a limit plans for answers of
        `max_new_tokens`, which most are not, and what is held would fill it. Give one where others use the
        device, or where more than 16 prefixes are worth holding.
    prefill_first : bool
        Generations under way wait until all prompts that have a place are prefilled, in large pieces: more
        tokens per second in all, for answers that nobody reads as they come. Else each has a pass after a
        small piece.

    Raises
    ------
    OptionError
        `max_sequences` or `kv_memory` is not a whole number above 0.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_sequences: int | None = None,
        kv_memory: int | None = None,
        prefill_first: bool = False,
    ) -> None:
        runner = model._engine.runner
        if max_sequences is None:
            max_sequences = runner.max_sequences
        if not is_int(max_sequences) or max_sequences < 1:
            raise OptionError(f"max_sequences must be a whole number above 0, not {max_sequences!r}")
        if kv_memory is not None and not (is_int(kv_memory) and kv_memory > 0):
            raise OptionError(f"kv_memory must be a whole number of bytes above 0, not {kv_memory!r}")
        self._model = model
        pool = KVPool(HELD_PREFIXES, kv_memory)
        self._engine = engine.Engine(runner, max_sequences, pool, prefill_first)

    @property
    def max_sequences(self) -> int:
        """Generations under way at a time."""
        return self._engine.max_sequences

    @property
    def stats(self) -> EngineStats:
        """Generations, memory, tokens and passes, at this moment."""
        return self._engine.stats

    def submit(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        each_step: bool = True,
        **options: Any,
    ) -> Stream:
        """Begin a generation.

        Returns a stream: an iterator over a `Step` per denoising pass, with `result()`, and `cancel()`, after
        which its memory is free for others, and until they want it held for who asks the same again. An error
        in one generation ends that one alone. Steps that nobody has read yet are kept; with `each_step=False`
        the stream gives the last one alone, which takes less time and memory where only results are wanted.

        Other parameters, and errors, which are raised at once, are those of :meth:`losart.Model.stream`;
        OutOfMemoryError too where prompt and answer take more than `kv_memory`.
        """
        stream = self._model._submit(self._engine, prompt, progress, observer, options, each_step)
        stream.start()
        return stream

    def step(self) -> bool:
        """Run one pass of the generations that are under way; False: there are none.

        For a thread that serves many streams, and cannot wait for one of them: `Stream.ready` says which
        have a step.
        """
        return self._engine.step()

    def save_prefix(
        self,
        prompt: Prompt,
        file: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> int:
        """Prefill what a prompt has in whole pages and blocks, unless it is held, and write it to a file.

        Parameters
        ----------
        prompt, progress
            As of :meth:`losart.Model.generate`.
        file : path
            Is overwritten once the new one is complete.
        **options
            Of those of :meth:`losart.Model.generate`, `block_length` and `page_size` must be those of the
            generations to come. They share memory with what is loaded, and not a copy of it, where with
            `max_new_tokens` their prompts and this one are on the same side of 8,192 tokens.

        Returns
        -------
        int
            Tokens saved.

        Raises
        ------
        PromptError
            As of `submit`, and where the prompt has no whole pages that are whole blocks.
        OptionError, OutOfMemoryError
            As of `submit`.
        PrefixError
            The file cannot be written.
        """
        model, path = self._model, Path(file)
        config = generation_config(model.config, options)
        self._engine.check(config, None if model.tokenizer is None else model.tokenizer.decode)
        ids = prompt_ids(prompt, model.config, model.tokenizer, model.chat_template)
        if len(ids) < (least := math.lcm(config.block_length, config.attention.page_size)):
            raise PromptError(f"{least} tokens are whole pages and blocks, and the prompt has {len(ids)}")
        prefix = self._engine.prefix(ids, config, progress)
        save_prefix(path, prefix, self._engine.new_cache(ids, config), self._facts())
        return len(prefix.ids)

    def load_prefix(self, file: str | os.PathLike[str]) -> int:
        """Hold what `save_prefix` wrote, for prompts that begin with it.

        The file is read once, to be checked. On the CPU it stays mapped, and must not be changed meanwhile.

        Returns
        -------
        int
            Tokens.

        Raises
        ------
        PrefixError
            The file is missing, damaged, or was saved with another model, dtype, kv, device or version.
        OutOfMemoryError
            There is no room for it beside generations under way.
        """
        size, load = open_prefix(Path(file), self._engine.runner, self._facts())
        return len(self._engine.hold(size, load).ids)

    def _facts(self) -> dict[str, str]:
        model = self._model
        return {"model": model.fingerprint, "dtype": model.dtype, "kv": model.kv, "device": model.device}
