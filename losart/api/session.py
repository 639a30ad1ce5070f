"""One prompt after another over the same KV cache: what they have in common is prefilled once."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from losart.config.options import GenerationConfig, generation_config
from losart.engine.engine import Engine, Stream
from losart.engine.kv_cache import PagedKVCache
from losart.engine.kv_pool import common_length
from losart.engine.sequence import Sequence
from losart.errors import OptionError, PromptError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.tokenizer import Prompt, Tokenizer, prompt_ids
from losart.observe.step import GenerationResult, Observer, Progress, Step

OF_THE_CACHE = ("block_length", "page_size")  # options that all generations of a session share


class Session:
    """Generations that keep the KV cache from one to the next. Made by :meth:`losart.Model.session`.

    A prompt's longest beginning that the cache holds, by token ids, is not prefilled again: of the
    earlier prompt and of its answer's finished blocks. It is cut down to whole blocks, and to whole
    pages where the cache holds something else after it.

    Reused keys and values are those that prefilling would give, to rounding; with
    `commit="sparse"` they are those of the sparse pass. An error drops the cache, an interrupt
    keeps it; either way the session can be used further. Not for several threads at once.

    Parameters
    ----------
    engine : Engine
    tokenizer : Tokenizer or None
    chat_template : ChatTemplate or None
    options : dict
        As :meth:`losart.Model.generate`'s, for all generations of the session.

    Attributes
    ----------
    options : GenerationConfig
    model_config : ModelConfig
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        options: dict[str, Any],
    ) -> None:
        self.model_config = engine.runner.config
        self.options = generation_config(self.model_config, options)
        self._given = options
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._decode = tokenizer.decode if tokenizer else None
        engine.check(self.options, self._decode)
        self._streams = 0  # begun so far: only the last one may be resumed
        self._steps_of_last: Generator[Step, None, None] | None = None
        self._prompt: tuple[Any, list[int]] = (None, [])  # the last one, and its token ids: text is long
        self._forget()

    def _forget(self) -> None:
        self._cache: PagedKVCache | None = None  # made when the length of the first prompt is known
        self._sequence: Sequence | None = None  # whose tokens the cache holds

    def generate(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Generate from one prompt, which has all that came before in it.

        Parameters
        ----------
        prompt, progress, observer
            As of :meth:`losart.Model.generate`.
        **options
            For this generation alone, in place of the session's. What an answer's finished blocks left in
            the cache is used by later prompts whatever their options.

        Raises
        ------
        PromptError
            The prompt is empty, too long, out of the vocabulary, or cannot be tokenized.
        OptionError
            An option is unknown or out of range, or is `block_length` or `page_size` and not the session's.
        """
        return self.stream(prompt, progress=progress, observer=observer, **options).result()

    def stream(
        self,
        prompt: Prompt,
        *,
        progress: Progress | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Stream:
        """As `generate`, giving a `Step` after each denoising pass.

        Errors of the prompt are raised at once. A stream may be left before its end; it cannot be
        resumed when the session has begun another.
        """
        changed = self._changed(options) if options else self.options
        if not (isinstance(prompt, str) and prompt == self._prompt[0]):
            ids = prompt_ids(prompt, self.model_config, self._tokenizer, self._chat_template)
            self._prompt = (prompt, ids)
        ids = self._prompt[1]
        if self._cache is None:
            self._cache = self._engine.new_cache(ids, changed)
        self._streams += 1
        return Stream(self._steps(self._streams, ids, changed, self._cache, observer, progress))

    def _changed(self, options: dict[str, Any]) -> GenerationConfig:
        """The session's options with some others."""
        changed = generation_config(self.model_config, self._given | options)
        for name in OF_THE_CACHE:
            own, other = (vars(one) | vars(one.attention) for one in (self.options, changed))
            if own[name] != other[name]:
                raise OptionError(f"{name} must be the session's, {own[name]}, not {other[name]}")
        self._engine.check(changed, self._decode)
        return changed

    def _steps(
        self,
        number: int,
        ids: list[int],
        options: GenerationConfig,
        cache: PagedKVCache,
        observer: Observer | None,
        progress: Progress | None,
    ) -> Iterator[Step]:
        self._check_last(number)
        if self._steps_of_last is not None:
            self._steps_of_last.close()  # it would go on writing to the cache
        self._rewind(cache, ids)
        self._sequence = self._engine.sequence(ids, options, cache, self._decode)
        self._steps_of_last = steps = self._engine.steps(self._sequence, observer, progress)
        try:
            for step in steps:
                yield step
                self._check_last(number)
        except Exception:
            # Numbers that are not finite would show through zero weights, past the prefix's end too.
            if number == self._streams:
                self._forget()
            raise

    def _check_last(self, number: int) -> None:
        if number != self._streams:
            raise PromptError("this stream cannot go on: the session has begun another since")

    def _rewind(self, cache: PagedKVCache, ids: list[int]) -> None:
        """Set the cache back to what it has in common with `ids`."""
        last = self._sequence
        if last is None:
            return
        common = common_length(last.ids, ids)
        # A pass that was interrupted may have written to the cache without taking it into the prefix.
        if last.pending or common < cache.length:
            cache.rewind(common, self.options.block_length)
