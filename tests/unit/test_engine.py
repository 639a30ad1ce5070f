"""The engine's loop with a scripted model: who shares a pass, who waits, and whom an error ends."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from kv import model_config
from scripted import Cache, Scripted

from losart.config.options import generation_config
from losart.engine.batch import PassBatch, PassKind, PassReads, PassResult
from losart.engine.engine import Engine
from losart.engine.sampling import Proposals
from losart.engine.stream import Stream
from losart.errors import LosartError, NumericalError, OutOfMemoryError

BLOCK = 4
MASK = 63
MODEL = model_config(1, 1, 16)


@dataclass(kw_only=True)
class Runner(Scripted):
    """Notes each pass's kinds and first ids, and proposes its rows' numbers."""

    config: Any = MODEL
    batch_rows: int = 64
    prefill_tokens: int = 8
    beside_tokens: int = 4
    passes: list[list[tuple[str, int]]] = field(default_factory=list)
    fails: set[int] = field(default_factory=set)  # first ids of prompts whose logits are not finite
    during: Any = None  # called in each pass

    def forward(self, batch: PassBatch, observe: bool = False) -> PassResult:
        self.passes.append([(one.kind.value, one.cache.name) for one in batch.sequences])
        if self.during is not None:
            self.during()
        proposals: list[Any] = []
        for one in batch.sequences:
            if one.kind.denoises:
                count = len(one.masked)
                ones = np.ones(count, np.float32)
                proposed = Proposals(np.array(one.masked), ones, ones)
                fails = one.cache.name in self.fails
                proposals.append(Proposals.not_finite(count) if fails else proposed)
        if batch.kind is PassKind.PREFILL:
            return PassResult()
        reads = [PassReads(False, 1, 0, 0, 0)] * len(batch.sequences)
        proposed = Proposals.joined(proposals) if proposals else None
        return PassResult(proposed, reads, [()] * len(batch.sequences) if observe else ())


def submit(engine: Engine, name: int, prompt: int = 4, new: int = 8, **more: Any) -> Stream:
    options = generation_config(
        MODEL,
        {"mask_token_id": MASK, "stop_token_ids": [], "block_length": BLOCK, "max_new_tokens": new}
        | {"denoising_steps": 2, "remasking": "sequential"},
    )
    cache = Cache()
    cache.name = name
    engine.new_cache = lambda prompt, options: cache
    return engine.submit([1] * prompt, options, **more)


def started(engine: Engine, *prompts: int, **more: Any) -> list[Stream]:
    streams = [submit(engine, name, prompt, **more) for name, prompt in enumerate(prompts)]
    for stream in streams:
        stream.start()
    return streams


def test_short_prompts_are_prefilled_together():
    engine = Engine(runner := Runner(prefill_tokens=10), 16)
    for stream in started(engine, 4, 4, 4, 4, 9):
        stream.result()
    prefills = [passed for passed in runner.passes if passed[0][0] == "prefill"]
    # 10 tokens in whole blocks, then a piece beside those that decode; the longest has two blocks.
    assert prefills[0] == [("prefill", 0), ("prefill", 1), ("prefill", 2)]
    assert prefills[1:] == [[("prefill", 3)], [("prefill", 4)], [("prefill", 4)]]
    engine = Engine(runner := Runner(prefill_tokens=10, deterministic=True), 16)
    for stream in started(engine, 4, 4):
        stream.result()
    assert max(len(passed) for passed in runner.passes if passed[0][0] == "prefill") == 1


def test_who_is_told_of_a_prefill_may_ask_for_steps_of_others_in_it():
    engine = Engine(runner := Runner(), 16)
    told = []

    def progress(done, of):
        told.append((done, of, next(other)))

    theirs = []
    asked = submit(engine, 0, 4, progress=progress)
    other = submit(engine, 1, 4, progress=lambda *ends: theirs.append(ends))
    asked.start()
    other.start()
    assert asked.result().token_ids == other.result().token_ids
    assert runner.passes[0] == [("prefill", 0), ("prefill", 1)]
    assert len(told) == 1 and told[0][:2] == (4, 4) and told[0][2] is not None
    assert theirs == [(4, 4)]


@pytest.mark.parametrize("rides", [False, True])
def test_sequences_that_have_been_started_share_passes(rides):
    engine = Engine(runner := Runner(rides=rides), 16)
    results = [stream.result() for stream in started(engine, 4, 4, 4)]
    assert [result.token_ids for result in results] == [[0, 1, 2, 3] * 2] * 3
    assert all(result.stats.rides == int(rides) for result in results)
    together = [passed for passed in runner.passes if passed[0][0] != "prefill"]
    # All but the passes that the first ones have while others are prefilled.
    assert sum(len({name for _, name in passed}) == 3 for passed in together) >= 2
    assert len(together) < 3 * (4 + (not rides))


def test_figures_of_waiting_and_sharing():
    engine = Engine(runner := Runner(), max_sequences=2)
    runner.during = lambda: time.sleep(0.002)
    first, second, third = (stream.result().stats for stream in started(engine, 4, 4, 4))
    assert first.queue_seconds < 0.002 and third.queue_seconds > 0.008
    for stats in (first, second, third):
        assert stats.queue_seconds + 0.002 < stats.first_token_seconds
    assert first.first_token_seconds < third.first_token_seconds
    assert 1 < first.mean_sequences <= 2 and 1 <= third.mean_sequences <= 2
    alone = submit(Engine(Runner()), 0).result().stats
    assert alone.mean_sequences == 1


def test_one_that_was_not_started_waits_until_it_is_asked():
    engine = Engine(runner := Runner(), 16)
    first, second = submit(engine, 1), submit(engine, 2)
    first.result()
    assert {name for passed in runner.passes for _, name in passed} == {1}
    assert second.result().token_ids == first.result().token_ids


@pytest.mark.parametrize(("rows", "sequences"), [(0, 16), (64, 1)])
def test_what_is_asked_alone_is_run_alone(rows, sequences):
    engine = Engine(runner := Runner(batch_rows=rows), sequences)
    first, second = started(engine, 4, 4)
    next(first)
    assert {name for passed in runner.passes for _, name in passed} == {0}
    assert second.result().token_ids == first.result().token_ids
    assert all(len(passed) == 1 for passed in runner.passes)


def test_between_two_pieces_of_a_prompt_all_others_have_a_pass():
    engine = Engine(runner := Runner(), 16)
    short, long = submit(engine, 0, 4, new=40), submit(engine, 1, 80, new=4)
    next(short)
    long.start()
    for _ in short:
        pass
    kinds = [passed[0][0] for passed in runner.passes]
    pieces = [index for index, kind in enumerate(kinds) if kind == "prefill"]
    assert len(pieces) == 21 and all(b - a >= 2 for a, b in itertools.pairwise(pieces[1:]))


def test_prompts_may_come_first():
    engine = Engine(runner := Runner(prefill_tokens=16), 16, prefill_first=True)
    short, long = submit(engine, 0, 4, new=40), submit(engine, 1, 80, new=4)
    next(short)
    long.start()
    for _ in short:
        pass
    assert len(long.result().token_ids) == 4
    kinds = [passed[0][0] for passed in runner.passes]
    assert kinds[:2] == ["prefill", "first"] and kinds[2:7] == ["prefill"] * 5 and "prefill" not in kinds[7:]


def test_pieces_beside_others_are_smaller_the_longer_the_prefix(monkeypatch):
    monkeypatch.setattr("losart.engine.engine.LONG_PREFIX", 32)
    engine = Engine(runner := Runner(beside_tokens=16), 16)
    short, long = submit(engine, 0, 4, new=60), submit(engine, 1, 80, new=4)
    next(short)
    long.start()
    for _ in short:
        pass
    kinds = [passed[0][0] for passed in runner.passes]
    # Of 16 tokens, two of 12 and five of 8: 16 over 1 and a 32nd of the prefix, in whole blocks.
    assert kinds.count("prefill") == 1 + 8
    assert "prefill prefill" not in " ".join(kinds[1:])


def test_a_long_prompt_goes_on_beside_short_ones_that_keep_coming():
    engine = Engine(runner := Runner(beside_tokens=16), 16)
    asked, long = submit(engine, 0, 4, new=200), submit(engine, 1, 80, new=4)
    next(asked)
    long.start()
    others = [submit(engine, name, 12, new=4) for name in range(2, 12)]
    for other in others:
        other.start()
        next(asked)
    together = [passed for passed in runner.passes if passed[-1] == ("prefill", 1) and len(passed) > 1]
    assert len(together) >= 4 and any(("first", 1) in passed for passed in runner.passes)


@pytest.mark.parametrize("alike", [False, True])
def test_dense_passes_with_and_without_a_commit_share_operations_unless_sums_must_be_the_same(alike):
    engine = Engine(runner := Runner(rides=True, same_sums=alike), 16)
    seen = []
    begin = runner.begin

    def noting(batch, observe=False):
        names = [one.cache.name for one in batch.sequences]
        if len({names.count(name) for name in names}) > 1:
            seen.append(len(batch.groups()))
        return begin(batch, observe)

    runner.begin = noting
    streams = [submit(engine, name, 4, new=new) for name, new in enumerate((12, 12, 40))]
    next(streams[2])
    for stream in streams[:2]:
        stream.start()
    for stream in streams:
        stream.result()
    assert seen and set(seen) == {2 if alike else 1}


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one():
    engine = Engine(runner := Runner(), 16)
    asked, long, short = submit(engine, 0, 4, new=60), submit(engine, 1, 80), submit(engine, 2, 4)
    next(asked)
    long.start()
    short.start()
    for _ in asked:
        pass
    first = next(n for n, passed in enumerate(runner.passes) if passed == [("prefill", 2)])
    last = max(n for n, passed in enumerate(runner.passes) if passed == [("prefill", 1)])
    assert first < 6 < last


def test_no_more_than_so_many_sequences_and_rows_take_part():
    engine = Engine(runner := Runner(), max_sequences=2)
    for stream in started(engine, 4, 4, 4, 4, 4):
        stream.result()
    assert max(len(passed) for passed in runner.passes) == 2
    engine = Engine(runner := Runner(batch_rows=3 * BLOCK), 16)
    streams = started(engine, 4, 4, 4, 4, 4, new=40)
    streams[0].result()
    assert max(len(passed) for passed in runner.passes) == 3
    # Who was left out is next.
    shares = [sum(name == other for passed in runner.passes for _, name in passed) for other in range(1, 5)]
    assert max(shares) - min(shares) <= 5  # those prefilled first have begun before


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_passes_for_which_there_is_no_memory_are_divided(most):
    engine = Engine(runner := Runner(), 16)
    begin = runner.begin

    def scarce(batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        if len(batch.sequences) > most and batch.kind is not PassKind.PREFILL:
            raise MemoryError("no memory for a pass")
        return begin(batch, observe)

    runner.begin = scarce  # type: ignore[method-assign]
    streams = started(engine, 4, 4, 4, 4, 4)
    if most:
        assert all(len(stream.result().token_ids) == 8 for stream in streams)
        over_blocks = [passed for passed in runner.passes if passed[0][0] != "prefill"]
        assert max(map(len, over_blocks)) == most
        return
    for stream in streams:
        with pytest.raises(MemoryError, match="for a pass"):
            stream.result()
    assert not engine._running


@pytest.mark.parametrize("kind", [PassKind.PREFILL, PassKind.FIRST])
@pytest.mark.parametrize("late", [False, True])
def test_what_one_sequence_makes_a_pass_raise_ends_it_alone(kind, late):
    engine = Engine(runner := Runner(prefill_tokens=64), 16)
    begin = runner.begin

    def failing(batch: PassBatch, observe: bool = False) -> Callable[[], PassResult]:
        fails = batch.kind is kind and any(one.cache.name == 1 for one in batch.sequences)
        if fails and not late:
            raise ZeroDivisionError("at once")
        finish = begin(batch, observe)

        def finish_or_fail() -> PassResult:
            result = finish()
            if fails:
                raise ZeroDivisionError("with its result")
            return result

        return finish_or_fail

    runner.begin = failing  # type: ignore[method-assign]
    streams = started(engine, 4, 4, 4, 4)
    for name in (0, 2, 3):
        assert streams[name].result().token_ids == [0, 1, 2, 3] * 2
    with pytest.raises(ZeroDivisionError):
        streams[1].result()
    assert not engine._running


def test_numbers_that_are_not_finite_end_one_sequence():
    engine = Engine(Runner(fails={1}), 16)
    streams = started(engine, 4, 4, 4)
    assert streams[0].result().token_ids == streams[2].result().token_ids
    with pytest.raises(NumericalError, match="not finite"):
        streams[1].result()


def test_an_observer_that_raises_ends_its_own_sequence():
    engine = Engine(Runner(), 16)

    def fail(step: Any) -> None:
        raise ZeroDivisionError

    first, second = submit(engine, 1, observer=fail), submit(engine, 2)
    first.start()
    assert len(second.result().token_ids) == 8
    with pytest.raises(ZeroDivisionError):
        next(first)


def test_a_cache_that_cannot_grow_ends_its_own_sequence():
    engine = Engine(Runner(), 16)
    first, second = submit(engine, 1, new=40), submit(engine, 2, new=40)
    cache = Cache()

    def full(positions: int) -> None:
        if positions > 12:
            raise OutOfMemoryError("full")

    first.start()
    (run,) = engine._waiting
    run.sequence.cache = cache
    cache.name, cache.reserve = 1, full
    assert len(second.result().token_ids) == 40
    with pytest.raises(OutOfMemoryError, match="full"):
        first.result()


def test_what_a_pass_raises_ends_those_whose_pass_it_was():
    engine = Engine(runner := Runner(), 16)
    streams = started(engine, 4, 4)

    def fail() -> None:
        if len(runner.passes[-1]) == 2:
            raise KeyboardInterrupt

    runner.during = fail
    later = submit(engine, 3)
    with pytest.raises(KeyboardInterrupt):
        streams[0].result()
    with pytest.raises(LosartError, match="interrupted"):
        streams[1].result()
    assert len(later.result().token_ids) == 8


def test_closing_and_forgetting_a_stream_frees_its_place():
    engine = Engine(Runner(), max_sequences=2)
    first, other, second = started(engine, 4, 4, 4, new=40)
    next(first)
    run, _ = engine._running
    first.close()
    assert run.sequence.slot is None and len(engine._running) == 1
    with pytest.raises(LosartError, match="closed before its end"):
        first.result()
    next(second)
    del second, other
    assert not engine._running and not engine._waiting
    third = submit(engine, 3)
    third.start()
    del third  # nobody has asked it for a step
    assert not engine._waiting


def test_an_observer_may_generate_and_not_ask_for_its_own():
    engine = Engine(Runner(), 16)
    inner = []

    def generate(step: Any) -> None:
        inner.append(submit(engine, 9, new=4).result().token_ids)

    alone = [(step.block_start, step.fixed) for step in submit(Engine(Runner(), 16), 1)]
    observed = [(step.block_start, step.fixed) for step in submit(engine, 1, observer=generate)]
    assert observed == alone, "its own passes go on within those that the observer asks for"
    assert inner and all(tokens == [0, 1, 2, 3] for tokens in inner)

    streams: list[Stream] = []
    streams.append(submit(engine, 1, observer=lambda step: next(streams[1])))
    streams.append(submit(engine, 2))
    streams[1].start()
    with pytest.raises((LosartError, ValueError), match=r"whose pass|already executing"):
        while True:
            next(streams[0])


def test_places_are_taken_when_a_stream_is_asked_for_where_passes_are_not_shared():
    engine = Engine(runner := Runner(), 1)
    streams = started(engine, 4, 4, 4)
    next(streams[1])
    assert runner.slots == 1 and len(engine._running) == 1


def test_what_has_ended_is_freed_while_its_stream_is_kept():
    engine = Engine(Runner(), 16)
    streams = started(engine, 4, 4)
    caches = [weakref.ref(run.sequence.cache) for run in engine._waiting]
    next(streams[0])
    streams[0].result()
    streams[1].cancel()
    del engine.new_cache
    assert [cache() for cache in caches] == [None, None]


def test_threads_that_ask_have_turns():
    runner, order = Runner(), []
    runner.during = lambda: time.sleep(0.001)
    streams = [submit(Engine(runner, 1), name, new=40) for name in range(3)]

    def ask(name: int) -> None:
        for _ in streams[name]:
            order.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    first_end = min(max(i for i, name in enumerate(order) if name == other) for other in range(3))
    assert {order[:first_end].count(name) > 5 for name in range(3)} == {True}


@pytest.mark.parametrize("engines", [1, 12])
def test_streams_are_asked_by_threads(engines):
    runner = Runner()
    of_thread = [Engine(runner, 16) for _ in range(engines)]
    results: list[Any] = [None] * 12

    def generate(name: int) -> None:
        results[name] = submit(of_thread[name % engines], name, 4 + name, new=40).result().token_ids

    active = 0

    def alone() -> None:
        nonlocal active
        active += 1
        time.sleep(0.0005)
        assert active == 1
        active -= 1

    runner.during = alone
    threads = [threading.Thread(target=generate, args=(name,)) for name in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(tokens) == 40 for tokens in results)


@pytest.mark.parametrize("new", [8, 16])  # at the end of its output, and midway
def test_an_error_of_decoding_ends_its_own_sequence(new):
    def fail(ids: list[int]) -> str:
        if len(ids) > 6:
            raise ZeroDivisionError
        return "x" * len(ids)

    engine = Engine(Runner(), 16)
    bad, *others = submit(engine, 1, new=new, decode=fail), submit(engine, 2), submit(engine, 3)
    for stream in (bad, *others):
        stream.start()
    assert [len(stream.result().token_ids) for stream in others] == [8, 8]
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert not engine._running and not engine._untold


def test_a_text_that_is_asked_for_twice_at_once_is_whole():
    """By the thread that runs the pass, for an observer, and meanwhile by the one whose stream it is."""
    decoding = threading.Event()

    def slow(ids: list[int]) -> str:
        if threading.current_thread().name == "runs" and len(ids) == 8:
            decoding.set()
            time.sleep(0.2)
        return "x" * len(ids)

    engine = Engine(Runner(), 16)
    other = submit(engine, 1, new=16)
    stream = submit(engine, 2, decode=slow, observer=lambda step: None)
    for one in (other, stream):
        one.start()
    runs = threading.Thread(target=other.result, name="runs")
    runs.start()
    assert decoding.wait(5)
    assert stream.result().text == "x" * 8
    runs.join()


def test_a_stream_that_is_collected_waits_for_no_lock():
    """Its thread holds a lock that the thread wants which changes the engine's state, as the device's is."""
    memory, wanted = threading.Lock(), threading.Event()

    def reserve(positions: int) -> None:
        wanted.set()
        with memory:
            pass

    engine = Engine(Runner(), 16)
    stream, dropped = started(engine, 4, 4)
    engine._waiting[0].sequence.cache.reserve = reserve  # type: ignore[method-assign]
    runs = threading.Thread(target=stream.result, daemon=True)
    with memory:
        runs.start()
        assert wanted.wait(5)
        del dropped
    runs.join(5)
    assert not runs.is_alive() and not engine._later and not engine._running


def test_what_a_finalizer_asks_for_is_done_now_or_when_the_lock_is_free():
    engine, done = Engine(Runner()), list[str]()
    engine._soon(lambda: done.append("free"))
    assert done == ["free"]
    with engine._lock:
        engine._soon(lambda: done.append("within"))
        assert done == ["free"], "this thread is changing something"
    assert engine.stats and done == ["free", "within"]
