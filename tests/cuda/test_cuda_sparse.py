"""Sparse attention on CUDA against the CPU backend and the float64 reference: kernels, then whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference as ref
from cuda_arrays import on_host, stored_array
from hypothesis import example, given
from hypothesis import strategies as st
from kv import held, steady
from passes import block_batch, write
from test_cuda_kernels import (
    DTYPES,
    KV,
    TOLERANCE,
    assert_close,
    cards,
    filled_cache,
    kv_format,
    new_backend,
    place,
    poison,
    random_pieces,
    shapes,
    to_device,
    widened,
)

import losart
from losart.backends.base import ActiveRule, ActiveTokens, Selection, StoredResults
from losart.backends.cpu.backend import CpuBackend
from losart.config.precision import Precision

pytestmark = pytest.mark.gpu


def simple(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of few bits, also in 16-bit dtypes: their sums of products are exact, and often tie."""
    return rng.integers(-40, 41, shape).astype(np.float32) / 16


def some_tokens(rng: np.random.Generator, tokens: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending tokens, and the same with what a device's list may have after them."""
    chosen = np.sort(rng.permutation(tokens)[: rng.integers(1, count + 1)]).astype(np.int32)
    return chosen, np.concatenate([chosen, np.full(count - len(chosen), -1, np.int32)])


class Case:
    """A prefix in the first layer of caches of both backends, and a block's queries."""

    def __init__(
        self,
        dtype: str,
        shape: dict[str, int],
        tokens: int,
        length: int,
        page_size: int,
        card: dict[str, Any],
        kv: str = "auto",
    ) -> None:
        self.rng = rng = np.random.default_rng(tokens + length)
        self.dtype, self.tokens, self.length, self.shape = dtype, tokens, length, shape
        heads = shape["kv_heads"] * shape["group"]
        self.q = simple(rng, tokens, heads, shape["width"])
        self.k, self.v = (simple(rng, length, shape["kv_heads"], shape["width"]) for _ in range(2))
        if kv != "auto":  # scales are powers of two
            self.k[..., 0] = self.v[..., 0] = {"int8": 127 / 16, "fp8": 448 / 64}[kv]
        self.backend = new_backend(dtype, card, kv, **shape)
        pieces = random_pieces(rng, length)
        self.cache = filled_cache(self.backend, self.k, self.v, page_size, pieces)
        self.cache.reserve(length + tokens)
        self.cpu = CpuBackend(self.backend.config, Precision.of(dtype, kv))
        cpu_cache = self.cpu.new_cache(page_size)
        write(cpu_cache, 0, self.k, self.v)
        cpu_cache.advance(length)
        slot = self.cpu.new_slot(StoredResults(tokens))
        self.cpu_batch = block_batch(cpu_cache, tokens, slot=slot)
        self.place()
        poison(self.backend)

    def place(self, slot: Any = None) -> None:
        self.pass_batch = block_batch(self.cache, self.tokens, slot=slot)
        with self.backend.memory.stream:
            self.batch = self.backend.runner.place(self.pass_batch)

    def listed(self, selection: Selection) -> list[list[int]]:
        """Page ids of each kv head that the device has selected."""
        (found,) = self.backend.on_host(selection, self.pass_batch)
        return [ids.tolist() for ids in found.pages]

    def device(self, array: np.ndarray) -> Any:
        return to_device(self.backend, array)

    def active(self, tokens: np.ndarray | None) -> ActiveTokens | None:
        return None if tokens is None else ActiveTokens(self.device(tokens[None]), None)


def listed_by_cpu(selection: Selection) -> list[list[int]]:
    (pages,) = selection.pages
    return [row[:count].tolist() for row, count in zip(pages.ids, pages.counts, strict=True)]


@pytest.mark.parametrize("values", [1, 7, 10**6])  # all pages tie, many, hardly any
@pytest.mark.parametrize("count", [1, 96, 97, 600])
@pytest.mark.parametrize("pages", [1, 97, 513, 2600, 9000])
def test_top_pages_of_any_number(pages, count, values):
    import cupy

    rng = np.random.default_rng(pages + count)
    backend = new_backend("float32", kv_heads=2, group=1, width=16, max_positions=16 * pages + 16)
    scores = rng.integers(0, values, (2, 3, pages)).astype(np.float32) - values // 2
    scores[:, 0, pages // 2] = np.nan
    cache = backend.new_cache(16)
    cache.reserve(1)
    cache.length = 16 * pages
    with backend.memory.stream:
        ids = cupy.full((2, 3, min(count, pages)), -2, np.int32)
        batch = place(backend, cache, 1)
        on_device = to_device(backend, scores[None, :, None])
        backend.selectors["device"].rank(0, on_device, batch, ids.shape[2], ids=ids)
    order = np.argsort(-np.where(np.isnan(scores), np.inf, scores), axis=-1, kind="stable")
    np.testing.assert_array_equal(np.sort(on_host(backend, ids)), np.sort(order[..., :count]))


def some_case(most: int = 2300) -> Any:
    return (
        st.sampled_from(DTYPES),
        shapes(),
        st.sampled_from([1, 3, 4, 5, 16, 32]),
        st.one_of(st.integers(0, 300), st.integers(900, most)),
        st.sampled_from([16, 48, 64]),
        cards(),
        KV,
    )


@steady(60)
@given(
    st.sampled_from([(2, 16), (9, 256)]),  # narrow, and more than a thread block loads at once
    *(st.integers(1, 70), st.integers(0, 70), st.sampled_from([None, None, 0.0, 1e-4, 1e-3, 0.05])),
    *(st.booleans(), st.booleans(), st.integers(0, 99)),
)
def test_active_tokens_are_those_of_the_cpu(sizes, tokens, count, threshold, masked_only, keep, seed):
    group, width = sizes
    rng = np.random.default_rng(seed)
    count = min(count, tokens)
    backend = new_backend("float32", kv_heads=2, group=group, width=width)
    cpu = CpuBackend(backend.config, Precision.of("float32"))
    previous = simple(rng, tokens, 2 * group, width)
    q = previous.copy()
    # Some do not change, some change alike, one may be no number.
    q[:, 0, 0] += rng.integers(0, 4, tokens)
    if seed % 5 == 0:
        q[rng.integers(tokens)] = np.nan
    masked = np.flatnonzero(rng.random(tokens) < 0.6).astype(np.int32)
    cache = backend.new_cache(16)
    cache.reserve(tokens)
    stored = StoredResults(tokens, attention=True)
    slot, cpu_slot = backend.new_slot(stored), cpu.new_slot(stored)
    rule = ActiveRule(count, threshold, masked_only, follow=False)
    with backend.memory.stream:
        batch = place(backend, cache, tokens, masked=masked, slot=slot)
        stored_array(backend, slot, "queries").set(previous, stream=backend.memory.stream)
        for follow in (False, keep):  # the second time the counter is as the first has left it
            rule = replace(rule, follow=follow)
            active = backend.selectors["device"].select_active(0, to_device(backend, q), batch, rule)
    cpu_slot.queries[0] = previous
    cpu_batch = block_batch(cpu.new_cache(16), tokens, masked=masked, slot=cpu_slot)
    by_cpu = cpu.selectors["auto"].select_active(0, q, cpu_batch, rule)
    (expected,), (expected_change,) = by_cpu.tokens, by_cpu.change
    arrays = (active.tokens, active.change, stored_array(backend, slot, "queries"))
    (found,), change, before = on_host(backend, *arrays)
    np.testing.assert_allclose(change, expected_change, rtol=1e-6)
    assert found[: len(expected)].tolist() == expected.tolist()
    assert (found[len(expected) :] == -1).all()
    np.testing.assert_array_equal(before, q if keep else previous)


@steady(60)
@given(*some_case(), st.integers(1, 60), st.booleans())
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "auto", 8, False)
@example("bfloat16", {"kv_heads": 2, "group": 8, "width": 128}, 32, 2300, 16, {}, "auto", 8, True)
@example("float16", {"kv_heads": 2, "group": 4, "width": 64}, 16, 33 * 16, 16, {}, "auto", 100, False)
@example("float16", {"kv_heads": 2, "group": 4, "width": 64}, 16, 33 * 16, 16, {}, "int8", 100, False)
@example("float16", {"kv_heads": 2, "group": 4, "width": 64}, 16, 33 * 16, 16, {}, "fp8", 100, False)
def test_selected_pages_are_those_of_the_cpu(dtype, shape, tokens, length, page_size, card, kv, count, every):
    case = Case(dtype, shape, tokens, length, page_size, card, kv)
    chosen, places = some_tokens(case.rng, tokens, min(tokens, 5))
    if every:
        chosen = places = None
    selector, cpu_selector = (backend.selectors["auto"] for backend in (case.backend, case.cpu))
    with case.backend.memory.stream:
        for _ in range(2):
            selection = selector.select_pages(0, case.device(case.q), case.active(places), case.batch, count)
    active = None if every else ActiveTokens([chosen], None)
    expected = cpu_selector.select_pages(0, case.q, active, case.cpu_batch, count)
    assert case.listed(selection) == listed_by_cpu(expected)


@steady(60)
@given(*some_case(), st.integers(1, 60), st.booleans())
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "auto", 20, False)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 0, 16, {}, "auto", 20, True)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "int8", 20, False)
@example("float16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "fp8", 20, True)
def test_attention_over_listed_pages(dtype, shape, tokens, length, page_size, card, kv, count, every):
    from losart.backends.cuda.results import PrefixParts

    case = Case(dtype, shape, tokens, length, page_size, card, kv)
    backend, rng = case.backend, case.rng
    chosen, places = some_tokens(rng, tokens, min(tokens, 5))
    if every:
        chosen, places = np.arange(tokens), None
    o = simple(rng, *case.q.shape)
    lse = simple(rng, *case.q.shape[:2])
    slot = backend.new_slot(StoredResults(tokens, attention=True))
    case.place(slot)
    later = [stored_array(backend, slot, name) for name in ("o", "lse")]
    into = o.copy(), lse.copy()
    stores = bool(count % 2)
    kept_queries, before = stored_array(backend, slot, "queries"), simple(rng, *case.q.shape)
    with backend.memory.stream:
        q = case.device(case.q)
        selection = backend.selectors["auto"].select_pages(0, q, case.active(places), case.batch, count)
        poison(case.backend)
        for array, values in zip(later, into, strict=True):
            array.set(values, stream=backend.memory.stream)
        kept_queries.set(before, stream=backend.memory.stream)
        at_once, refreshed = (
            backend.refresh_prefix_attention(0, q, selection, case.batch, store_queries=stores)
            for _ in range(2)
        )
        for array, merged in zip(into, on_host(backend, *backend.merge(at_once)), strict=True):
            array[chosen] = merged[: len(chosen)]
        parts = PrefixParts(*(case.device(x[None]) for x in (*into, np.ones_like(lse))))
        block = [case.device(simple(rng, tokens, shape["kv_heads"], shape["width"])) for _ in range(2)]
        found, expected = (
            backend.block_attention(q, *block, prefix, case.batch) for prefix in (refreshed, parts)
        )
        if every:
            loose = backend.merge(backend.sparse_prefix_attention(0, q, selection, case.batch))
    queries, fresh = on_host(backend, kept_queries), chosen if stores else []
    before[fresh] = case.q[fresh]
    np.testing.assert_array_equal(queries, before)
    # Merged within attention over the block: the same results are stored, and it sees them.
    for kept, merged in zip(on_host(backend, *later), into, strict=True):
        np.testing.assert_array_equal(kept, merged)
    found, expected = (widened(x, dtype) for x in on_host(backend, found, expected))
    assert_close(found, expected, TOLERANCE[dtype])
    found_o, found_lse = into
    if every:
        for array, other in zip(on_host(backend, *loose), (found_o, found_lse), strict=True):
            np.testing.assert_array_equal(array, other)
    group = shape["group"]
    lists = case.listed(selection)
    ((positions, reading),), _, _ = case.batch.buffers.fetch()
    assert reading == (3 if every else 2) * len(chosen)
    assert positions == (3 if every else 2) * sum(
        len(ref.positions_of_pages(np.array(ids, np.int32), page_size, length)) for ids in lists
    )
    for kv_head, ids in enumerate(lists):
        where = ref.positions_of_pages(np.array(ids, np.int32), page_size, length)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        k, v = (held(x, kv_format(case.backend)[0])[where, kv_head : kv_head + 1] for x in (case.k, case.v))
        o[chosen, heads], lse[chosen, heads] = ref.softmax_attention(case.q[chosen, heads], k, v)
    assert_close(found_o, o, TOLERANCE[dtype])
    finite = np.isfinite(lse)
    assert (found_lse == lse)[~finite].all()
    assert np.allclose(found_lse[finite], lse[finite], atol=2 * TOLERANCE[dtype], rtol=1e-5)


@steady(40)
@given(*some_case(1500), st.booleans())
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "auto", False)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 2300, 16, {}, "int8", False)
def test_masses_and_their_top_pages(dtype, shape, tokens, length, page_size, card, kv, summed):
    case = Case(dtype, shape, tokens, length, page_size, card, kv)
    backend = case.backend
    chosen, places = some_tokens(case.rng, tokens, min(tokens, 5))
    if summed:
        chosen = places = None
    pages, count = case.cache.pages, 4
    rows = shape["group"] * (1 if summed else tokens)
    case.place(backend.new_slot(StoredResults(tokens, top_pages=count, top_pages_rows=rows)))
    with backend.memory.stream:
        prefix, masses = backend.prefix_attention_and_masses(0, case.device(case.q), case.batch)
        o, _ = backend.merge(prefix)
        backend.store_top_pages(0, masses, case.batch, count, summed=summed)
        selector = backend.selectors["auto"]
        found = selector.select_stored_pages(0, case.active(places), case.batch)
        by_bound, both = (
            None
            if summed
            else selector.select_pages(
                0, case.device(case.q), case.active(places), case.batch, count, with_stored=with_stored
            )
            for with_stored in (False, True)
        )
    (cpu_o, _), (expected,) = case.cpu.prefix_attention_and_masses(0, case.q, case.cpu_batch)
    assert_close(on_host(backend, o), cpu_o, TOLERANCE[dtype])
    units = page_size // 16
    masses = on_host(backend, masses[0, ..., : -(-length // 16)]).astype(np.float64)
    masses = np.pad(masses, [(0, 0)] * 3 + [(0, pages * units - masses.shape[-1])])
    masses = masses.reshape(*masses.shape[:3], pages, units).sum(axis=-1)
    # Scores of up to 40, of which a 16-bit product loses a thousandth.
    assert np.allclose(masses, expected, rtol=1e-3 if dtype == "float32" else 0.25, atol=1e-4)
    # The pages selected are the top ones by the device's own masses.
    rows = masses.sum(axis=1, keepdims=True) if summed else masses[:, chosen]
    lists = case.listed(found)
    if both is not None:
        united = [sorted({*stored, *ids}) for stored, ids in zip(lists, case.listed(by_bound), strict=True)]
        assert case.listed(both) == united
    for kv_head, of_head in enumerate(rows.reshape(rows.shape[0], rows.shape[1] * rows.shape[2], pages)):
        top = np.sort(of_head, axis=1)[:, ::-1][:, : min(count, pages)]
        chosen_pages = lists[kv_head]
        assert len(chosen_pages) <= count * len(of_head) and sorted(set(chosen_pages)) == chosen_pages
        for row, best in zip(of_head, top, strict=True):
            within = np.sort(row[chosen_pages])[::-1][: len(best)]
            np.testing.assert_allclose(within, best, rtol=1e-5)


# Whole models

METHODS: list[dict[str, Any]] = [
    {"attention": "losa", "active": 5},
    {"attention": "losa", "active": 2, "commit": "sparse"},
    {"attention": "losa", "active": 0},
    {"attention": "losa", "active": 0, "drift": "refresh", "dense_layers": 1},
    {"attention": "losa", "drift": "refresh", "candidates": "masked"},
    {"attention": "losa", "selector": "anchor"},
    {
        "attention": "losa",
        "selector": "anchor",
        "drift": "refresh",
        "candidates": "masked",
        "commit": "sparse",
    },
    {"attention": "quest"},
    {"attention": "quest", "commit": "sparse", "dense_layers": 2},
    {"attention": "sparsed"},
    {"attention": "sparsed", "page_size": 48},
    {"attention": "losa", "first_pass": "sparse"},
    {"attention": "quest", "first_pass": "dense"},
    {"attention": "losa"},
    {"attention": "losa", "change_threshold": 0, "commit": "sparse"},
    {"attention": "losa", "change_threshold": 1},
    {"attention": "losa", "change_threshold": 0.02, "drift": "previous", "candidates": "masked"},
    {"attention": "losa", "change_threshold": 0.05, "selector": "anchor", "dense_layers": 1},
    {"attention": "losa", "change_threshold": 0.02, "selector": "quest"},
    {"attention": "losa", "active": 3, "selector": "both", "commit": "sparse"},
]
PROMPT = np.random.default_rng(0).integers(0, 300, 611).tolist()


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items())


@pytest.fixture(scope="module")
def models(tiny_checkpoint) -> list[losart.Model]:
    return [losart.load(tiny_checkpoint, device=device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("method", METHODS, ids=name_of)
@pytest.mark.parametrize("length", [5, 611])
@pytest.mark.parametrize("block_length", [1, 8])
def test_tokens_and_reads_are_those_of_the_cpu(models, method, length, block_length):
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": block_length, "budget": 64}
    options |= {"remasking": "low_confidence_static"} | method
    if isinstance(options.get("active"), int):
        options["active"] = min(options["active"], block_length)
    cpu, cuda = models
    expected = cpu.generate(PROMPT[:length], **options)
    for _ in range(2):  # the second replays what the first captured
        found = cuda.generate(PROMPT[:length], **options)
        assert found.token_ids == expected.token_ids
        for figure in ("density", "sparse_density", "active_fraction"):
            a, b = getattr(found.stats, figure), getattr(expected.stats, figure)
            assert a == (b if b is None else pytest.approx(b, rel=0.01))


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_host_selects_what_the_device_selects(models, method):
    _, cuda = models
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 8, "budget": 64, **method}
    seen: dict[str, list[Any]] = {"device": [], "host": []}
    for planner, layers in seen.items():
        cuda.generate(
            PROMPT,
            planner=planner,
            observer=lambda each, layers=layers: layers.extend(
                (layer.active.tolist(), [ids.tolist() for ids in layer.pages]) for layer in each.layers
            ),
            **options,
        )
    assert seen["host"] == seen["device"]


@pytest.mark.parametrize("method", [METHODS[0], METHODS[5], METHODS[7], METHODS[13]], ids=name_of)
def test_two_hundred_passes_over_a_growing_prefix(models, method):
    _, cuda = models
    options = {"max_new_tokens": 208, "stop_token_ids": [], "block_length": 16, "budget": 64, **method}
    options |= {"remasking": "low_confidence_static"}
    device, host = (cuda.generate(PROMPT, planner=planner, **options) for planner in ("device", "host"))
    assert device.stats.denoising_passes >= 200
    assert host.token_ids == device.token_ids


def test_everything_read_and_active_is_dense_attention(models):
    _, cuda = models
    options = {"max_new_tokens": 40, "stop_token_ids": [], "block_length": 8}
    dense = cuda.generate(PROMPT, **options).token_ids
    for method in ({"attention": "losa", "active": 8}, {"attention": "quest"}, {"attention": "sparsed"}):
        assert cuda.generate(PROMPT, budget=4096, **options, **method).token_ids == dense


@pytest.mark.parametrize("method", [METHODS[0], METHODS[6]], ids=name_of)
def test_two_generations_keep_what_is_theirs(models, method):
    _, model = models
    options = {"max_new_tokens": 32, "stop_token_ids": [], "block_length": 8, "budget": 32, **method}
    prompts = (PROMPT, PROMPT[100:])
    expected = [model.generate(prompt, **options).token_ids for prompt in prompts]
    streams = [model.stream(prompt, **options) for prompt in prompts]
    results: list[Any] = [None, None]
    while None in results:
        for i, stream in enumerate(streams):
            step = next(stream, None)
            if step is not None and step.result is not None:
                results[i] = step.result.token_ids
    assert results == expected


def test_a_pass_that_was_captured_before_its_first_pass_was_run(models):
    """A generation of one pass captures a block's first pass alone; the next replays it and goes on."""
    cpu, cuda = models
    options = {"attention": "losa", "budget": 32, "active": 3, "stop_token_ids": [], "block_length": 6}
    assert cuda.generate(PROMPT[:7], max_new_tokens=1, **options).stats.denoising_passes >= 1
    options |= {"max_new_tokens": 24}
    assert cuda.generate(PROMPT, **options).token_ids == cpu.generate(PROMPT, **options).token_ids


def test_slots_of_many_settings_are_freed(tiny_checkpoint):
    import cupy

    model, pool = losart.load(tiny_checkpoint, device="cuda"), cupy.get_default_memory_pool()
    options = {"attention": "losa", "selector": "anchor", "max_new_tokens": 20, "block_length": 8}
    model.generate(PROMPT, budget=16, **options)
    used = pool.used_bytes()
    for budget in range(32, 160, 16):
        model.generate(PROMPT, budget=budget, **options)
        stream = model.stream(PROMPT, budget=budget, **options)
        next(stream)
        stream.close()
    assert pool.used_bytes() == used


@pytest.mark.parametrize("method", [METHODS[0], METHODS[7], METHODS[9]], ids=name_of)
def test_observers_see_what_is_read(models, method):
    cpu, cuda = models
    options = {"max_new_tokens": 16, "stop_token_ids": [], "block_length": 8, "budget": 32, **method}
    seen: list[list[Any]] = []
    for model in (cpu, cuda, cuda):
        passes: list[Any] = []
        model.generate(PROMPT, observer=passes.append, **options)
        layers = [layer for each in passes for layer in each.layers]
        seen.append([(layer.active.tolist(), [ids.tolist() for ids in layer.pages]) for layer in layers])
    assert seen[1] == seen[2]
    assert len(seen[0]) == len(seen[1])
    alike = sum(a == b for a, b in zip(seen[0], seen[1], strict=True))
    assert alike >= 0.95 * len(seen[0])
