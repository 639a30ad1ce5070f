"""Sequences that share a pass on the device give what each gives alone: operations, and whole generations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrivals import check_arrivals, requests
from cuda_arrays import on_host, stored_array
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv import steady
from passes import block_batch
from passes import options_of as pass_options
from test_cuda_kernels import (
    DTYPES,
    KV,
    TOLERANCE,
    assert_close,
    cards,
    filled_cache,
    new_backend,
    random_pieces,
    shapes,
    to_device,
    widened,
)

import losart
from losart.backends.base import ActiveRule, StoredResults
from losart.config.options import AttentionConfig
from losart.engine.batch import PassBatch, PassKind
from losart.engine.stream import Stream
from losart.eval.questions import make_questions
from losart.eval.tasks import TASKS

pytestmark = pytest.mark.gpu

COUNT = 3  # pages per query
WIDE = {"kv_heads": 8, "group": 4, "width": 128}


class Prefix:
    """One sequence's cache and slot, and its queries, keys and values in three passes over a block."""

    def __init__(
        self, backend: Any, dtype: str, shape: dict[str, int], tokens: int, length: int, stores: bool
    ) -> None:
        rng = np.random.default_rng(7 * length + tokens)
        kv_heads, heads, width = shape["kv_heads"], shape["kv_heads"] * shape["group"], shape["width"]
        k, v = (rng.standard_normal((length, kv_heads, width), np.float32) for _ in range(2))
        self.cache = filled_cache(backend, k, v, 16, random_pieces(rng, length))
        self.cache.reserve(length + 2 * tokens)
        rows = tokens * shape["group"] if stores else 0
        self.slot = backend.new_slot(StoredResults(tokens, True, COUNT if stores else 0, rows))
        first = rng.standard_normal((tokens, heads, width), np.float32)
        changed = rng.random(tokens) < 0.4
        later = first + changed[:, None, None] * rng.standard_normal(first.shape, np.float32)
        self.q = [first, later, rng.standard_normal(first.shape, np.float32)]
        self.k, self.v = (
            [rng.standard_normal((tokens, kv_heads, width), np.float32) for _ in range(3)] for _ in range(2)
        )
        self.masked = np.flatnonzero(rng.random(tokens) < 0.6)


def passes(backend: Any, prefixes: list[Prefix], tokens: int, selector: str, masked_only: bool) -> list[Any]:
    """What a first pass, a later one, and a commit with the next first pass give, of each sequence."""
    found: list[list[Any]] = [[] for _ in prefixes]
    options = pass_options(tokens, AttentionConfig("losa"))

    def placed(kind: PassKind, rides: bool = False) -> tuple[Any, PassBatch]:
        sequences: list[Any] = []
        for one in prefixes:
            if rides:
                sequences += block_batch(one.cache, tokens, PassKind.COMMIT, options=options).sequences
                one.cache.length += tokens
            batch = block_batch(one.cache, tokens, kind, slot=one.slot, masked=one.masked, options=options)
            sequences += batch.sequences
            one.cache.length -= tokens * rides
        batch = PassBatch(tuple(sequences))
        return backend.runner.place(batch), batch

    def block(index: int, rides: bool = False) -> list[Any]:
        arrays = []
        for name in ("q", "k", "v"):
            numbers = (index, index - 1) if rides else (index,)
            rows = [getattr(one, name)[number] for one in prefixes for number in numbers]
            arrays.append(to_device(backend, np.concatenate(rows)))
        return arrays

    def keep(o: Any, rows: int) -> None:
        o = on_host(backend, o)
        for index, of_sequence in enumerate(found):
            of_sequence.append(o[index * rows : (index + 1) * rows])
            names = ("queries", "o", "lse")
            of_sequence += on_host(
                backend, *(stored_array(backend, prefixes[index].slot, name) for name in names)
            )

    def first(q: Any, batch: Any) -> Any:
        if selector == "quest":
            parts = backend.prefix_attention(0, q, batch)
        else:
            parts, masses = backend.prefix_attention_and_masses(0, q, batch)
            backend.store_top_pages(0, masses, batch, COUNT, summed=False)
        return backend.store_attention(0, q, parts, batch)

    def select(q: Any, active: Any, batch: Any) -> Any:
        if selector == "anchor":
            return backend.selectors["auto"].select_stored_pages(0, active, batch)
        both = {"with_stored": True} if selector == "both" else {}
        return backend.selectors["auto"].select_pages(0, q, active, batch, COUNT, **both)

    with backend.memory.stream:
        batch, _ = placed(PassKind.FIRST)
        q, k, v = block(0)
        parts = first(q, batch)
        keep(backend.block_attention(q, k, v, parts, batch), tokens)

        batch, host = placed(PassKind.LATER)
        q, k, v = block(1)
        rule = ActiveRule(tokens, 0.3, masked_only, follow=False)
        active = backend.selectors["auto"].select_active(0, q, batch, rule)
        selection = select(q, active, batch)
        parts = backend.refresh_prefix_attention(0, q, selection, batch, store_queries=True)
        keep(backend.block_attention(q, k, v, parts, batch), tokens)
        reads, _, _ = batch.buffers.fetch()
        for of_sequence, selected, read in zip(found, backend.on_host(selection, host), reads, strict=False):
            of_sequence += [selected.tokens, selected.change, *selected.pages, read]

        batch, _ = placed(PassKind.FIRST, rides=True)
        q, k, v = block(2, rides=True)
        backend.write_kv(0, k, v, batch)
        parts = first(q, batch)
        keep(backend.block_attention(q, k, v, parts, batch), 2 * tokens)
        for of_sequence, one in zip(found, prefixes, strict=True):
            if selector != "quest":
                top = stored_array(backend, one.slot, "top_pages")
                of_sequence.append(np.sort(on_host(backend, top), axis=-1))
    return found


@steady(40)
@given(
    st.sampled_from(DTYPES),
    shapes(),
    st.sampled_from([1, 3, 4, 16]),
    st.lists(st.one_of(st.integers(0, 60), st.integers(200, 1500)), min_size=2, max_size=5),
    cards(),
    KV,
    st.sampled_from(["both", "quest", "anchor"]),
    st.booleans(),
)
@example("bfloat16", WIDE, 16, [2300, 40, 9000], {}, "auto", "quest", False)
@example("bfloat16", WIDE, 16, [2300, 40, 9000], {}, "auto", "both", False)
@example("bfloat16", WIDE, 4, [700] * 20 + [0, 3], {}, "auto", "both", True)
@example("float32", {"kv_heads": 2, "group": 2, "width": 16}, 4, [100] * 19, {}, "auto", "anchor", False)
@example("float32", {"kv_heads": 2, "group": 2, "width": 16}, 4, [100] * 19, {}, "auto", "both", False)
@example("bfloat16", WIDE, 16, [2300, 40, 9000], {}, "int8", "quest", False)
@example("float16", WIDE, 4, [700] * 20 + [0, 3], {}, "fp8", "both", True)
def test_operations_of_several_sequences(dtype, shape, tokens, lengths, card, kv, selector, masked_only):
    backend = new_backend(dtype, card, kv, max_positions=1 << 14, **shape)

    def prefixes() -> list[Prefix]:
        stores = selector != "quest"
        return [Prefix(backend, dtype, shape, tokens, length, stores) for length in lengths]

    together = passes(backend, prefixes(), tokens, selector, masked_only)
    for one, found in zip(prefixes(), together, strict=True):
        (alone,) = passes(backend, [one], tokens, selector, masked_only)
        assert len(found) == len(alone)
        for array, expected in zip(found, alone, strict=True):
            if array.dtype == np.uint16:
                array, expected = (widened(x, dtype) for x in (array, expected))
            if dtype == "float32" or not np.issubdtype(array.dtype, np.floating):
                np.testing.assert_array_equal(array, expected)
            elif np.isfinite(expected).all():
                assert_close(array, expected, TOLERANCE[dtype])
            else:
                np.testing.assert_array_equal(array, expected)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"block_length": 7, "temperature": 0.8, "seed": 5},
    {"attention": "losa", "budget": 32},
    {"attention": "losa", "budget": 32, "active": 2, "candidates": "masked", "remasking": "sequential"},
    {"attention": "losa", "budget": 32, "selector": "anchor", "block_length": 6},
    {"attention": "losa", "budget": 32, "commit": "sparse", "first_pass": "sparse"},
    {"attention": "losa", "budget": 32, "planner": "host"},
    {"attention": "losa", "budget": 32, "selector": "quest"},
    {"attention": "quest", "budget": 48, "page_size": 48},
    {"attention": "sparsed", "budget": 32, "remasking": "low_confidence_static", "denoising_steps": 3},
    {"remasking": "entropy_bounded", "eb_threshold": 2.0, "top_k": 5, "temperature": 1.0, "seed": 1},
]
PROMPTS = [np.random.default_rng(seed).integers(0, 300, 3 + 90 * seed).tolist() for seed in range(4)]
PROMPTS.append(PROMPTS[3][:200] + PROMPTS[2])  # begins as another


def options_of(number: int, new: int) -> dict[str, Any]:
    return {"block_length": 4, "stop_token_ids": [], "max_new_tokens": new, **OPTIONS[number]}


def facts(result: losart.GenerationResult) -> Any:
    stats = result.stats
    counts = stats.denoising_passes, stats.commit_passes, stats.rides
    return result.token_ids, counts, (stats.density, stats.sparse_density, stats.active_fraction)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(tiny_checkpoint, request) -> losart.Model:
    return losart.load(tiny_checkpoint, "cuda", request.param, deterministic=True)


ALONE: dict[Any, Any] = {}


def alone(model: losart.Model, prompt: int, number: int, new: int) -> Any:
    key = model.dtype, prompt, number, new
    if key not in ALONE:
        ALONE[key] = facts(model.generate(PROMPTS[prompt], **options_of(number, new)))
    return ALONE[key]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_a_list_of_prompts_is_decoded_together(model, number):
    expected = [alone(model, prompt, number, 24) for prompt in range(len(PROMPTS))]
    for _ in range(3):  # launched one by one, captured, and replayed
        results = model.generate(PROMPTS, **options_of(number, 24))
        assert [facts(result) for result in results] == expected
        assert results[-1].stats.mean_sequences > 2


@pytest.mark.parametrize("planner", ["host", "device"])
@pytest.mark.parametrize("selector", ["both", "quest", "anchor"])
def test_groups_that_are_padded(model, planner, selector):
    """Of 17 sequences, to 18."""
    options = options_of(0, 12) | {
        "attention": "losa",
        "budget": 32,
        "planner": planner,
        "selector": selector,
    }
    prompts = [PROMPTS[1][:20] + [one] * 60 for one in range(17)]
    expected = [facts(model.generate(prompt, **options)) for prompt in prompts]
    assert [facts(result) for result in model.generate(prompts, **options)] == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("logprobs", [None, 3])
def test_logits_of_some_rows_at_a_time(tiny_checkpoint, monkeypatch, sampling, logprobs):
    options = {"max_new_tokens": 16, "block_length": 8, "stop_token_ids": [], "logprobs": logprobs} | sampling
    whole, pieces = (losart.load(tiny_checkpoint, "cuda", "float32") for _ in range(2))
    expected = whole.generate(PROMPTS, **options)
    monkeypatch.setattr("losart.backends.cuda.backend.LOGIT_ROWS", 5)
    for _ in range(3):  # launched one by one, captured, and replayed
        for one, other in zip(pieces.generate(PROMPTS, **options), expected, strict=True):
            assert facts(one) == facts(other) and one.logprobs == other.logprobs


@settings(max_examples=12, deadline=None)
@given(
    st.lists(requests(len(PROMPTS), len(OPTIONS)), min_size=2, max_size=12),
    st.sampled_from([3, 16]),
    st.randoms(),
)
def test_each_generation_is_what_it_is_alone(model, asked, places, random):
    engine = losart.Engine(model, max_sequences=places)

    def submit(prompt: int, number: int, new: int) -> Stream:
        return engine.submit(PROMPTS[prompt], **options_of(number, new))

    def check(result: losart.GenerationResult, prompt: int, number: int, new: int) -> None:
        assert facts(result) == alone(model, prompt, number, new)

    check_arrivals(asked, random, submit, check)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_answers_of_the_shipped_checkpoint_in_16_bits(dtype):
    """Rounding may differ; what is answered to a question does not."""
    model = losart.load(device="cuda", dtype=dtype)
    lengths = (256, 384, 512, 640, 1024, 1536, 2048)
    questions = [
        next(make_questions(model, TASKS[task], length, 1, 0, "symbols"))
        for length in lengths
        for task in ("key", "keys-2")
    ]
    for options in ({}, {"attention": "losa", "budget": 64}, {"attention": "quest", "budget": 64}):
        together = model.generate([one.prompt for one in questions], max_new_tokens=16, **options)
        for question, result in zip(questions, together, strict=True):
            one = model.generate(question.prompt, max_new_tokens=16, **options)
            assert question.answer in result.text and one.text == result.text
            assert result.stats.density == pytest.approx(one.stats.density, rel=0.2)
