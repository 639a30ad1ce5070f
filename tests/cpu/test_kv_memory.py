"""Generations wait for memory, make room for one another, and lose nothing by it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from by_rows import model_by_rows
from scarce_memory import ScarceMemory

import losart
from losart import LosartError, OptionError, OutOfMemoryError
from losart.measure.random_checkpoint import write_checkpoint

RANDOM = np.random.default_rng(8).integers(0, 256, 2000).tolist()
ATTENTION: list[dict[str, Any]] = [
    {},
    {"attention": "losa", "budget": 32},
    {"attention": "losa", "budget": 32, "selector": "anchor", "block_length": 6},
    {"attention": "quest", "budget": 48, "temperature": 0.9, "seed": 3, "block_length": 7},
    {"attention": "sparsed", "budget": 32},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> losart.Model:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}
    return model_by_rows(write_checkpoint(tmp_path_factory.mktemp("small"), **small))


@pytest.fixture
def memory(model, monkeypatch) -> ScarceMemory:
    memory = ScarceMemory()
    memory.install(model._engine.runner.backend, monkeypatch)
    return memory


@pytest.fixture(scope="module")
def chunk(model) -> int:
    """Bytes of 256 positions."""
    return model._engine.runner.backend.new_cache(16, 256).chunk_bytes


def options(**changed: Any) -> dict[str, Any]:
    return {"block_length": 4, "stop_token_ids": [], "max_new_tokens": 20} | changed


def prompt(number: int, length: int = 200) -> list[int]:
    return RANDOM[200 * number :][:length]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), float("inf"), "8GiB", True, np.zeros(3)])
def test_wrong_limits(model, wrong):
    with pytest.raises(OptionError, match="kv_memory must be a whole number of bytes above 0"):
        losart.Engine(model, kv_memory=wrong)


def test_what_can_never_fit_is_refused_at_once(model, chunk):
    engine = losart.Engine(model, kv_memory=2 * chunk)
    engine.submit(RANDOM[:500], **options(max_new_tokens=12))
    message = rf"520 positions in chunks of 256, takes {3 * chunk} bytes, and kv_memory is {2 * chunk}"
    with pytest.raises(OutOfMemoryError, match=message):
        engine.submit(RANDOM[:500], **options(max_new_tokens=17))
    assert engine.submit(RANDOM[:500], **options(max_new_tokens=12)).result().token_ids


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("sequences", [1, 16])
def test_there_is_never_more_than_the_limit(model, memory, chunk, chunks, sequences):
    """And they come in order, as many at a time as there is room for."""
    engine = losart.Engine(model, max_sequences=sequences, kv_memory=chunks * chunk)
    came: list[int] = []
    streams = [
        engine.submit(prompt(number), progress=lambda *_, number=number: came.append(number), **options())
        for number in range(6)
    ]
    results = [stream.result() for stream in streams]
    assert list(dict.fromkeys(came)) == list(range(6))
    assert 0 < memory.most <= chunks * chunk and not memory.refused
    assert [result.token_ids for result in results] == [
        model.generate(prompt(number), **options()).token_ids for number in range(6)
    ]
    shared = [result.stats.mean_sequences for result in results]
    assert max(shared) <= min(chunks, sequences)
    assert (max(shared) > 1) == (min(chunks, sequences) > 1)


def test_what_is_shared_needs_no_room(model, memory, chunk):
    """A document of two chunks, and answers in a third one of their own."""
    document = RANDOM[:600]
    for chunks in (6, 5):
        memory.most = 0
        engine = losart.Engine(model, kv_memory=chunks * chunk)
        streams = [engine.submit([*document, number], **options()) for number in range(4)]
        shared = [stream.result().stats.mean_sequences for stream in streams]
        assert memory.most <= chunks * chunk
        assert (min(shared) > 2) == (chunks == 6)


def test_who_is_behind_one_that_waits_for_memory_waits(model, chunk):
    engine = losart.Engine(model, kv_memory=3 * chunk)
    first = engine.submit(prompt(0), **options(max_new_tokens=50))
    large, small = engine.submit(RANDOM[400:1100], **options()), engine.submit(prompt(2), **options())
    next(first)
    assert len(engine._engine._running) == 1 and len(engine._engine._waiting) == 2
    first.cancel()
    next(large)
    assert len(engine._engine._running) == 1
    assert small.result().stats.queue_seconds > large.result().stats.queue_seconds


def test_what_is_held_makes_room_that_first_which_was_used_least_recently(model, memory, chunk):
    engine = losart.Engine(model, kv_memory=3 * chunk)

    def reused(number: int) -> int:
        return engine.submit(prompt(number), **options()).result().stats.reused_tokens

    assert [reused(number) for number in (0, 1, 2, 0, 3, 0, 1)] == [0, 0, 0, 192, 0, 192, 0]
    assert memory.in_use == 3 * chunk
    assert engine.submit(RANDOM[1000:1700], **options()).result().stats.reused_tokens == 0
    assert memory.in_use == 3 * chunk
    assert reused(0) == 0


@pytest.mark.parametrize("attention", ATTENTION, ids=["dense", "losa", "anchor", "quest", "sparsed"])
@pytest.mark.parametrize("sequences", [1, 16])
def test_who_is_set_back_goes_on_without_loss(model, memory, chunk, attention, sequences):
    """Answers grow into second chunks, for which there is no memory while all are under way."""
    chosen = options(max_new_tokens=130) | attention
    prompts = [prompt(one, 150 + 10 * one) for one in range(5)]
    expected = [model.generate(one, **chosen) for one in prompts]
    memory.limit = 4 * chunk
    engine = losart.Engine(model, max_sequences=sequences)
    streams = [engine.submit(one, **chosen) for one in prompts]
    for stream in streams[:4]:
        next(stream)
    found = [stream.result() for stream in reversed(streams)][::-1]
    assert memory.refused and engine.stats.set_back
    for one, alone in zip(found, expected, strict=True):
        assert one.token_ids == alone.token_ids
        assert one.stats.denoising_passes == alone.stats.denoising_passes
    assert not engine._engine._running and not engine._engine._waiting


def test_who_is_set_back_gives_its_memory_up_at_once(model, memory, chunk):
    """Before its last step has been asked for."""
    chosen = options(max_new_tokens=300)
    expected = [model.generate(prompt(one, 40 + one), **chosen).token_ids for one in range(2)]
    memory.limit = 3 * chunk
    engine = losart.Engine(model)
    streams = [engine.submit(prompt(one, 40 + one), **chosen) for one in range(2)]
    assert [stream.result().token_ids for stream in streams] == expected
    assert engine.stats.set_back


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_that_is_set_back_is_enough(model, memory, chunk, count):
    """Its chunk is free before the step of its last pass has been told."""
    memory.limit = count * chunk
    engine = losart.Engine(model)
    prompts = [prompt(0, 200), *(prompt(one, 120 - 20 * one) for one in range(1, count))]
    streams = [engine.submit(one, **options(max_new_tokens=100)) for one in prompts]
    assert [len(stream.result().token_ids) for stream in streams] == [100] * count
    assert engine.stats.set_back == 1


def test_a_stream_may_be_collected_while_it_is_admitted(model):
    engine = losart.Engine(model)
    engine.submit(prompt(0, 400), **options()).result()
    dropped = [engine.submit(prompt(0, 400), **options())]
    other = engine.submit(prompt(3), **options())
    cache = engine._engine._waiting[0].sequence.cache
    allocate = cache._new_chunk

    def collecting() -> Any:
        dropped.clear()
        return allocate()

    cache._new_chunk = collecting
    assert len(other.result().token_ids) == options()["max_new_tokens"] and not dropped
    assert not engine._engine._running and not engine._engine._pool._running


def test_what_is_held_is_not_what_makes_an_allocation_fail(model, memory, chunk):
    memory.limit = 3 * chunk
    engine = losart.Engine(model, max_sequences=4)
    for start in range(0, 1200, 100):
        found = engine.submit(RANDOM[start : start + 600], **options()).result()
        assert found.stats.reused_tokens == 0


def test_what_an_engine_holds_makes_room_for_others_of_the_model(model, memory, chunk):
    memory.limit = 3 * chunk
    engine = losart.Engine(model)
    engine.submit(RANDOM[:600], **options()).result()
    assert engine.stats.kv_bytes_held == 3 * chunk
    assert model.generate(RANDOM[700:1200], **options()).token_ids
    assert engine.stats.kv_bytes_held == 0


def test_a_short_prompt_leaves_nothing(model):
    engine = losart.Engine(model)
    engine.submit(RANDOM[:9], **options(max_new_tokens=2)).result()
    assert engine.stats.kv_bytes_held == 0 and not engine._engine._pool._held


@pytest.mark.parametrize(("block_length", "reused"), [(4, [512, 688]), (7, [0, 672])])
def test_part_of_a_chunk_is_copied_where_there_is_room_for_two(model, memory, chunk, block_length, reused):
    chosen = options(block_length=block_length)
    document = RANDOM[:700]
    expected = model.generate(document, **chosen).token_ids
    for chunks, wanted in ((3, reused[0]), (4, reused[1])):
        memory.most = 0
        engine = losart.Engine(model, kv_memory=chunks * chunk)
        engine.submit(document, **chosen).result()
        found = engine.submit(document, **chosen).result()
        assert found.stats.reused_tokens == wanted and found.token_ids == expected
        assert memory.most <= chunks * chunk


def test_whole_chunks_serve_where_there_is_no_memory_for_a_copy(model, memory, chunk):
    engine = losart.Engine(model)
    expected = engine.submit(RANDOM[:700], **options()).result()
    memory.limit = memory.in_use
    found = engine.submit(RANDOM[:700], **options()).result()
    assert memory.refused and found.stats.reused_tokens == 512
    assert found.token_ids == expected.token_ids


def test_progress_begins_anew_for_one_that_was_set_back(model, memory, chunk):
    seen: list[tuple[int, int]] = []
    engine = losart.Engine(model)
    engine.submit(prompt(1, 100), **options()).result()
    memory.limit = 3 * chunk
    first = engine.submit(prompt(0), **options(max_new_tokens=150))
    second = engine.submit(prompt(1), progress=lambda *done: seen.append(done), **options(max_new_tokens=150))
    assert [len(stream.result().token_ids) for stream in (first, second)] == [150, 150]
    assert engine.stats.set_back == 1
    assert len(seen) == 2 and seen[0] == (104, 104) and 0 < seen[1][0] == seen[1][1] > 200


def test_who_cannot_go_on_alone_ends(model, memory, chunk):
    memory.limit = chunk
    engine = losart.Engine(model)
    stream, other = (engine.submit(prompt(one), **options(max_new_tokens=90)) for one in range(2))
    with pytest.raises(OutOfMemoryError, match="no memory for 260 positions"):
        stream.result()
    with pytest.raises(OutOfMemoryError):
        other.result()
    del stream, other
    assert engine.submit(prompt(3), **options()).result().token_ids
    assert memory.in_use == chunk


def test_one_with_sparse_commits_is_not_set_back(model, memory, chunk, monkeypatch):
    """Although it began last: prefill would not give its answer's keys."""
    chosen = options(max_new_tokens=90, attention="quest", budget=32)
    sparse = chosen | {"commit": "sparse"}
    expected = [model.generate(prompt(0, 230), **chosen), model.generate(prompt(1, 150), **sparse)]
    memory.limit = 2 * chunk
    engine = losart.Engine(model)
    streams = [engine.submit(prompt(0, 230), **chosen), engine.submit(prompt(1, 150), **sparse)]
    next(streams[1])
    first, second = engine._engine._running
    set_back, act = [], engine._engine._set_back
    monkeypatch.setattr(engine._engine, "_set_back", lambda run: (set_back.append(run), act(run)))
    results = [stream.result().token_ids for stream in streams]
    assert set_back == [first] and second.sequence.commit_passes
    assert results == [alone.token_ids for alone in expected]


@pytest.mark.parametrize("held", [True, False])
def test_no_memory_for_stored_results(model, monkeypatch, held):
    """What is held makes room; without it, one waits until another has ended."""
    engine = losart.Engine(model)
    chosen = options(attention="losa", budget=32, max_new_tokens=40)
    expected = [model.generate(prompt(one), **chosen).token_ids for one in range(2)]
    if held:
        engine.submit(prompt(3), **options()).result()
    else:
        other = engine.submit(prompt(0), **chosen)
        next(other)
    runner, refused = model._engine.runner, []
    new_slot = runner.new_slot

    def scarce(chosen: Any) -> Any:
        if engine._engine._pool._held or engine._engine._running[1:]:
            refused.append(chosen)
            raise OutOfMemoryError("no memory for stored results")
        return new_slot(chosen)

    monkeypatch.setattr(runner, "new_slot", scarce)
    found = engine.submit(prompt(1), **chosen).result()
    assert refused
    assert found.token_ids == expected[1]
    assert held or other.result().token_ids == expected[0]


def test_no_memory_for_a_pass(model, monkeypatch):
    engine = losart.Engine(model)
    engine.submit(prompt(0), **options()).result()
    runner, refused = model._engine.runner, []
    begin = runner.begin

    def scarce(*args: Any) -> Any:
        if engine._engine._pool._held:
            refused.append(1)
            raise OutOfMemoryError("no memory for a pass")
        return begin(*args)

    expected = model.generate(prompt(1), **options()).token_ids
    monkeypatch.setattr(runner, "begin", scarce)
    assert engine.submit(prompt(1), **options()).result().token_ids == expected
    assert refused


def test_an_observer_cannot_ask_for_what_waits_for_those_it_is_told_of(model, chunk):
    engine = losart.Engine(model, kv_memory=chunk)
    chosen = options(max_new_tokens=4, denoising_steps=1)
    stream = engine.submit(
        prompt(0), observer=lambda step: engine.submit(prompt(1), **chosen).result(), **chosen
    )
    with pytest.raises(LosartError, match="waits for those it is told of"):
        stream.result()
    assert engine.submit(prompt(1), **chosen).result().token_ids


def test_who_waits_is_not_looked_at_before_every_pass(model, chunk, monkeypatch):
    """Looking takes time with long prompts and many prefixes."""
    engine = losart.Engine(model, kv_memory=4 * chunk)
    looks, find = [], engine._engine._pool._find
    monkeypatch.setattr(engine._engine._pool, "_find", lambda one: (looks.append(one), find(one))[1])
    streams = [engine.submit(RANDOM[:900], **options(max_new_tokens=40)) for _ in range(3)]
    streams += [engine.submit(prompt(4), **options()) for _ in range(3)]
    steps = sum(1 for stream in streams for _ in stream)
    assert steps > 100 and len(looks) < 30


def test_the_next_is_admitted_when_the_one_before_it_no_longer_waits(model, chunk):
    engine = losart.Engine(model, kv_memory=3 * chunk)
    first = engine.submit(prompt(0), **options(max_new_tokens=50))
    large, small = engine.submit(RANDOM[400:1100], **options()), engine.submit(prompt(2), **options())
    next(first)
    large.cancel()
    next(first)
    assert engine.stats.running == 2 and small.result().stats.mean_sequences > 1


@pytest.mark.parametrize("sequences", [1, 4])
def test_threads_share_little_memory(model, memory, chunk, sequences):
    """Some cancel what another thread runs at that time."""
    expected = [model.generate(prompt(one), **options()).token_ids for one in range(8)]
    memory.most = 0
    engine = losart.Engine(model, max_sequences=sequences, kv_memory=3 * chunk)
    streams = [engine.submit(prompt(one % 8), **options()) for one in range(24)]
    results: list[Any] = [None] * 24

    def ask(one: int) -> None:
        if one % 3 == 2:
            next(streams[one], None)
            streams[one].cancel()
        else:
            results[one] = streams[one].result().token_ids

    threads = [threading.Thread(target=ask, args=(one,)) for one in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [result for one, result in enumerate(results) if one % 3 != 2] == [
        expected[one % 8] for one in range(24) if one % 3 != 2
    ]
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_bytes_in_use) == (0, 0, 0)
    assert memory.most <= 3 * chunk and memory.in_use == stats.kv_bytes_held


def test_figures_of_an_engine(model, memory, chunk):
    engine = losart.Engine(model, max_sequences=2, kv_memory=4 * chunk)
    streams = [engine.submit(prompt(0), **options()) for _ in range(3)]
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_memory) == (0, 3, 4 * chunk)
    others = vars(stats).keys() - {"running", "waiting", "kv_memory", "kv", "matrix_bytes"}
    assert {getattr(stats, name) for name in others} == {0, None}
    assert stats.tokens_per_second == 0.0
    next(streams[1])
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_bytes_in_use) == (2, 1, 2 * chunk)
    assert stats.mean_queue_seconds > 0
    results = [stream.result() for stream in streams]
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.finished, stats.kv_bytes_in_use) == (0, 0, 3, 0)
    assert stats.kv_bytes_held == chunk == memory.in_use
    assert (stats.reused_tokens, stats.prefilled_tokens) == (2 * 192, 200 + 2 * 8)
    assert stats.passes * stats.mean_sequences == sum(one.stats.forward_passes for one in results)
    assert 1 < stats.mean_sequences <= 2
    engine.submit(prompt(1), **options()).cancel()
    assert engine.stats == stats


def test_figures_of_an_engine_are_those_of_its_generations(model):
    engine = losart.Engine(model, max_sequences=2)
    chosen = options(attention="quest", budget=32)
    streams = [engine.submit(prompt(one), **(chosen if one else options())) for one in range(3)]
    found = [stream.result().stats for stream in streams]
    stats = engine.stats
    assert stats.new_tokens == sum(one.new_tokens for one in found) == 60
    weights = [one.denoising_passes + one.commit_passes for one in found]
    assert stats.density == pytest.approx(np.average([one.density for one in found], weights=weights))
    assert stats.density < 1
    assert stats.mean_queue_seconds == pytest.approx(np.mean([one.queue_seconds for one in found]))
    assert stats.mean_first_token_seconds == pytest.approx(
        np.mean([one.first_token_seconds for one in found])
    )
    own = [one.decode_seconds for one in found]
    assert max(own) < stats.decode_seconds < sum(own)
    assert stats.tokens_per_second == 60 / stats.decode_seconds


def test_figures_have_what_is_under_way_and_what_was_left(model):
    engine = losart.Engine(model)
    first, second = (engine.submit(prompt(one), **options(denoising_steps=1)) for one in range(2))
    next(first)
    next(first)
    first.cancel()
    assert engine.stats.new_tokens == 8 + 8  # prompts were prefilled together
    for _ in range(3):
        next(second)
    stats = engine.stats
    assert (stats.running, stats.finished, stats.new_tokens) == (1, 0, 8 + 12)
    assert stats.mean_first_token_seconds > 0 and stats.density == 1.0
    second.close()
    assert engine.stats.new_tokens == 8 + 12


def test_figures_have_the_last_pass_of_one_that_is_left_before_it_is_told(model):
    engine = losart.Engine(model)
    first, second = (engine.submit(prompt(one), **options(denoising_steps=1)) for one in range(2))
    next(first)
    second.cancel()
    first.close()
    ended = engine._engine._ended
    assert ended.reads.density == 1.0 and ended.first_token._count == 2
    assert engine.stats.new_tokens == 8


def test_figures_say_what_is_shared(model, chunk):
    engine = losart.Engine(model)
    engine.submit(RANDOM[:600], **options()).result()
    streams = [engine.submit([*RANDOM[:600], number], **options()) for number in range(3)]
    next(streams[0])
    stats = engine.stats
    assert (stats.kv_bytes_in_use, stats.kv_bytes_shared) == ((2 + 3) * chunk, 2 * 2 * chunk)
    for stream in streams:
        stream.cancel()
    assert engine.stats.kv_bytes_shared == 0


def test_a_prefix_is_no_generation(model, tmp_path):
    engine = losart.Engine(model)
    engine.save_prefix(prompt(0), tmp_path / "prefix.kv", **options())
    stats = engine.stats
    assert (stats.finished, stats.mean_queue_seconds, stats.prefilled_tokens) == (0, None, 200)
