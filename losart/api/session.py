"""One prompt after another over the same KV cache: what they have in common is prefilled once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from losart.api.prompts import Prompt, is_batch, prompt_ids
from losart.attention import make_policy
from losart.config.options import generation_config
from losart.engine.decode import BlockDecoder, DenoisingPass, block_tokens
from losart.engine.kv_cache import PagedKVCache
from losart.engine.output import Output
from losart.engine.remasking import strategy
from losart.errors import OptionError, PromptError
from losart.loaders import ChatTemplate, Tokenizer
from losart.models.transformer import Transformer
from losart.observe.observation import Observer, Progress
from losart.observe.results import GenerationResult, Stats, Step


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
    transformer : Transformer
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
        transformer: Transformer,
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        options: dict[str, Any],
    ) -> None:
        self.options = generation_config(transformer.config, options)
        self.model_config = transformer.config
        self._transformer = transformer
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._check_options()
        self._decoder: BlockDecoder | None = None
        self._forget()

    def _check_options(self) -> None:
        options = self.options
        strategy(options.remasking)
        make_policy(options.attention, self._transformer.config, options.block_length)
        if options.stop and self._tokenizer is None:
            raise OptionError("stop: the checkpoint has no tokenizer; give stop_token_ids")

    def _forget(self) -> None:
        self._cache: PagedKVCache | None = None  # made when it is known how long the first prompt is
        self._ids: list[int] = []  # what the cache holds, and perhaps more
        self._in_pass = False

    def generate(
        self, prompt: Prompt, *, progress: Progress | None = None, observer: Observer | None = None
    ) -> GenerationResult:
        """Generate from one prompt, which has all that came before in it.

        Raises
        ------
        PromptError
            The prompt is empty, too long, out of the vocabulary, or cannot be tokenized.
        """
        for step in self.stream(prompt, progress=progress, observer=observer):
            result = step.result
        assert result is not None
        return result

    def stream(
        self, prompt: Prompt, *, progress: Progress | None = None, observer: Observer | None = None
    ) -> Iterator[Step]:
        """As `generate`, giving a `Step` after each denoising pass.

        Errors of the prompt are raised at once. A stream may be left before its end; it cannot be
        gone on with when the session has begun another.
        """
        if is_batch(prompt):
            raise PromptError("stream takes one prompt, not a list of prompts")
        model, options = self._transformer.config, self.options
        ids = prompt_ids(prompt, model, self._tokenizer, self._chat_template)
        output = Output(
            min(options.max_new_tokens, model.max_positions - len(ids)),
            options.stop_token_ids,
            options.stop,
            self._tokenizer.decode if self._tokenizer else None,
        )
        policy = make_policy(options.attention, model, options.block_length)
        if self._cache is None:
            expected = min(len(ids) + options.max_new_tokens, model.max_positions)
            self._cache = self._transformer.backend.new_cache(options.attention.page_size, expected)
        decoder = BlockDecoder(self._transformer, options, policy, self._cache, output, observer)
        self._decoder = decoder
        return self._steps(decoder, ids, progress)

    def _steps(self, decoder: BlockDecoder, ids: list[int], progress: Progress | None) -> Iterator[Step]:
        self._check_current(decoder)
        reused = self._go_back(decoder.cache, ids)
        try:
            self._in_pass = True
            for event in decoder.run(ids[reused:], progress):
                self._note(decoder.cache, event)
                self._in_pass = False
                yield _step(event, decoder, len(ids), reused)
                self._check_current(decoder)
                self._in_pass = True
            self._in_pass = False
        except Exception:
            # Numbers that are not finite would show through zero weights, past the prefix's end too.
            if self._decoder is decoder:
                self._forget()
            raise

    def _check_current(self, decoder: BlockDecoder) -> None:
        if self._decoder is not decoder:
            raise PromptError("this stream cannot go on: the session has begun another since")

    def _go_back(self, cache: PagedKVCache, ids: list[int]) -> int:
        """Set the cache back to what it has in common with `ids`; returns how much that is."""
        common = _common(self._ids, ids)
        # What was interrupted within a pass may have written to the cache without taking it in.
        if self._in_pass or common < cache.length:
            cache.rewind(common, self.options.block_length)
        self._ids = list(ids)
        return cache.length

    def _note(self, cache: PagedKVCache, event: DenoisingPass) -> None:
        if cache.length > event.block_start:  # the pass was the block's last, and committed it
            self._ids[event.block_start :] = event.ids.tolist()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = zip(a, b, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(a), len(b)))


def _step(event: DenoisingPass, decoder: BlockDecoder, prompt_tokens: int, reused: int) -> Step:
    output = decoder.output
    result = _result(decoder, prompt_tokens, reused) if output.finish_reason else None
    block = block_tokens(event.ids, event.masked)
    return Step(event.block_start, block, event.fixed.tolist(), output.text, result)


def _result(decoder: BlockDecoder, prompt_tokens: int, reused: int) -> GenerationResult:
    output, reads, length = decoder.output, decoder.policy.reads, decoder.config.block_length
    assert output.finish_reason is not None
    stats = Stats(
        prompt_tokens=prompt_tokens,
        new_tokens=len(output.tokens),
        reused_tokens=reused,
        prefilled_tokens=prompt_tokens // length * length - reused,
        denoising_passes=decoder.denoising_passes,
        commit_passes=decoder.commit_passes,
        prefill_seconds=decoder.prefill_seconds,
        decode_seconds=decoder.decode_seconds,
        active_fraction=reads.active_fraction,
        sparse_density=reads.sparse_density,
        density=reads.density,
    )
    return GenerationResult(output.text, list(output.tokens), output.finish_reason, stats)
