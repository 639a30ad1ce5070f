"""The only decode loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import replace
from typing import Any, Protocol

from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.engine.batch import PassBatch, PassKind, PassResult
from losart.engine.kv_cache import PagedKVCache
from losart.engine.output import Decode, Output
from losart.engine.sampling import strategy
from losart.engine.sequence import Sequence
from losart.errors import OptionError
from losart.observe.step import GenerationResult, Observer, Progress, Step


class Runner(Protocol):
    """What runs passes: a transformer on a backend."""

    config: ModelConfig

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that go through the model at a time, about."""

    def commits_ride(self, options: GenerationConfig) -> bool:
        """Whether a pass commits a block and begins the next one."""

    def check(self, options: GenerationConfig) -> None:
        """Raise OptionError where the options do not go together."""

    def new_cache(self, options: GenerationConfig, expected: int) -> PagedKVCache:
        """An empty KV cache, expected to hold so many positions in the end."""

    def new_slot(self, options: GenerationConfig) -> Any:
        """Room for a sequence's stored results; None where its attention method stores none."""

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        """Run one pass."""


class Stream:
    """A generation on its way: an iterator over its steps, one per denoising pass.

    It may be left before its end.

    Parameters
    ----------
    steps : iterator of Step
        The last one has the result.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self._last: Step | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._last = next(self._steps)
        return self._last

    def result(self) -> GenerationResult:
        """Run what is left to the end; may be called again."""
        for _ in self:
            pass
        assert self._last is not None and self._last.result is not None
        return self._last.result

    def close(self) -> None:
        """Leave it; what it holds is freed."""
        self._steps = iter(())


class Engine:
    """Takes prompts, and runs their passes as their streams are asked for steps.

    Streams may take turns on one engine.

    Parameters
    ----------
    runner : Runner
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def check(self, options: GenerationConfig, decode: Decode | None) -> None:
        """See that a generation with these options can be run.

        Raises
        ------
        OptionError
        """
        strategy(options.remasking)
        self.runner.check(options)
        if options.stop and decode is None:
            raise OptionError("stop: the checkpoint has no tokenizer; give stop_token_ids")

    def submit(
        self,
        prompt: Ids[int],
        options: GenerationConfig,
        *,
        decode: Decode | None = None,
        observer: Observer | None = None,
        progress: Progress | None = None,
    ) -> Stream:
        """Generate from token ids.

        Parameters
        ----------
        prompt : sequence of int
        options : GenerationConfig
        decode : callable, optional
            Token ids to text; without it there is none.
        observer : callable, optional
            Called after each denoising and commit pass with a `Step` that has the pass's layers.
        progress : callable, optional
            Called after each prefilled piece of the prompt with the tokens done and in all.

        Raises
        ------
        OptionError
            See `check`.
        """
        self.check(options, decode)
        cache = self.new_cache(prompt, options)
        return Stream(self.steps(self.sequence(prompt, options, cache, decode), observer, progress))

    def new_cache(self, prompt: Ids[int], options: GenerationConfig) -> PagedKVCache:
        """An empty cache for a prompt and its answer."""
        expected = min(len(prompt) + options.max_new_tokens, self.runner.config.max_positions)
        return self.runner.new_cache(options, expected)

    def sequence(
        self,
        prompt: Ids[int],
        options: GenerationConfig,
        cache: PagedKVCache,
        decode: Decode | None = None,
    ) -> Sequence:
        """The prompt as a sequence that goes on after what the cache holds of it."""
        limit = min(options.max_new_tokens, self.runner.config.max_positions - len(prompt))
        output = Output(limit, options.stop_token_ids, options.stop, decode)
        runner = self.runner
        return Sequence(prompt, options, output, cache, runner.prefill_tokens, runner.commits_ride(options))

    def steps(
        self, sequence: Sequence, observer: Observer | None = None, progress: Progress | None = None
    ) -> Iterator[Step]:
        """Run a sequence to its end: a step per denoising pass.

        A finished block is committed before its last step is given, or in the next pass.
        """
        sequence.slot = self.runner.new_slot(sequence.options)
        try:
            self.prefill(sequence, progress)
            while not sequence.finished:
                began = time.perf_counter()
                step = self._run(sequence, observer)
                commits = sequence.next_kind is PassKind.COMMIT and not sequence.commits_ride
                if commits and not sequence.finished:
                    self._run(sequence, observer)
                sequence.decode_seconds += time.perf_counter() - began
                assert step is not None
                yield replace(step, result=sequence.result()) if sequence.finished else step
        finally:
            sequence.slot = None  # a session keeps the sequence

    def prefill(self, sequence: Sequence, progress: Progress | None = None) -> None:
        """Take the whole blocks of a sequence's prompt into its cache."""
        began = time.perf_counter()
        sequence.cache.reserve(sequence.prefill_end)
        while sequence.next_kind is PassKind.PREFILL:
            self._run(sequence)
            if progress is not None:
                progress(sequence.cache.length - sequence.reused, sequence.prefill_end - sequence.reused)
        sequence.prefill_seconds += time.perf_counter() - began

    def _run(self, sequence: Sequence, observer: Observer | None = None) -> Step | None:
        """Run the pass that a sequence wants next; returns its last step."""
        requests = sequence.next_pass()
        sequence.cache.reserve(requests[-1].prefix_length + len(requests[-1].ids))
        result = self.runner.forward(PassBatch(requests), observer is not None)
        steps = sequence.apply(result.proposals)
        for request, reads in zip(requests, result.reads, strict=False):  # prefill has none
            sequence.reads.add(reads, request.prefix_length, self.runner.config.num_kv_heads)
        if observer is not None:
            for step, layers in zip(steps, result.layers, strict=True):
                observer(replace(step, layers=layers))
        return steps[-1] if steps else None
