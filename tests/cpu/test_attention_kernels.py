"""The CPU's attention kernels against the float64 reference.

Outputs start as NaN: what a kernel does not write shows, and so does what it should have left alone.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import reference as ref
from hypothesis import example, given
from hypothesis import strategies as st
from kv import HELD_AS, LAYER, coded_page_bounds, held, model_config, precision_of, steady, table_of
from passes import block_batch, write

from losart.backends.base import ActiveTokens, StoredResults
from losart.backends.cpu import attention_kernels as kernels
from losart.backends.cpu.backend import CpuBackend, Weight
from losart.config.precision import FORMATS, KV_FORMATS

TOLERANCE = 1e-4
PAGE_SIZES = [16, 32, 48, 64]


@dataclass(frozen=True)
class Case:
    tokens: int = 4
    kv_heads: int = 2
    group: int = 2
    width: int = 32
    prefix: int = 100
    page_size: int = 16
    dtype: str = "float32"
    operands: str = "bfloat16"  # where dtype has 8 bits
    seed: int = 0

    @property
    def pages(self) -> int:
        return -(-self.prefix // self.page_size)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def q(self, scale: float = 1.0) -> np.ndarray:
        shape = (self.tokens, self.kv_heads * self.group, self.width)
        return scale * self.rng().standard_normal(shape, np.float32)

    def kv(self, positions: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, 1])
        shape = (self.prefix if positions is None else positions, self.kv_heads, self.width)
        return rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)


def case_of(**fixed: object) -> st.SearchStrategy[Case]:
    options = {
        "tokens": st.integers(1, 64),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 8),
        "width": st.integers(1, 8).map(lambda n: 16 * n),
        # Three parts of the work and more; chunks of the table are 16 pages here.
        "prefix": st.one_of(st.integers(0, 70), st.integers(0, 700), st.integers(1000, 2200)),
        "page_size": st.sampled_from(PAGE_SIZES),
        "dtype": st.sampled_from(list(HELD_AS)),
        "operands": st.sampled_from(list(FORMATS)),
        "seed": st.integers(0, 2**16),
    }
    return st.builds(Case, **options | {name: st.just(value) for name, value in fixed.items()})


def unwritten(case: Case) -> tuple[np.ndarray, np.ndarray]:
    o = np.full((case.tokens, case.kv_heads * case.group, case.width), np.nan, np.float32)
    return o, o[:, :, 0].copy()


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Each row's error is small beside the row; rows along the last axis."""
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected, axis=-1)
    assert (error <= tolerance * np.linalg.norm(expected, axis=-1)).all()


def assert_attention(o: np.ndarray, lse: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert_close(o, expected[0])
    np.testing.assert_allclose(lse, expected[1], rtol=TOLERANCE, atol=TOLERANCE)


def attend(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, tokens: np.ndarray, pages=None):
    o, lse = unwritten(case)
    table = table_of(k, v, case.page_size, case.dtype)
    kernels.attend_pages(table, LAYER, q, tokens.astype(np.int32), pages, len(k), o, lse)
    return o, lse


def some(draw: st.DrawFn, count: int, label: str) -> np.ndarray:
    return np.array(sorted(draw(st.sets(st.integers(0, count - 1)) if count else st.just(set()))), np.int32)


# Over the prefix


@steady(60)
@given(case_of())
@example(Case(prefix=0))
@example(Case(tokens=1, prefix=1, group=1, kv_heads=1))
@example(Case(tokens=3, prefix=2049, group=8, width=128))
def test_over_the_whole_prefix(case):
    q, (k, v) = case.q(), case.kv()
    o, lse = attend(case, q, k, v, np.arange(case.tokens))
    assert_attention(o, lse, ref.softmax_attention(q, held(k, case.dtype), held(v, case.dtype)))


@st.composite
def page_lists(draw):
    case = draw(case_of())
    lists = [some(draw, case.pages, "pages") for _ in range(case.kv_heads)]
    return case, lists, some(draw, case.tokens, "tokens")


def as_arrays(lists: list[np.ndarray], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(lists), capacity), -1, np.int32)
    for head, pages in enumerate(lists):
        ids[head, : len(pages)] = pages
    return ids, np.array([len(pages) for pages in lists], np.int32)


@steady(80)
@given(page_lists())
@example((Case(prefix=2199, page_size=48, tokens=2), [np.arange(46), np.array([45])], np.array([1])))
@example((Case(prefix=0), [np.zeros(0, np.int64)] * 2, np.array([0, 2])))
def test_over_listed_pages_for_some_tokens(drawn):
    case, lists, tokens = drawn
    q, (k, v) = case.q(), case.kv()
    o, lse = attend(case, q, k, v, tokens, as_arrays(lists, case.pages + 2))
    k, v = held(k, case.dtype), held(v, case.dtype)
    assert_attention(o[tokens], lse[tokens], ref.sparse_attention(q[tokens], k, v, lists, case.page_size))
    others = np.setdiff1d(np.arange(case.tokens), tokens)
    assert np.isnan(o[others]).all() and np.isnan(lse[others]).all()


def test_nothing_read_is_zero_and_minus_infinity():
    case = Case(prefix=40)
    lists = [np.array([1]), np.array([], np.int32)]
    o, lse = attend(case, case.q(), *case.kv(), np.arange(case.tokens), as_arrays(lists, 3))
    assert (o[:, case.group :] == 0).all() and (lse[:, case.group :] == -np.inf).all()
    assert np.isfinite(lse[:, : case.group]).all() and o[:, : case.group].all()


def test_a_list_of_all_pages_gives_the_bits_of_the_whole_prefix():
    case = Case(prefix=1500, group=3, tokens=5)
    tokens = np.arange(case.tokens)
    every = as_arrays([np.arange(case.pages)] * case.kv_heads, case.pages)
    dense = attend(case, case.q(), *case.kv(), tokens)
    listed = attend(case, case.q(), *case.kv(), tokens, every)
    np.testing.assert_array_equal(listed[0], dense[0])
    np.testing.assert_array_equal(listed[1], dense[1])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("where", [0, 127, 128, 1023, 1024, 2100, 2199])
def test_one_key_dominates(where, page_size):
    case = Case(prefix=2200, page_size=page_size, tokens=2)
    q, (k, v) = np.abs(case.q()), case.kv()
    k[where] = 40.0
    o, lse = attend(case, q, k, v, np.arange(case.tokens))
    assert_attention(o, lse, ref.softmax_attention(q, k, v))
    np.testing.assert_allclose(o, np.repeat(v[None, where], 2, axis=0).repeat(case.group, axis=1), rtol=1e-5)


@steady(40)
@given(case_of(dtype="float32"), st.sampled_from([-1, 1]), st.booleans())
def test_scores_of_a_large_range(case, sign, rising):
    """Scores from -80 to 80 along the prefix, up or down: the maximum moves in each step or never."""
    q = np.zeros((case.tokens, case.kv_heads * case.group, case.width), np.float32)
    q[:, :, 0] = sign * math.sqrt(case.width)
    k, v = case.kv()
    k[:, :, 0] = np.linspace(-80, 80, case.prefix)[:: 1 if rising else -1, None]
    o, lse = attend(case, q, k, v, np.arange(case.tokens))
    assert_attention(o, lse, ref.softmax_attention(q, k, v))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 15, 100, 1030, 1199])
@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", ["float32", *KV_FORMATS])
def test_what_is_not_finite_shows(what, where, bad, dtype):
    case = Case(prefix=1200, tokens=2, dtype=dtype)
    q, (k, v) = np.abs(case.q()), case.kv()
    {"q": q[:1], "k": k, "v": v}[what][0 if what == "q" else where, :, 3] = bad
    o, lse = attend(case, q, k, v, np.arange(case.tokens))
    assert not np.isfinite(o[0]).all(axis=-1).any()
    if what == "k":
        assert not np.isfinite(lse).any()
    if what == "v" and dtype in KV_FORMATS:  # all channels have the scale
        assert np.isnan(o).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", KV_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_page_with_a_key_of_8_bits_that_is_not_finite_has_a_score_of_nan(dtype, bad):
    case = Case(prefix=300, dtype=dtype)
    q, (k, v) = case.q(), case.kv()
    k[[40, 290], 0, 3] = bad
    table = table_of(k, v, case.page_size, dtype)
    scores = kernels.bound_scores(table, LAYER, q, np.arange(case.tokens, dtype=np.int32), case.prefix)
    expected = np.isin(np.arange(case.pages), [2, 18])
    np.testing.assert_array_equal(
        np.isnan(scores[0, :, : case.pages]), np.broadcast_to(expected, (8, case.pages))
    )
    assert np.isfinite(scores[1, :, : case.pages]).all()


@pytest.mark.parametrize("dtype", KV_FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-42, 1e-38])
def test_keys_and_values_of_8_bits_that_are_zero_or_tiny(dtype, size):
    case = Case(prefix=300, dtype=dtype)
    k, v = (np.float32(size) * np.sign(x) for x in case.kv())
    o, lse = attend(case, case.q(), k, v, np.arange(case.tokens))
    np.testing.assert_allclose(lse, np.log(case.prefix), rtol=1e-6)
    expected = ref.softmax_attention(case.q(), held(k, dtype), held(v, dtype))[0]
    np.testing.assert_allclose(o, expected, rtol=0, atol=2e-6 * size + 1e-43)
    if size == 0:
        assert not o.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": np.array([4])}, "rows of q"),
        ({"tokens": np.array([-1])}, "rows of q"),
        ({"pages": (np.array([[7], [0]], np.int32), np.ones(2, np.int32))}, "outside the prefix"),
        ({"pages": (np.array([[0], [-1]], np.int32), np.ones(2, np.int32))}, "outside the prefix"),
    ],
)
def test_what_lies_outside_is_refused(changes, message):
    case = Case()
    with pytest.raises(ValueError, match=message):
        attend(case, case.q(), *case.kv(), **{"tokens": np.arange(4)} | changes)


# Page masses and bounds


@steady(40)
@given(case_of(), st.sampled_from([1.0, 12.0]))
@example(Case(prefix=0), 1.0)
def test_page_masses(case, scale):
    precision = precision_of(case.dtype, case.operands)
    backend = CpuBackend(model_config(case.kv_heads, case.group, case.width), precision)
    cache = backend.new_cache(case.page_size)
    q, (k, v) = case.q(scale), case.kv()
    write(cache, 0, k, v)
    cache.advance(len(k))
    batch = block_batch(cache, case.tokens, slot=backend.new_slot(StoredResults(case.tokens)))
    (o, lse), (masses,) = backend.prefix_attention_and_masses(0, q, batch)
    k, v = held(k, case.dtype), held(v, case.dtype)
    assert_attention(o, lse, ref.softmax_attention(q, k, v))
    expected = ref.page_mass(q, k, case.page_size).reshape(case.tokens, case.kv_heads, case.group, -1)
    np.testing.assert_allclose(masses, expected.transpose(1, 0, 2, 3), rtol=2e-4, atol=1e-7)


@steady(40)
@given(case_of(), st.data())
def test_bounds_of_scores(case, data):
    tokens = some(data.draw, case.tokens, "tokens")
    q, (k, v) = case.q(), case.kv()
    table = table_of(k, v, case.page_size, case.dtype, case.operands)
    scores = kernels.bound_scores(table, LAYER, q, tokens, case.prefix)
    bounds = coded_page_bounds(k, case.page_size, case.dtype, case.operands)
    q_held = held(q[tokens], precision_of(case.dtype, case.operands).kv_operands.name)
    expected = ref.quest_scores(q_held, *bounds)
    expected = expected.reshape(len(tokens), case.kv_heads, case.group, case.pages).transpose(1, 0, 2, 3)
    rows = len(tokens) * case.group
    assert scores.shape == (case.kv_heads, rows, -(-case.pages // 16) * 16)
    actual = scores[:, :, : case.pages]
    np.testing.assert_allclose(actual, expected.reshape(actual.shape), rtol=TOLERANCE, atol=1e-4)


# Over the block, and over the prompt


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64])
@pytest.mark.parametrize(("kv_heads", "group", "width"), [(1, 1, 16), (2, 5, 48), (3, 8, 128), (1, 7, 112)])
@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_over_the_block(tokens, kv_heads, group, width, scale):
    case = Case(tokens, kv_heads, group, width, seed=tokens)
    q, (k, v) = case.q(scale), case.kv(tokens)
    o, lse = unwritten(case)
    kernels.attend_block(q, k, v, o, lse)
    assert_attention(o, lse, ref.softmax_attention(q, k, v))


@steady(40)
@given(
    case_of(tokens=0, prefix=0),
    st.one_of(st.integers(1, 64), st.sampled_from([1, 4, 16, 32])),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_over_the_prompt(case, block_length, blocks_before, blocks):
    """A piece of the prompt after what came before it, each token up to the end of its block."""
    start, count = block_length * (blocks_before % 8), block_length * (1 + blocks % 8)
    case = Case(**vars(case) | {"tokens": count})
    q, (k, v) = case.q(), case.kv(start + count)
    table = table_of(k, v, case.page_size, case.dtype)
    o, _ = unwritten(case)
    kernels.attend_causal_blocks(table, LAYER, q, start, block_length, o)
    k, v = held(k, case.dtype), held(v, case.dtype)
    for block in range(0, count, block_length):
        rows, end = slice(block, block + block_length), start + block + block_length
        assert_close(o[rows], ref.softmax_attention(q[rows], k[:end], v[:end])[0])


# Kinds of vectors


def largest_error() -> float:
    """Of attention over a prefix beside each row, in every format."""
    worst = 0.0
    for dtype in HELD_AS:
        case = Case(prefix=300, group=4, width=48, dtype=dtype)
        q, (k, v) = case.q(), case.kv()
        o, _ = attend(case, q, k, v, np.arange(case.tokens))
        expected, _ = ref.softmax_attention(q, held(k, dtype), held(v, dtype))
        error = np.linalg.norm(o - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        worst = max(worst, error.max())
    return worst


def run(expression: str, **changes: str) -> str:
    """What a process with these changes to the environment prints of something here."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | changes
    command = [sys.executable, "-c", f"import test_attention_kernels as t; print({expression})"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_all_kinds_of_vectors_give_what_float64_does(level):
    assert float(run("t.largest_error()", LOSART_SIMD=level)) <= 2e-6


# Threads


def digest(dtype: str) -> str:
    """Of what all kernels give for sizes that they share among threads."""
    case = Case(tokens=16, kv_heads=2, group=4, width=64, prefix=3000, dtype=dtype)
    backend = CpuBackend(model_config(case.kv_heads, case.group, case.width), precision_of(case.dtype))
    cache = backend.new_cache(case.page_size)
    write(cache, 0, *case.kv())
    cache.advance(case.prefix)
    q, weight = case.q(2.0), np.random.default_rng(0).standard_normal((512, 512), np.float32)
    batch, selector = block_batch(cache, 16), backend.selectors["auto"]
    selection = selector.select_pages(0, q, ActiveTokens([np.arange(3, dtype=np.int32)], None), batch, 20)
    (pages,) = selection.pages
    one, two = (
        Weight(matrices, FORMATS["float32"]) for matrices in ((weight,), (np.vstack([weight, weight]),))
    )
    block = [np.ascontiguousarray(x[:16]) for x in case.kv()]
    results = [
        *backend.prefix_attention(0, q, batch),
        *backend.prefix_attention_and_masses(0, q, batch)[1],
        *backend.sparse_prefix_attention(0, q, selection, batch),
        backend.block_attention(q, *block, backend.prefix_attention(0, q, batch), batch),
        kernels.bound_scores(cache.table, 0, q, np.arange(16, dtype=np.int32), case.prefix),
        pages.ids,
        backend.linear(weight[:16].copy(), one),
        backend.linear(weight[:4].copy(), two),
    ]
    long = Case(tokens=400, kv_heads=2, group=4, width=64)
    o, _ = unwritten(long)
    kernels.attend_causal_blocks(cache.table, 0, long.q(), 1200, 4, o)
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in [*results, o])).hexdigest()


@pytest.mark.parametrize("dtype", ["bfloat16", *KV_FORMATS])
def test_the_number_of_threads_changes_no_bit(dtype):
    digests = {run(f"t.digest({dtype!r})", OMP_NUM_THREADS=threads) for threads in ("1", "2", "3")}
    assert digests == {digest(dtype)}
