"""The only decode loop: passes of one or more sequences, until each has ended."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Ids
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from losart.config.options import GenerationConfig
from losart.engine.batch import (
    PassBatch,
    PassKind,
    PassResult,
    SequencePass,
    operations_key,
)
from losart.engine.hooks import ProposalHook, revised
from losart.engine.kv_cache import PagedKVCache
from losart.engine.kv_pool import KVPool, Prefix
from losart.engine.output import Decode, Output
from losart.engine.remasking import remask
from losart.engine.run import Done, Run
from losart.engine.runner import Runner
from losart.engine.sampling import NOT_FINITE, Proposals, check_remasking
from losart.engine.sequence import Mean, Sequence
from losart.engine.stream import Stream
from losart.engine.structure import Grammar, Structure
from losart.engine.totals import Totals
from losart.errors import LosartError, NumericalError, OptionError, OutOfMemoryError, PromptError
from losart.observe.engine_stats import EngineStats
from losart.observe.step import ObservedLayer, Observer, Progress, Step

HELD_PREFIXES = 16  # for nobody, where nothing else limits them
LEAST_SHARE = 4  # a piece with others' is at least a quarter of one by itself: few rows take almost as long
LONG_PREFIX = 16384  # positions over which a token's attention takes about as long as its matmuls
Room = TypeVar("Room")  # whatever takes memory
Fixed = tuple[Any, ...]  # what `remask` gives of a sequence


class Engine:
    """Takes prompts, and runs their passes as their streams are asked for steps.

    With `max_sequences` above 1, and where the runner can, a pass has rows of all sequences that take part:
    those whose streams have been started or asked for a step, and have not ended. Sequences join and leave
    between passes. Else each pass is one sequence's, whose stream has been asked. Streams may be asked by
    several threads; the one that asks runs passes until there is a step.

    Parameters
    ----------
    runner : Runner
    max_sequences : int
        That share passes; others wait in the order in which they came, or for a prefill under way that has
        more in common with them than is held so far.
    pool : KVPool, optional
        Shares what prompts begin with in common. None: each has a cache of its own.
    prefill_first : bool
        Whether those that decode wait for all prompts, and not for a piece of one between two passes.
    """

    def __init__(
        self,
        runner: Runner,
        max_sequences: int = 1,
        pool: KVPool | None = None,
        prefill_first: bool = False,
    ) -> None:
        self.runner = runner
        self.max_sequences = max_sequences
        self.prefill_first = prefill_first
        self._pool = pool
        if pool is not None:
            runner.pools.add(pool)
        self._together = runner.batch_rows > 0 and max_sequences > 1
        self._lock = threading.RLock()  # guards who waits and who runs
        self._later: deque[Callable[[], None]] = deque()  # what finalizers could not do at once
        self._waiting: deque[Run] = deque()
        self._running: list[Run] = []
        self._full = False  # whether there was no memory for one more, and none has ended since
        self._set_backs = 0
        self._passes = 0
        self._block_passes = 0
        self._block_sequences = 0  # of those passes, in all
        self._block_seconds = 0.0
        self._experts_used = Mean()  # in a layer of those passes
        self._ended = Totals()  # generations
        self._prefilled_tokens = 0
        self._prefilled = 0.0  # tokens of prompts since the last pass over blocks, by what they cost
        # A run's last pass, its first index and count there, and the prefix's length; nothing has the cache.
        self._untold: dict[Run, tuple[Done, int, int, int]] = {}

    @property
    def stats(self) -> EngineStats:
        """Figures of this moment."""
        with self._lock:
            self._catch_up()
            pool, totals = self._pool or KVPool(0), Totals()
            totals.include(self._ended)
            for run in (*self._running, *self._waiting):
                if run.kept is None:
                    totals.add(run.sequence)
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                finished=self._ended.finished,
                kv_bytes_in_use=pool.bytes_in_use,
                kv_bytes_shared=pool.bytes_shared,
                kv_bytes_held=pool.bytes_held,
                kv_memory=pool.limit,
                kv=self.runner.kv,
                matrix_bytes=dict(self.runner.matrix_bytes),
                reused_tokens=pool.reused_tokens,
                prefilled_tokens=self._prefilled_tokens,
                new_tokens=totals.new_tokens,
                decode_seconds=self._block_seconds,
                passes=self._block_passes,
                mean_sequences=self._block_sequences / max(1, self._block_passes),
                density=totals.reads.density,
                experts_used=self._experts_used.value,
                mean_queue_seconds=totals.queued.value,
                mean_first_token_seconds=totals.first_token.value,
                set_back=self._set_backs,
            )

    def check(self, options: GenerationConfig, decode: Decode | None) -> None:
        """See that a generation with these options can be run.

        Raises
        ------
        OptionError
        """
        check_remasking(options.remasking)
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
        each_step: bool = True,
        hooks: Ids[ProposalHook] = (),
        grammar: Grammar | None = None,
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
        each_step : bool
            Whether the stream gives a step per denoising pass; else the last one alone, with the result.
        hooks : sequence of ProposalHook
            Of this generation.
        grammar : Grammar, optional
            At its beginning; the answer follows it. No other generation may have the same one.

        Raises
        ------
        OptionError
            See `check`.
        OutOfMemoryError
            There is less memory for caches than it may need.
        """
        self.check(options, decode)
        cache = self.new_cache(prompt, options)
        sequence = self.sequence(prompt, options, cache, decode, hooks, grammar)
        run = Run(sequence, observer, progress, each_step)
        if self._pool is not None:
            self._pool.check(run.sequence)
        # The iterator alone holds the run, so that its cache is freed with its end.
        reference = weakref.ref(run)

        def start() -> None:
            if (alive := reference()) is not None:
                self._join(alive)

        def close() -> None:
            if (alive := reference()) is not None:
                self._soon(partial(self._close, alive))

        def ready() -> bool:
            return (alive := reference()) is None or self._ready(alive)

        return Stream(self._steps(run), start, close, ready)

    def new_cache(self, prompt: Ids[int], options: GenerationConfig) -> PagedKVCache:
        """An empty cache for a prompt and its answer."""
        expected = min(len(prompt) + options.max_new_tokens, self.runner.config.max_positions)
        return self._with_room(lambda: self.runner.new_cache(options, expected))

    def sequence(
        self,
        prompt: Ids[int],
        options: GenerationConfig,
        cache: PagedKVCache,
        decode: Decode | None = None,
        hooks: Ids[ProposalHook] = (),
        grammar: Grammar | None = None,
    ) -> Sequence:
        """The prompt as a sequence that goes on after what the cache holds of it."""
        runner, decoding = self.runner, self.runner.config.decoding
        room = self.room(prompt, options)
        if not room:
            raise PromptError(f"the prompt of {len(prompt)} tokens leaves no room for a block")
        ends = (*options.stop_token_ids, *(() if grammar is None else grammar.end_token_ids))
        output = Output(min(options.max_new_tokens, room), ends, options.stop, decode)
        if grammar is not None:
            hooks = (*hooks, Structure(grammar, output))
        rides = runner.commits_ride(options)
        prefill_tokens, deterministic = runner.prefill_tokens, runner.deterministic
        return Sequence(prompt, options, output, cache, prefill_tokens, rides, deterministic, decoding, hooks)

    def room(self, prompt: Ids[int], options: GenerationConfig) -> int:
        """New tokens that the model has positions for."""
        room = self.runner.config.max_positions - len(prompt)
        if self.runner.config.decoding.causal:  # a last block must fit as a whole
            room = room // options.block_length * options.block_length
        return room

    def prefix(self, prompt: Ids[int], options: GenerationConfig, progress: Progress | None = None) -> Prefix:
        """Prefill a prompt's whole pages and blocks, or find them, and hold them.

        Raises
        ------
        OutOfMemoryError
            There is less memory for caches than it needs.
        """
        assert self._pool is not None
        output, cache, kept = Output(0), self.new_cache(prompt, options), list[Prefix]()
        sequence = Sequence(prompt, options, output, cache, self.runner.prefill_tokens)
        self._pool.check(sequence)
        list(self._steps(Run(sequence, progress=progress, kept=kept)))
        return kept[0]

    def hold(self, size: int, load: Callable[[], Prefix]) -> Prefix:
        """Load a prefix when there is room for so many bytes, and hold it.

        Raises
        ------
        OutOfMemoryError
            There is no room beside what generations under way may need.
        """
        assert self._pool is not None
        with self.runner.turns.turn(), self._lock:
            self._catch_up()
            self._pool.make_room(size)
            prefix = self._with_room(load)
            self._pool.hold(prefix)
        return prefix

    def step(self) -> bool:
        """Run one pass of the sequences that take part; False: there are none."""
        with self.runner.turns.turn():
            with self._lock:
                self._catch_up()
                asked = next(chain(self._running, self._waiting), None)
            if asked is not None:
                self._step(asked)
            return asked is not None

    def steps(
        self, sequence: Sequence, observer: Observer | None = None, progress: Progress | None = None
    ) -> Generator[Step, None, None]:
        """Run a sequence to its end: a step per denoising pass."""
        return self._steps(Run(sequence, observer, progress))

    def _steps(self, run: Run) -> Generator[Step, None, None]:
        try:
            while self._advance(run):
                yield run.steps.popleft()
            error, run.error = run.error, None  # whose traceback refers to this frame
            if error is not None:
                try:
                    raise error
                finally:
                    del error
        finally:
            self._soon(partial(self._leave, run))

    def _advance(self, run: Run) -> bool:
        """Run passes, or wait while another thread does, until a run has a step; False: it has ended."""
        self._tell(run)
        while not run.steps and not run.ended:
            with self.runner.turns.turn():
                self._tell(run)
                if not run.steps and not run.ended:  # another thread's pass was its too
                    self._join(run)
                    self._step(run)
                    self._tell(run)
        return bool(run.steps)

    def _ready(self, run: Run) -> bool:
        """Whether a run has a step, or has ended."""
        self._tell(run)
        return bool(run.steps) or run.ended

    def _soon(self, action: Callable[[], None]) -> None:
        """Do something under the lock: now if it is free, else when it is taken next; never wait for it.

        The garbage collector calls finalizers anywhere: where this thread is changing what they would change,
        or holds a lock that the one which has this lock waits for.
        """
        self._later.append(action)
        owned = self._lock._is_owned()  # type: ignore[attr-defined]
        if not owned and self._lock.acquire(blocking=False):
            try:
                self._catch_up()
            finally:
                self._lock.release()

    def _catch_up(self) -> None:
        """Do what finalizers could not."""
        while self._later:
            self._later.popleft()()

    def _join(self, run: Run) -> None:
        """Queue a run, unless it has been."""
        with self._lock:
            self._catch_up()
            if run not in self._running and run not in self._waiting and not run.ended:
                self._waiting.append(run)
                run.joined = run.joined or time.perf_counter()

    def _leave(self, run: Run) -> None:
        """Free what a run holds; it takes part in no pass any more.

        What its cache has for others to come is held, however it ended, unless its logits were not finite: a
        pass that was cut short has written only after that.
        """
        with self._lock:
            self._note(run)
            if self._pool is not None:
                if run.kept is None and not run.left:
                    self._ended.add(run.sequence)
                    self._ended.finished += run.sequence.finished and run.error is None
                finite = not isinstance(run.error, NumericalError)
                if not finite:
                    self._pool.give_up_unchecked()
                held = self._pool.leave(run.sequence, keep=finite)
                if run.kept is not None and held is not None:
                    run.kept.append(held)
                run.sequence.cache = run.sequence.cache.emptied()
            run.left = True
            for runs in (self._waiting, self._running):
                if run in runs:
                    runs.remove(run)
                    self._full = False
            run.sequence.release()

    def _close(self, run: Run) -> None:
        """Leave, and have no error asked for, whose traceback may refer to the run."""
        self._leave(run)
        run.error = None

    # -- passes

    def prefill(self, sequence: Sequence, progress: Progress | None = None) -> None:
        """Take the whole blocks of a sequence's prompt into its cache."""
        run = Run(sequence, progress=progress)
        while not run.ended and run.prefills:
            self._run([run])
        if run.error is not None:
            raise run.error

    def _step(self, asked: Run) -> None:
        """Run one pass, and bring `asked` nearer to its next step."""
        with self._lock:
            self._catch_up()
            self._admit_waiting(asked)
            # For one that waits for memory without shared passes, those that have it go on, one by one.
            running = self._running if self._together or asked not in self._running else [asked]
            running = [run for run in running if not run.sequence.pending and not run.ended]
        if asked.sequence.pending and not asked.ended:
            raise LosartError("an observer cannot ask for a step of a generation whose pass it is told of")
        if not running and not asked.ended:
            raise LosartError("an observer cannot ask for a generation that waits for those it is told of")
        if not self._together:
            self._run(running[:1])
            # Where its stream is left now, what it has given is held all the same.
            if asked in running and not asked.ended and asked.commits:
                self._run(running)
            return
        prefilling = [run for run in running if run.sequence.prefilling]
        decoding = [run for run in running if not run.sequence.prefilling] if prefilling else running
        # Those that decode have a pass after so many tokens of prompts, which is one piece of a long one.
        beside = bool(decoding) and not self.prefill_first
        if prefilling and not (beside and self._prefilled >= self.runner.beside_tokens):
            self._run(self._pieces(prefilling, beside))
            return
        self._prefilled = 0.0
        self._run(self._batch(decoding, asked))

    def _pieces(self, prefilling: list[Run], beside: bool) -> list[Run]:
        """Whose prompts go through the model next, and how much of each; `beside` others' blocks."""
        left: float = self.runner.beside_tokens - self._prefilled if beside else self.runner.prefill_tokens
        pieces = list[Run]()
        for run in sorted(prefilling, key=lambda run: run.last_pass):
            sequence, before = run.sequence, run.sequence.cache.length
            cost = 1 + before / LONG_PREFIX if beside else 1.0
            length = sequence.options.block_length
            piece = max(left, self.runner.beside_tokens / LEAST_SHARE) / cost
            sequence.prefill_tokens = math.ceil(piece / length) * length
            pieces.append(run)
            taken = cost * min(sequence.prefill_tokens, sequence.prefill_end - before)
            self._prefilled += taken
            left -= taken
            if left <= 0 or self.runner.deterministic:  # with others its sums might be rounded otherwise
                break
        return pieces

    def _batch(self, decoding: list[Run], asked: Run) -> list[Run]:
        """Those whose rows fit in a pass, the one asked and those first that have waited longest."""
        most = self.runner.batch_rows
        if 2 * sum(run.sequence.options.block_length for run in decoding) <= most:
            return decoding
        decoding.sort(key=lambda run: (run is not asked, run.last_pass))
        rows, batch = 0, list[Run]()
        for run in decoding:
            rows += run.sequence.options.block_length * (1 + run.sequence.rides_next)
            if batch and rows > most:
                break
            batch.append(run)
        return batch

    def _admit_waiting(self, asked: Run) -> None:
        """Let waiting runs take part for which there are places; without shared passes the one asked."""
        if self._full and self._running:
            return
        places = self.max_sequences - len(self._running) if self._together else 1
        for run in list(self._waiting)[: max(0, places)] if self._together else [asked]:
            if run not in self._waiting:
                continue
            # Its place is kept meanwhile.
            if self._together and self._pool is not None and self._pool.awaits(run.sequence):
                continue
            if not self._admit(run):
                break

    def _admit(self, run: Run) -> bool:
        """Let a waiting run take part; False: it waits for memory."""
        sequence, pool = run.sequence, self._pool
        try:
            if pool is not None and not pool.join(sequence):
                self._full = True
                return False
            self._waiting.remove(run)
            self._running.append(run)
            if sequence.finished:  # all that it was to prefill was there
                self._end(run)
            elif sequence.slot is None and run.kept is None:  # prefill needs none
                sequence.slot = self._with_room(lambda: self.runner.new_slot(sequence.options))
        except Exception as error:
            if isinstance(error, MemoryError) and self._set_back(run):
                return False
            self._end(run, error)
        return True

    def _set_back(self, run: Run) -> bool:
        """Let a run wait, first of all, until another has ended; its cache is given up. False: none runs."""
        sequence = run.sequence
        if self._pool is None or not any(other is not run for other in self._running):
            return False
        try:
            cache = self.new_cache(sequence.prompt, sequence.options)
        except MemoryError:
            return False
        self._pool.leave(sequence, keep=False)
        sequence.set_back(cache)
        self._full = True
        if run in self._running:
            self._set_backs += 1
            self._running.remove(run)
            self._waiting.appendleft(run)
        return True

    def _set_back_youngest(self) -> bool:
        """Set back the run that was admitted last of those that prefill can restore; False: it cannot be."""
        able = [run for run in self._running if run.sequence.replaceable]
        return bool(able) and self._set_back(able[-1])

    def _with_room(self, allocate: Callable[[], Room]) -> Room:
        """Allocate something, if need be where an engine of the model held prefixes for nobody."""
        while True:
            try:
                return allocate()
            except MemoryError:
                if not any(pool.give_up() for pool in tuple(self.runner.pools)):
                    raise

    def _reserve(self, runs: list[Run]) -> list[Run]:
        """Make room in some runs' caches for their next pass; returns those that have it and go on."""
        short = [run for run in runs if run.sequence.room < run.sequence.next_end]
        for run in short:
            try:
                while not self._reserve_one(run):
                    pass
            except Exception as error:
                self._end(run, error)
        return [run for run in runs if not run.left and run not in self._waiting] if short else runs

    def _reserve_one(self, run: Run) -> bool:
        with self._lock:  # one that another thread closes has no cache any more
            if run.ended or run in self._waiting:
                return True
            sequence, end = run.sequence, run.sequence.next_end
            try:
                self._with_room(lambda: sequence.cache.reserve(end))
            except MemoryError:
                if not self._set_back_youngest():
                    raise
                return False
            sequence.room = end
        return True

    def _run(self, runs: list[Run]) -> None:
        """Run the passes that some sequences want next as one; what raises ends those whose pass it was."""
        try:
            self._forward(self._reserve(runs))
        except Exception as error:
            self._end_pending(runs, error)
        except BaseException:
            self._end_pending(runs, LosartError("the pass was interrupted"))
            raise

    def _end_pending(self, runs: list[Run], error: Exception) -> None:
        for run in runs:
            if run.sequence.pending:
                self._end(run, error)

    def _forward(self, runs: list[Run]) -> None:
        self._passes += 1
        with self._lock:
            passes = [(run, requests) for run in runs if (requests := self._request(run))]
        one_group = _sort(passes, self.runner.same_sums)
        left = [passes] if passes else []
        while left:
            some = left.pop()
            try:
                self._forward_together(some, one_group)
            except Exception as error:
                again = [one for one in some if _repeatable(one[1])] if len(some) > 1 else []
                for one in some:
                    one[0].spoilt = True
                    if one not in again:
                        self._end(one[0], error)
                if len(again) == len(some):  # fewer rows take less memory, and whose error it is shows
                    left += again[len(again) // 2 :], again[: len(again) // 2]
                elif again:
                    left.append(again)

    def _forward_together(self, passes: list[tuple[Run, tuple[SequencePass, ...]]], one_group: bool) -> None:
        """Run some sequences' passes in one forward; an Exception comes before any has been applied."""
        began = time.perf_counter()
        sequences = tuple(chain.from_iterable(requests for _, requests in passes))
        batch = PassBatch(sequences, self.runner.same_sums, one_group)
        observe = any(run.observer is not None for run, _ in passes)
        begin = partial(self._begin, passes, batch, observe)
        finish = self._with_room(begin) if all(_repeatable(one) for _, one in passes) else begin()
        self._tell()  # of the pass before, while this one is under way
        result = finish()
        ended = time.perf_counter()
        done = Done(result.reads, len(passes), ended - began, ended, result.experts_used)
        self._count(batch, done)
        proposing = [(run.sequence, requests[-1]) for run, requests in passes if len(requests[-1].proposed)]
        fixed = iter(_fixed(result.proposals, proposing))
        index = 0
        for run, requests in passes:
            after = next(fixed) if len(requests[-1].proposed) else None
            if not run.left:
                self._apply(run, requests, after, done, index, result.layers)
            index += len(requests)
        if batch.kind is PassKind.PREFILL:  # once all are applied: who is told may ask for others' steps
            for run, _ in passes:
                self._report(run)

    def _begin(
        self, passes: list[tuple[Run, tuple[SequencePass, ...]]], batch: PassBatch, observe: bool
    ) -> Callable[[], PassResult]:
        """Launch a pass; what one that failed found stored is stored again before."""
        try:
            for run, requests in passes:
                if run.spoilt:
                    for before in run.sequence.passes_before(requests[-1]):
                        self.runner.begin(PassBatch((before,)))()
                    run.spoilt = False
            return self.runner.begin(batch, observe)
        except Exception:
            for run, _ in passes:
                run.spoilt = True
            raise

    def _count(self, batch: PassBatch, done: Done) -> None:
        if batch.kind is PassKind.PREFILL:
            self._prefilled_tokens += batch.tokens
        else:
            self._block_passes += 1
            self._block_sequences += done.sequences
            self._block_seconds += done.seconds
            if done.experts_used is not None:
                self._experts_used.add(done.experts_used, 1)

    def _request(self, run: Run) -> tuple[SequencePass, ...]:
        """What a run wants next; nothing where it has been closed, or an error ends it."""
        sequence = run.sequence
        if run.left:
            return ()
        try:
            requests = sequence.next_pass()
        except Exception as error:
            self._end(run, error)
            return ()
        if not run.last_pass and run.joined:
            sequence.queue_seconds = time.perf_counter() - run.joined
        run.last_pass = self._passes
        return requests

    def _apply(
        self,
        run: Run,
        requests: tuple[SequencePass, ...],
        after: Fixed | Exception | None,
        done: Done,
        index: int,
        layers: Ids[tuple[ObservedLayer, ...]],
    ) -> None:
        """Apply a pass's result to its sequence and call its listeners; an error ends this run alone.

        `index` is that of the first of `requests` among the pass's sequences.
        """
        sequence = run.sequence
        try:
            if isinstance(after, Exception):
                raise after
            sequence.apply(*after or ())
            if requests[0].kind is PassKind.PREFILL:
                sequence.prefill_seconds += done.seconds
                return
            with self._lock:
                if not run.left:
                    self._untold[run] = done, index, len(requests), requests[0].prefix_length
            if run.observer is not None:
                of_run = layers[index : index + len(requests)]
                for step, of_pass in zip(sequence.steps(), of_run, strict=True):
                    run.observer(replace(step, layers=of_pass))
        except Exception as error:
            self._note(run)
            self._end(run, error)
            return
        except BaseException:
            self._note(run)
            self._end(run, LosartError("the pass was interrupted"))
            raise
        if sequence.finished:
            self._end(run)

    def _report(self, run: Run) -> None:
        """Say how far a run's prompt has come; an error of who is told ends this run alone."""
        sequence = run.sequence
        if run.left:
            return
        try:
            if run.progress is not None:
                # Who was told before may have had passes run over its blocks.
                done, of = min(sequence.cache.length, sequence.prefill_end), sequence.prefill_end
                run.progress(done - sequence.found, of - sequence.found)
        except Exception as error:
            self._end(run, error)
            return
        except BaseException:
            self._end(run, LosartError("the pass was interrupted"))
            raise
        if sequence.finished and not run.left:
            self._end(run)

    def _note(self, run: Run) -> bool:
        """Note what a run's last pass took and read; False: that has been done."""
        noted = self._untold.pop(run, None)
        if noted is None:
            return False
        done, index, count, prefix_length = noted
        sequence, heads = run.sequence, self.runner.config.num_kv_heads
        sequence.decode_seconds += done.seconds
        sequence.shared += done.sequences
        if done.experts_used is not None:
            sequence.experts_used.add(done.experts_used, 1)
        if sequence.first_token_seconds is None and sequence.output.tokens:
            sequence.first_token_seconds = done.ended - run.joined
        for read in done.reads[index : index + count]:
            sequence.reads.add(read, prefix_length, heads)
            prefix_length += sequence.options.block_length
        return True

    def _tell(self, *runs: Run) -> None:
        """Give these runs, or all, their steps of the last pass."""
        with self._lock:
            for run in runs or list(self._untold):
                if not self._note(run):
                    continue
                sequence = run.sequence
                if not (run.each_step or sequence.finished):
                    continue
                try:
                    done = sequence.steps()
                    steps = [step for step in done if step.kind != PassKind.COMMIT.value]
                    if sequence.finished:  # perhaps by what a commit gave
                        steps = steps or done[-1:]
                        steps[-1] = replace(steps[-1], result=sequence.result())
                    if steps and (logprobs := sequence.logprobs(run.logprobs_told)) is not None:
                        steps[-1] = replace(steps[-1], logprobs=logprobs)
                        run.logprobs_told += len(logprobs)
                except Exception as error:  # decoding may raise
                    self._end(run, error)
                else:
                    run.steps += steps

    def _end(self, run: Run, error: Exception | None = None) -> None:
        """Take a run that has ended out of the passes to come."""
        self._tell(run)
        if run.error is None:
            run.error = error if error is None else _to_keep(error)
        self._leave(run)


def _sort(passes: list[tuple[Run, tuple[SequencePass, ...]]], alike: bool) -> bool:
    """Bring passes together that share their operations, of those first the ones whose commits ride.

    Returns whether all share them.
    """
    keys = [operations_key(requests, alike) for _, requests in passes]
    passes.sort(key=lambda one: -len(one[1]))
    if all(key == keys[0] for key in keys):
        return True

    def order(one: tuple[Run, tuple[SequencePass, ...]]) -> tuple[Any, ...]:
        *key, attention = operations_key(one[1], alike)
        # Pieces of prompts are each by itself, in the order in which they came.
        return tuple(key) if one[1][0].kind is PassKind.PREFILL else (*key, id(attention))

    passes.sort(key=order)  # equal options of attention are one: generation_config
    return False


def _repeatable(requests: tuple[SequencePass, ...]) -> bool:
    """Whether a pass that failed can be run again.

    A sparse commit cannot that goes on in a page: it reads the page's bounds, which it may have widened.
    """
    first = requests[0]
    sparse = first.kind is PassKind.COMMIT and first.options.attention.commit == "sparse"
    return not sparse or first.prefix_length % first.cache.page_size == 0


def _to_keep(error: Exception) -> Exception:
    """An error until somebody asks for it; want of memory as our own.

    The tracebacks of ours tell nothing, and would keep alive what the pass allocated, and its caches.
    """
    if isinstance(error, MemoryError) and not isinstance(error, LosartError):
        error, cause = OutOfMemoryError(f"no memory for a generation: {error or 'on the host'}"), error
        error.__cause__ = cause
    if isinstance(error, LosartError):
        one: BaseException | None = error
        while one is not None:
            one.__traceback__ = None
            one = one.__cause__ or one.__context__
    return error


def _fixed(
    proposals: Proposals | None, proposing: list[tuple[Sequence, SequencePass]]
) -> list[Fixed] | list[Fixed | Exception]:
    """Each sequence's block after the pass, or an error: of a hook, or where proposals are not finite."""
    if proposals is None:
        return []
    errors = dict[int, Exception]()
    if proposals.logits is not None:
        proposals, errors = revised(proposals, proposing)
    fixed = remask(proposals, [asked for _, asked in proposing])
    finite = proposals.finite
    if not errors and (finite is None or finite.all()):
        return fixed
    ends = np.cumsum([len(asked.proposed) for _, asked in proposing])
    for index, rows in enumerate([] if finite is None else np.split(finite, ends[:-1])):
        if not rows.all():
            errors[index] = NumericalError(NOT_FINITE)
    return [errors.get(index, after) for index, after in enumerate(fixed)]
