"""One prompt after another over the same keys and values: what they have in common is prefilled once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from losart.config.options import GenerationConfig, generation_config
from losart.engine.engine import Engine
from losart.engine.kv_pool import KVPool
from losart.engine.runner import Runner
from losart.engine.stream import Stream
from losart.errors import OptionError, PromptError
from losart.loaders.chat_template import ChatTemplate
from losart.loaders.tokenizer import Prompt, Tokenizer, prompt_ids
from losart.observe.step import GenerationResult, Observer, Progress, Step
from losart.structured.grammars import Grammars

OF_THE_CACHE = ("block_length", "page_size")  # options that all generations of a session share


class Session:
    """Generations that each begin with what the one before left. Made by :meth:`losart.Model.session`.

    A prompt's longest beginning that the last one and the finished blocks of its answer have too, by token
    ids, in whole pages and blocks, is not prefilled again. A stream that was left or interrupted leaves what
    it had come to. Answers that `commit="sparse"` wrote, and all answers of a model that was loaded with
    `deterministic=True`, are prefilled with the next prompt. So reused keys and values are those that
    prefilling would give, to rounding.

    The session can be used further after any error. After a NumericalError nothing of that generation is
    reused. Until a generation has ended there is memory for it and, if there is enough, for what the last one
    left. Not for several threads at once.

    Parameters
    ----------
    runner : Runner
    tokenizer : Tokenizer or None
    chat_template : ChatTemplate or None
    options : dict
        As :meth:`losart.Model.generate`'s, for all generations of the session.
    grammars : Grammars, optional
        The model's; without them there are none that the tokenizer could follow.

    Attributes
    ----------
    options : GenerationConfig
    model_config : ModelConfig
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        options: dict[str, Any],
        grammars: Grammars | None = None,
    ) -> None:
        self.model_config = runner.config
        self.options = generation_config(self.model_config, options)
        self._given = options
        self._engine = Engine(runner, 1, KVPool(1))
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._decode = tokenizer.decode if tokenizer else None
        self._grammars = grammars or Grammars(self.model_config, None)
        self._engine.check(self.options, self._decode)
        if self.options.structure is not None:
            self._grammars.matcher(*self.options.structure)
        self._last: Stream | None = None  # begun
        self._prompt: tuple[Any, list[int]] = (None, [])  # the last one, and its token ids: text is long

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
            For this generation alone, in place of the session's. What it leaves is used by later prompts
            whatever their options.

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
        grammar = None if changed.structure is None else self._grammars.matcher(*changed.structure)
        stream = self._engine.submit(
            ids, changed, decode=self._decode, observer=observer, progress=progress, grammar=grammar
        )
        if self._last is not None:
            self._last.close()
        self._last = stream
        return Stream(self._steps(stream), close=stream.close)

    def _changed(self, options: dict[str, Any]) -> GenerationConfig:
        """The session's options with some others."""
        changed = generation_config(self.model_config, self._given | options)
        for name in OF_THE_CACHE:
            own, other = (vars(one) | vars(one.attention) for one in (self.options, changed))
            if own[name] != other[name]:
                raise OptionError(f"{name} must be the session's, {own[name]}, not {other[name]}")
        return changed

    def _steps(self, stream: Stream) -> Iterator[Step]:
        """The steps of a stream, which must not have been closed for another one."""
        last = None
        for last in stream:
            yield last
        if self._last is not stream and (last is None or last.result is None):
            raise PromptError("this stream cannot go on: the session has begun another since")
