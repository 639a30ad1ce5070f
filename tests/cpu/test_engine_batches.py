"""Generations that share passes give what each gives alone, whatever shares them and whenever it joins."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from arrivals import check_arrivals, requests
from by_rows import model_by_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scarce_memory import PLACES, ScarceMemory, fail_at

import losart
from losart import OutOfMemoryError
from losart.engine.batch import PassKind
from losart.engine.stream import Stream

OPTIONS: list[dict[str, Any]] = [
    {},
    {"block_length": 7, "temperature": 0.8, "seed": 5},
    {"attention": "losa", "budget": 32},
    {"attention": "losa", "budget": 32, "active": 2, "remasking": "sequential"},
    {"attention": "losa", "budget": 32, "selector": "anchor", "block_length": 6},
    {"attention": "losa", "budget": 32, "commit": "sparse", "first_pass": "sparse"},
    {"attention": "quest", "budget": 48, "page_size": 48},
    {"attention": "sparsed", "budget": 32, "remasking": "low_confidence_static", "denoising_steps": 3},
    {"remasking": "entropy_bounded", "eb_threshold": 2.0, "top_k": 5, "temperature": 1.0, "seed": 1},
]
PROMPTS = [np.random.default_rng(seed).integers(0, 300, 3 + 90 * seed).tolist() for seed in range(6)]
PROMPTS.append(PROMPTS[3][:200] + PROMPTS[2])  # begins as another


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> losart.Model:
    return model_by_rows(tiny_checkpoint)


def options_of(number: int, new: int) -> dict[str, Any]:
    return {"block_length": 4, "stop_token_ids": [], "max_new_tokens": new, **OPTIONS[number]}


def facts(result: losart.GenerationResult) -> Any:
    stats = result.stats
    return (
        result.token_ids,
        result.finish_reason,
        (stats.denoising_passes, stats.commit_passes, stats.rides),
        stats.reused_tokens + stats.prefilled_tokens,
        (stats.density, stats.sparse_density, stats.active_fraction),
    )


ALONE: dict[Any, Any] = {}


def alone(model: losart.Model, prompt: int, number: int, new: int) -> Any:
    key = prompt, number, new
    if key not in ALONE:
        ALONE[key] = facts(model.generate(PROMPTS[prompt], **options_of(number, new)))
    return ALONE[key]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(requests(len(PROMPTS), len(OPTIONS)), min_size=1, max_size=9),
    st.sampled_from([1, 3, 16]),
    st.randoms(),
)
def test_each_generation_is_what_it_is_alone(model, asked, places, random):
    engine = losart.Engine(model, max_sequences=places)

    def submit(prompt: int, number: int, new: int) -> Stream:
        return engine.submit(PROMPTS[prompt], **options_of(number, new))

    def check(result: losart.GenerationResult, prompt: int, number: int, new: int) -> None:
        assert facts(result) == alone(model, prompt, number, new)

    check_arrivals(asked, random, submit, check)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(requests(len(PROMPTS), len(OPTIONS)), min_size=1, max_size=9),
    st.sampled_from([1, 3, 16]),
    st.sets(st.sampled_from(PLACES), min_size=1),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.randoms(),
)
def test_memory_runs_out_anywhere(model, asked, places, where, often, random):
    """A generation gives what it gives alone, or ends by itself, and nothing is left."""
    memory = ScarceMemory()
    runner = model._engine.runner
    engine = losart.Engine(model, max_sequences=places)
    on = True

    def fails(place: str) -> bool:
        return on and place in where and random.random() < often

    def submit(prompt: int, number: int, new: int) -> Stream:
        return engine.submit(PROMPTS[prompt], **options_of(number, new))

    def check(result: losart.GenerationResult, prompt: int, number: int, new: int) -> None:
        nonlocal on
        on = False
        assert facts(result) == alone(model, prompt, number, new)
        on = True

    with pytest.MonkeyPatch.context() as patch:
        memory.install(runner.backend, patch)
        memory.fails = lambda: fails("chunk")
        slots = fail_at(fails, runner, patch)
        check_arrivals(asked, random, submit, check, ends=(OutOfMemoryError,))
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.kv_bytes_in_use) == (0, 0, 0)
    assert not any(slot() for slot in slots)
    assert memory.in_use == stats.kv_bytes_held
    while engine._engine._pool.give_up():
        pass
    assert memory.in_use == 0


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_what_a_failed_pass_has_stored_changes_nothing(model, number, monkeypatch):
    """All passes fail while a prefix is held, then those of more than one; each when all of it is done.

    It ends who commits sparsely, since what that has written cannot be taken back.
    """
    runner, engine = model._engine.runner, losart.Engine(model)
    expected = [alone(model, prompt, number, 16) for prompt in range(2, 5)]
    engine.submit(PROMPTS[5], **options_of(0, 1)).result()
    begin, failed = runner.begin, []

    def scarce(batch: Any, observe: bool = False) -> Any:
        finish = begin(batch, observe)
        if engine._engine._pool._held or len({id(one.cache) for one in batch.sequences}) > 1:
            failed.append(batch.kind)
            raise OutOfMemoryError("no memory for the rest of a pass")
        return finish

    streams = [engine.submit(PROMPTS[prompt], **options_of(number, 16)) for prompt in range(2, 5)]
    for stream in streams:
        next(stream)
    monkeypatch.setattr(runner, "begin", scarce)
    found = []
    for stream in streams:
        try:
            found.append(facts(stream.result()))
        except OutOfMemoryError:
            assert OPTIONS[number].get("commit") == "sparse"
    assert len(found) == len(expected) or OPTIONS[number].get("commit") == "sparse"
    assert all(one in expected for one in found)
    assert PassKind.LATER in failed


def test_an_error_keeps_nothing_of_its_pass(model, monkeypatch):
    """Nor does it differ on the host, where memory is wanted for arrays of no backend."""
    kept = []

    def begin(batch: Any, observe: bool = False) -> Any:
        array = np.zeros(8)
        kept.extend(weakref.ref(one) for one in (array, *(one.cache for one in batch.sequences)))
        raise MemoryError("so much")

    engine = losart.Engine(model)
    streams = [engine.submit(PROMPTS[0], **options_of(number, 8)) for number in (0, 0, 2)]
    monkeypatch.setattr(model._engine.runner, "begin", begin)
    gc.disable()
    try:
        with pytest.raises(OutOfMemoryError, match="no memory for a generation: so much"):
            streams[0].result()
        assert kept and all(one() is None for one in kept), "although nobody has asked the others"
        streams[1].cancel()
        with pytest.raises(OutOfMemoryError):
            streams[2].result()
    finally:
        gc.enable()


def test_only_last_steps_where_no_others_are_wanted(model):
    """Some of a pass have each step, others the last one alone, whose texts and results are the same."""
    options = options_of(0, 24)
    engine = losart.Engine(model)
    each = [engine.submit(prompt, **options) for prompt in PROMPTS[:3]]
    last = [engine.submit(prompt, each_step=False, **options) for prompt in PROMPTS[:3]]
    steps = [list(stream) for stream in each]
    assert all(step.result is None for of_stream in steps for step in of_stream[:-1])
    for of_stream, stream in zip(steps, last, strict=True):
        (step,) = stream
        assert (step.kind, step.block_start, step.block, step.fixed, step.text) == (
            *(of_stream[-1].kind, of_stream[-1].block_start, of_stream[-1].block),
            *(of_stream[-1].fixed, of_stream[-1].text),
        )
        assert facts(stream.result())[:3] == facts(of_stream[-1].result)[:3]


def test_a_list_of_prompts_is_decoded_together(model, monkeypatch):
    rows = []
    begin = model._engine.runner.begin

    def noting(batch: Any, observe: bool = False) -> Any:
        rows.append(len(batch.sequences))
        return begin(batch, observe)

    monkeypatch.setattr(model._engine.runner, "begin", noting)
    for number in range(len(OPTIONS)):
        rows.clear()
        results = model.generate(PROMPTS, **options_of(number, 16))
        assert max(rows) >= len(PROMPTS)
        assert [facts(result) for result in results] == [
            alone(model, prompt, number, 16) for prompt in range(len(PROMPTS))
        ]
    rows.clear()
    steps: list[losart.Step] = []
    model.generate(PROMPTS[:3], observer=steps.append, **options_of(0, 8))
    starts = [step.block_start for step in steps]
    assert starts == sorted(starts) and max(rows) <= 2, "one after another, where somebody observes"


def test_a_wrong_prompt_of_many_is_named(model):
    with pytest.raises(losart.PromptError, match="prompt 2: the prompt is empty"):
        model.generate([PROMPTS[0], PROMPTS[1], [], PROMPTS[2]])
    with pytest.raises(losart.OptionError, match="max_sequences must be"):
        losart.Engine(model, max_sequences=0)


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("end", ["result", "cancel", "drop"])
def test_a_cache_is_freed_at_once(model, number, end):
    """Not when the garbage collector comes: a cache may be gigabytes."""
    engine = losart.Engine(model)
    other = engine.submit(PROMPTS[1], **options_of(0, 30))
    stream = engine.submit(PROMPTS[2], **options_of(number, 8))
    runs = [*engine._engine._waiting]
    cache, slot = weakref.ref(runs[1].sequence.cache), None
    del runs
    gc.disable()
    try:
        next(other)
        next(stream)
        slot = [weakref.ref(run.sequence.slot) for run in engine._engine._running if run.sequence.slot]
        if end == "result":
            stream.result()
        elif end == "cancel":
            stream.cancel()
        else:
            del stream
        assert cache() is None and not any(reference() for reference in slot)
    finally:
        gc.enable()
    assert other.result().token_ids


def test_nothing_is_left_of_many_requests(model):
    """Random requests, half of them cancelled on their way."""
    rng = np.random.default_rng(0)
    engine = losart.Engine(model, max_sequences=4)

    def ask(count: int) -> None:
        streams = [
            engine.submit(PROMPTS[rng.integers(3)], **options_of(int(rng.integers(len(OPTIONS))), 6))
            for _ in range(count)
        ]
        for stream in streams:
            if rng.random() < 0.5:
                stream.cancel()
            else:
                stream.result()

    def held() -> int:
        gc.collect()
        return len(gc.get_objects())

    ask(20)
    before = held()
    ask(60)
    assert held() - before < 200
    assert not engine._engine._running and not engine._engine._waiting


@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_passes_can_be_run_for_all_streams_at_once(model, sequences):
    """Who does never waits for one of them."""
    engine = losart.Engine(model, max_sequences=sequences)
    assert not engine.step()
    streams = {
        number: engine.submit(PROMPTS[number % len(PROMPTS)], **options_of(number, 9))
        for number in range(len(OPTIONS))
    }
    results: dict[int, losart.GenerationResult] = {}
    given = dict.fromkeys(streams, 0)
    while engine.step():
        for number, stream in streams.items():
            while number not in results and stream.ready:
                passes = engine.stats.passes
                step = next(stream)
                assert engine.stats.passes == passes
                given[number] += 1
                if step.result is not None:
                    results[number] = step.result
    assert results.keys() == streams.keys() and not engine.step()
    for number, result in results.items():
        prompt = number % len(PROMPTS)
        assert facts(result) == alone(model, prompt, number, 9)
        assert given[number] == result.stats.denoising_passes
        assert streams[number].ready and next(streams[number], None) is None


def test_streams_that_have_ended_are_ready(model, monkeypatch):
    engine = losart.Engine(model)
    cancelled, failing = (engine.submit([1, 2, 3], **options_of(0, 9)) for _ in range(2))
    assert not cancelled.ready and not failing.ready
    cancelled.cancel()
    assert cancelled.ready and next(cancelled, None) is None
    runner = model._engine.runner

    def fail(*_: Any) -> Any:
        raise OutOfMemoryError("no room")

    monkeypatch.setattr(runner, "begin", fail)
    assert engine.step() and failing.ready
    with pytest.raises(OutOfMemoryError):
        next(failing)
    assert failing.ready and not engine.step()
