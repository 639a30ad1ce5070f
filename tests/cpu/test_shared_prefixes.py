"""What prompts of an engine have in common is prefilled once, and changes no answer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from by_rows import model_by_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_api import spoil_row, with_tensor

import losart
from losart.config.options import generation_config
from losart.engine.kv_pool import common_length
from losart.measure.random_checkpoint import write_checkpoint

RANDOM = np.random.default_rng(7).integers(0, 256, 900).tolist()
LONG = np.random.default_rng(8).integers(0, 256, 2200).tolist()
DOCUMENT = RANDOM[:600]
PAGE = 16
ATTENTION: list[dict[str, Any]] = [
    {},
    {"attention": "losa", "budget": 32},
    {"attention": "quest", "budget": 48},
    {"attention": "losa", "budget": 32, "commit": "sparse", "first_pass": "sparse"},
]


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> losart.Model:
    return model_by_rows(tiny_checkpoint)


def options(**changed: Any) -> dict[str, Any]:
    return {"block_length": 4, "stop_token_ids": [], "max_new_tokens": 10} | changed


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
@pytest.mark.parametrize("attention", ATTENTION, ids=["dense", "losa", "quest", "sparse-commit"])
@pytest.mark.parametrize("common", [600, 599, 512, 300, 256, 255, 17, 16, 15, 0])
def test_what_prompts_begin_with_in_common_is_prefilled_once(model, common, attention, ended):
    engine = losart.Engine(model)
    first = engine.submit(DOCUMENT, **options(**attention, max_new_tokens=30))
    if ended:
        first.result()
    else:
        next(first)
    prompt = [*DOCUMENT[:common], *(token ^ 1 for token in DOCUMENT[common:]), *RANDOM[600:690]]
    found = engine.submit(prompt, **options(**attention)).result()
    assert found.stats.reused_tokens == common // PAGE * PAGE
    assert found.stats.reused_tokens + found.stats.prefilled_tokens == len(prompt) // 4 * 4
    chunk = model._engine.runner.backend.new_cache(PAGE, 256).chunk_bytes
    assert found.stats.kv_bytes_shared == common // 256 * chunk
    assert found.stats.kv_bytes == -(-(len(prompt) + found.stats.new_tokens) // 256) * chunk
    assert found.token_ids == model.generate(prompt, **options(**attention)).token_ids
    assert (
        first.result().token_ids
        == model.generate(DOCUMENT, **options(**attention, max_new_tokens=30)).token_ids
    )


@pytest.mark.gpu
@pytest.mark.parametrize("common", [600, 300, 256, 17, 0])
def test_what_prompts_begin_with_in_common_is_prefilled_once_on_cuda(tmp_path, common):
    """In float32, with calm attention: the pieces of a prompt round otherwise."""
    model = losart.load(write_checkpoint(tmp_path / "calm", head_gain=1.0), "cuda", "float32")
    engine = losart.Engine(model)
    engine.submit(DOCUMENT, **options()).result()
    prompt = [*DOCUMENT[:common], *(token ^ 1 for token in DOCUMENT[common:]), *RANDOM[600:690]]
    found = engine.submit(prompt, **options()).result()
    assert found.stats.reused_tokens == common // PAGE * PAGE
    assert found.token_ids == model.generate(prompt, **options()).token_ids


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("few", ["first", "second"])
@pytest.mark.parametrize("common", [2100, 1050, 17])
def test_prompts_share_whose_caches_have_chunks_of_other_sizes(
    tmp_path, monkeypatch, device, page_size, few, common
):
    """256 positions and 1,024, or 768 and 1,536: in float32, with calm attention, and bit for bit."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "head_dim": 16}
    path = write_checkpoint(tmp_path / "calm", head_gain=1.0, **(small if device == "cpu" else {}))
    model = losart.load(path, device, "float32")
    chosen = options(page_size=page_size)
    prompt = [*LONG[:common], *(token ^ 1 for token in LONG[common:2100]), *LONG[2100:2190]]
    engine = losart.Engine(model)
    for ids, small in ((LONG[:2110], few == "first"), (prompt, few == "second")):
        monkeypatch.setattr("losart.engine.kv_cache.FEW_POSITIONS", 8192 if small else 0)
        result = engine.submit(ids, **chosen).result()
    assert result.stats.reused_tokens == common // (step := np.lcm(page_size, 4)) * step
    assert result.token_ids == model.generate(prompt, **chosen).token_ids
    first, second = engine._engine._pool._held
    assert (first.positions_per_chunk < second.positions_per_chunk) == (few == "first")
    assert not {id(array) for chunk in first.chunks for array in chunk} & {
        id(array) for chunk in second.chunks for array in chunk
    }
    to_host = engine._engine.new_cache(prompt, generation_config(model.config, chosen)).arrays.to_host
    for axis, unit in ((3, 1), (2, 16 * page_size)):
        whole = [
            np.concatenate([to_host(chunk[axis == 2]) for chunk in prefix.chunks], axis)
            for prefix in (first, second)
        ]
        reused = [array.swapaxes(0, axis)[: result.stats.reused_tokens // unit] for array in whole]
        assert reused[0].tobytes() == reused[1].tobytes()


def test_what_is_shared_comes_before_what_is_copied_unless_that_is_longer(model, monkeypatch):
    monkeypatch.setattr("losart.engine.kv_cache.FEW_POSITIONS", 700)
    engine = losart.Engine(model)
    engine.submit(DOCUMENT, **options(max_new_tokens=200)).result()
    assert engine.submit(DOCUMENT[:500], **options()).result().stats.reused_tokens == 496
    large, small = engine._engine._pool._held

    def begins_with(prompt: list[int]) -> bool:
        stream = engine.submit(prompt, **options())
        next(stream)
        (run,) = engine._engine._running
        return run.sequence.cache.chunks[0][0] is small.chunks[0][0]

    assert begins_with([*DOCUMENT[:480], *RANDOM[600:700]])
    assert not begins_with(DOCUMENT)
    assert large.positions_per_chunk > small.positions_per_chunk


@pytest.mark.parametrize("chunks", [4, 6, 7])
def test_what_is_copied_takes_room_of_its_own(model, monkeypatch, chunks):
    """3 chunks for the prompt and its answer; beside it 4, as large as one, of what it begins with."""
    monkeypatch.setattr("losart.engine.kv_cache.FEW_POSITIONS", 700)
    chunk = model._engine.runner.backend.new_cache(16, 256).chunk_bytes
    engine = losart.Engine(model, kv_memory=chunks * chunk)
    engine.submit(DOCUMENT, **options(max_new_tokens=200)).result()
    stream = engine.submit(DOCUMENT, **options())
    next(stream)
    stats = engine.stats
    assert stats.reused_tokens == (592 if chunks > 6 else 0)
    assert stats.kv_bytes_in_use + stats.kv_bytes_held <= chunks * chunk
    assert stream.result().token_ids == model.generate(DOCUMENT, **options()).token_ids


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 3, 4, 7, 16]),
    st.sampled_from([16, 48]),
    st.integers(0, 599),
    st.integers(1, 400),
    st.sampled_from(range(len(ATTENTION))),
)
def test_whole_pages_and_blocks_are_shared(model, block_length, page_size, common, more, attention):
    chosen = options(block_length=block_length, page_size=page_size, **ATTENTION[attention])
    engine = losart.Engine(model)
    engine.submit(DOCUMENT, **chosen).result()
    prompt = [*DOCUMENT[:common], DOCUMENT[common] ^ 1, *RANDOM[:more]]
    found = engine.submit(prompt, **chosen).result()
    step = np.lcm(block_length, page_size)
    assert found.stats.reused_tokens == common // step * step
    assert found.token_ids == model.generate(prompt, **chosen).token_ids


@pytest.mark.parametrize("changed", [{"block_length": 8}, {"page_size": 32}])
def test_other_blocks_or_pages_are_not_shared(model, changed):
    engine = losart.Engine(model)
    engine.submit(DOCUMENT, **options()).result()
    stream = engine.submit(DOCUMENT, **options(**changed))
    next(stream)
    (run,) = engine._engine._running
    assert run.sequence.reused == 0
    assert engine.submit(DOCUMENT, **options()).result().stats.reused_tokens == 592


def test_a_prompt_with_more_than_8192_positions_begins_with_one_that_has_fewer(make_checkpoint):
    model = losart.load(make_checkpoint(max_positions=16384), "cpu")
    prompt = [token % 250 for token in range(6000)]
    engine = losart.Engine(model)
    engine.submit(prompt, **options()).result()
    stream = engine.submit(prompt, **options(max_new_tokens=3000))
    next(stream)
    (run,) = engine._engine._running
    assert run.sequence.reused == 6000
    assert engine.submit(prompt, **options()).result().stats.reused_tokens == 6000


@pytest.mark.parametrize(("commit", "shared"), [("dense", True), ("sparse", False)])
def test_an_answer_is_shared_where_its_commits_were_dense(model, commit, shared):
    chosen = options(attention="quest", budget=32, commit=commit, max_new_tokens=70)
    engine = losart.Engine(model)
    answer = engine.submit(DOCUMENT, **chosen).result().token_ids
    prompt = [*DOCUMENT, *answer, *RANDOM[600:690]]
    found = engine.submit(prompt, **chosen).result()
    assert found.stats.reused_tokens == (656 if shared else 592)
    if not shared:
        assert found.token_ids == model.generate(prompt, **chosen).token_ids


def test_prompts_that_come_together_wait_for_what_one_of_them_prefills(model):
    """And others do not wait with them."""
    engine = losart.Engine(model)
    prompts = [[*DOCUMENT, *RANDOM[600 + 30 * index : 620 + 30 * index]] for index in range(4)]
    prompts.insert(2, RANDOM[100:140])
    streams = [engine.submit(prompt, **options()) for prompt in prompts]
    next(streams[2])
    assert [run.sequence.reused for run in engine._engine._running[:2]] == [0, 0]
    results = [stream.result() for stream in streams]
    assert [result.stats.reused_tokens for result in results] == [0, 592, 0, 592, 592]
    assert [result.token_ids for result in results] == [
        model.generate(prompt, **options()).token_ids for prompt in prompts
    ]
    results = model.generate(prompts, **options())
    assert [result.stats.reused_tokens for result in results] == [0, 592, 0, 592, 592]


@pytest.mark.parametrize("end", ["cancel", "drop"])
def test_who_waited_for_a_prefill_goes_on_without_it(model, end):
    engine = losart.Engine(model)
    streams = [engine.submit(LONG[:1500], **options()) for _ in range(2)]
    short = engine.submit(RANDOM[:20], **options(max_new_tokens=40))
    next(short)
    assert len(engine._engine._waiting) == 1
    if end == "cancel":
        streams[0].cancel()
    else:
        del streams[0]
    (held,) = engine._engine._pool._held
    result = streams[-1].result()
    assert result.stats.reused_tokens == len(held.ids) < 1500
    assert result.token_ids == model.generate(LONG[:1500], **options()).token_ids


@pytest.mark.parametrize("attention", [{}, {"attention": "quest", "budget": 32}], ids=["dense", "quest"])
def test_numbers_that_are_not_finite_are_not_shared(make_checkpoint, attention):
    """Not even past the end of what is common, where zero weights would make NaN of them."""
    path = with_tensor(make_checkpoint(), "model.embed_tokens.weight", spoil_row(3, np.nan))
    model = losart.load(path, "cpu")
    clean = [4 + token for token in range(100)]
    engine = losart.Engine(model)
    for prompt in ([*clean, *[3] * 20], [*clean, 3]):
        bad = engine.submit(prompt, **options(**attention))
        good = engine.submit([*clean, *RANDOM[:6]], **options(**attention))
        with pytest.raises(losart.NumericalError):
            bad.result()
        assert (
            good.result().token_ids == model.generate([*clean, *RANDOM[:6]], **options(**attention)).token_ids
        )
        again = engine.submit([*clean, *RANDOM[:7]], **options(**attention)).result()
        assert again.stats.reused_tokens == 96
        assert again.token_ids == model.generate([*clean, *RANDOM[:7]], **options(**attention)).token_ids


def test_what_was_used_least_recently_is_given_up(model, monkeypatch):
    monkeypatch.setattr("losart.api.engine.HELD_PREFIXES", 2)
    engine = losart.Engine(model)

    def reused(start: int) -> int:
        return engine.submit(RANDOM[start : start + 100], **options()).result().stats.reused_tokens

    assert [reused(start) for start in (0, 200, 0, 400, 0, 200, 400)] == [0, 0, 96, 0, 96, 0, 0]


def test_a_prefix_within_another_is_held_once(model):
    engine = losart.Engine(model)
    for length in (100, 300, 200, 300):
        engine.submit(RANDOM[:length], **options(max_new_tokens=1)).result()
    (held,) = engine._engine._pool._held
    assert held.ids.tolist() == RANDOM[:288] and len(held.chunks) == 2


def test_the_engine_alone_holds_prefixes(model):
    engine = losart.Engine(model)
    stream = engine.submit(DOCUMENT, **options())
    next(stream)
    (run,) = engine._engine._running
    arrays = [weakref.ref(array) for chunk in run.sequence.cache.chunks for array in chunk]
    del run
    gc.disable()
    try:
        stream.result()
        assert any(array() is not None for array in arrays)
        del engine, stream
        assert not any(array() is not None for array in arrays)
    finally:
        gc.enable()


@pytest.mark.parametrize("sequences", [1, 16])
def test_who_comes_again_finds_what_was_cancelled(model, sequences):
    engine = losart.Engine(model, max_sequences=sequences)
    stream = engine.submit(DOCUMENT, **options())
    next(stream)
    (run,) = engine._engine._running
    arrays = [weakref.ref(array) for chunk in run.sequence.cache.chunks for array in chunk]
    before = engine.stats
    stream.cancel()
    assert not run.sequence.cache.chunks
    stats = engine.stats
    assert (stats.running, stats.kv_bytes_in_use, stats.kv_bytes_held) == (0, 0, before.kv_bytes_in_use)
    again = engine.submit(DOCUMENT, **options()).result()
    assert again.stats.reused_tokens == 592
    assert again.token_ids == model.generate(DOCUMENT, **options()).token_ids
    while engine._engine._pool.give_up():
        pass
    assert not any(array() is not None for array in arrays)


def test_who_is_cancelled_in_a_pass_leaves_what_was_there_before(model, monkeypatch):
    runner: Any = model._engine.runner
    engine, begin, lengths = losart.Engine(model), runner.begin, []
    stream = engine.submit(DOCUMENT, **options(max_new_tokens=80))

    def cancelled(batch: Any, *more: Any) -> Any:
        finish = begin(batch, *more)
        lengths.append(batch.sequences[0].cache.length)
        if lengths[-1] >= 616:
            stream.cancel()
        return finish

    monkeypatch.setattr(runner, "begin", cancelled)
    for _ in stream:
        pass
    monkeypatch.undo()
    (held,) = engine._engine._pool._held
    assert len(held.ids) == lengths[-1] // 16 * 16 == 608
    answer = model.generate(DOCUMENT, **options(max_new_tokens=80)).token_ids
    prompt = [*DOCUMENT, *answer[:14], *RANDOM[600:]]
    found = engine.submit(prompt, **options()).result()
    assert found.stats.reused_tokens == 608
    assert found.token_ids == model.generate(prompt, **options()).token_ids


def test_what_may_not_be_finite_is_given_up_where_logits_are_not(make_checkpoint):
    """Who is cancelled before a pass over a block has not been seen to be finite."""
    path = with_tensor(make_checkpoint(), "model.embed_tokens.weight", spoil_row(3, np.nan))
    engine = losart.Engine(losart.load(path, "cpu"))
    good, bad = [4 + token for token in range(100)], [*range(100, 200), 3, 3, 3, 3]
    engine.submit(good, **options()).result()

    def cancel(done: int, total: int) -> None:
        stream.cancel()

    stream = engine.submit(bad, progress=cancel, **options())
    assert list(stream) == [] and len(engine._engine._pool._held) == 2
    with pytest.raises(losart.NumericalError):
        engine.submit(bad, **options()).result()
    assert len(engine._engine._pool._held) == 1
    assert engine.submit(bad[:100], **options()).result().stats.reused_tokens == 0
    assert engine.submit(good, **options()).result().stats.reused_tokens == 96


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length(a, b):
    length = common_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
