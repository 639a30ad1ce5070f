"""CUDA kernels against the float64 reference: random shapes, outputs that held NaN before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference as ref
from cuda_arrays import matmul_array, on_host, stored_array
from hypothesis import example, given
from hypothesis import strategies as st
from kv import coded_page_bounds, encoded, held, held_page_bounds, model_config, steady
from passes import block_batch, options_of

from losart.backends.base import PassBody, StoredResults
from losart.backends.cpu.convert import narrow, widen
from losart.backends.cuda.matmul_plans import hopper_matmul_plans
from losart.config.options import generation_config
from losart.config.precision import FORMATS, Precision
from losart.config.rope import RopeConfig, inverse_frequencies
from losart.engine.batch import PassBatch, PassKind
from losart.engine.sampling import propose

pytestmark = pytest.mark.gpu

DTYPES = ("float32", "bfloat16", "float16")
# Of attention's weights and results, and of what is narrowed for a product, as rounded in each dtype.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


KV = st.sampled_from(["auto", "auto", "int8", "fp8"])


@st.composite
def cards(draw):
    """The device as it is, or taken for one without its newest instructions."""
    few = {"sms": 1}  # each part has all of a prefix
    return draw(st.sampled_from([{}, {"capability": (8, 6), "shared_per_block": 99 << 10}, few]))


def new_backend(dtype, card=None, kv="auto", **shape):
    from losart.backends.cuda.backend import CudaBackend

    backend = CudaBackend(model_config(layers=2, **shape), Precision.of(dtype, kv))
    backend.kernels.card = replace(backend.kernels.card, **(card or {}))
    poison(backend)
    return backend


def poison(backend):
    """Leave NaN in the memory that the backend's next arrays are made of."""
    import cupy

    sizes = [32 << 20] * 4 + [1 << 16] * 32 + [1 << 10] * 64
    with backend.memory.stream:  # CuPy keeps what a stream has freed for that stream
        for block in [cupy.empty(size, np.uint8) for size in sizes]:
            block.data.memset_async(0xFF, block.nbytes, backend.memory.stream)


def to_device(backend, x, dtype="float32"):
    import cupy

    with backend.memory.stream:
        return cupy.asarray(narrow(x, FORMATS[dtype]).view(np.uint16) if dtype != "float32" else x)


def place(backend, cache, tokens, **options):
    """The batch of a pass over so many rows after the cache's prefix, its inputs in place."""
    return backend.runner.place(block_batch(cache, tokens, **options))


def to_weight(backend, x, dtype):
    from losart.backends.cuda.results import Weight

    return Weight(to_device(backend, x, dtype))


def widened(x, dtype):
    return widen(x.view(np.float16) if dtype == "float16" else x).astype(np.float64)


def assert_close(found, expected, tolerance):
    assert np.linalg.norm(found - expected) <= tolerance * max(np.linalg.norm(expected), 1e-6)


def exact(x):
    """float32 whose sums are exact while they stay small."""
    return (np.rint(x * 2**17) / 2**17).astype(np.float32)


def split_matmul(backend, x, rng):
    """A matmul whose planes are what is left of `x` [tokens, rows] when each is drawn at random."""
    import cupy

    from losart.backends.cuda.results import Matmul

    steps, share = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    planes = (steps - 1) // share + 2
    values = np.full((planes, *x.shape), np.nan, np.float32)
    for panel in range(-(-x.shape[1] // 128)):
        columns = slice(panel * 128, min(x.shape[1], panel * 128 + 128))
        used = ((panel + 1) * steps - 1) // share - panel * steps // share + 1
        values[:used, :, columns] = exact(rng.standard_normal((used, len(x), x[:, columns].shape[1])))
        values[used - 1, :, columns] = x[:, columns] - values[: used - 1, :, columns].sum(axis=0)
    with backend.memory.stream:
        return Matmul(cupy.asarray(values), None, steps, share)


# Matmuls


@steady(60)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 200),
    st.integers(1, 700),
    st.integers(1, 900),
    cards(),
    st.booleans(),
)
@example("bfloat16", 16, 4096, 4096, {}, True)
@example("float16", 64, 1000, 4096, {}, False)
@example("bfloat16", 1, 128, 12288, {}, False)
@example("bfloat16", 1000, 300, 264, {}, True)
def test_matmuls(dtype, tokens, rows, inner, card, bias):
    rng = np.random.default_rng(tokens + rows + inner)
    if rows % 4:
        inner = -(-inner // 8) * 8
    x, weight = (
        rng.standard_normal((tokens, inner), np.float32),
        rng.standard_normal((rows, inner), np.float32),
    )
    b = rng.standard_normal(rows, np.float32) if bias else None
    backend = new_backend(dtype, card, kv_heads=1, group=1, width=16)
    for linear in (backend.prefill_linear, backend.linear):
        with backend.memory.stream:
            matmul = linear(
                to_device(backend, x, dtype),
                to_weight(backend, weight, dtype),
                None if b is None else to_device(backend, b),
            )
        expected = held(x, dtype) @ held(weight, dtype).T + (0 if b is None else b)
        assert_close(matmul_array(backend, matmul), expected, 2e-6)


def assert_matmul_of_integers(backend, dtype, tokens, rows, inner):
    """A matmul whose sums every order of adding gives exactly."""
    rng = np.random.default_rng(tokens + rows + inner)
    x, weight = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((tokens, inner), (rows, inner)))
    poison(backend)
    with backend.memory.stream:
        matmul = backend.linear(to_device(backend, x, dtype), to_weight(backend, weight, dtype))
    np.testing.assert_array_equal(matmul_array(backend, matmul), x @ weight.T)


@steady(60)
@given(
    st.sampled_from(("bfloat16", "float16")),
    st.integers(65, 600),
    st.integers(1, 1100),
    st.integers(1, 120),
    st.sampled_from([1, 2, 5, 132]),
)
@example("bfloat16", 2048, 4096, 33, 132)
@example("float16", 65, 1, 1, 132)
def test_matmuls_of_many_tokens(dtype, tokens, rows, eighths, sms):
    backend = new_backend(dtype, {"sms": sms}, kv_heads=1, group=1, width=16)
    assert_matmul_of_integers(backend, dtype, tokens, rows, 8 * eighths)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sms", [2, 132])
@pytest.mark.parametrize(
    "shape", [(300, 700, 264), (129, 1001, 72), (65, 64, 8), (640, 1538, 1032), (70, 300, 1600)]
)
def test_every_way_to_cut_a_matmul(monkeypatch, dtype, sms, shape):
    import losart.backends.cuda.backend

    backend = new_backend(dtype, {"sms": sms}, kv_heads=1, group=1, width=16)
    if not backend.kernels.card.hopper:
        pytest.skip("not a Hopper GPU")
    for _, plan in hopper_matmul_plans(backend.kernels.card, *shape):
        monkeypatch.setattr(losart.backends.cuda.backend, "matmul_plan", lambda *_, plan=plan: plan)
        assert_matmul_of_integers(backend, dtype, *shape)


def gated(backend, dtype, x, weight):
    """silu(gate) * up of the device, and by float64."""
    with backend.memory.stream:
        y = backend.gated_linear(to_device(backend, x, dtype), to_weight(backend, weight, dtype), len(x) > 64)
    gate, up = np.split(held(x, dtype) @ held(weight, dtype).T, 2, axis=1)
    return widened(on_host(backend, y), dtype), gate / (1 + np.exp(-gate)) * up


@steady(40)
@given(st.sampled_from(DTYPES), st.integers(1, 300), st.integers(1, 200), st.integers(1, 600))
@example("bfloat16", 640, 2432, 1024)
@example("float16", 2048, 96, 8192)
def test_gated_matmuls(dtype, tokens, quarters, inner):
    rng = np.random.default_rng(tokens + quarters + inner)
    x, weight = (rng.standard_normal((n, inner), np.float32) for n in (tokens, 8 * quarters))
    backend = new_backend(dtype, kv_heads=1, group=1, width=16)
    assert_close(*gated(backend, dtype, x, weight / np.float32(inner**0.5)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sms", [2, 132])
@pytest.mark.parametrize(
    "shape", [(300, 350, 264), (129, 502, 72), (65, 32, 8), (640, 770, 1032), (70, 150, 1600)]
)
def test_every_way_to_cut_a_gated_matmul(monkeypatch, dtype, sms, shape):
    import losart.backends.cuda.backend

    tokens, ffn, inner = shape
    rng = np.random.default_rng(sum(shape))
    x = rng.integers(-3, 4, (tokens, inner)).astype(np.float32)
    weight = rng.integers(-3, 4, (2 * ffn, inner)).astype(np.float32) / 64
    backend = new_backend(dtype, {"sms": sms}, kv_heads=1, group=1, width=16)
    if not backend.kernels.card.hopper:
        pytest.skip("not a Hopper GPU")
    for _, plan in hopper_matmul_plans(backend.kernels.card, tokens, 2 * ffn, inner, gated=True):
        monkeypatch.setattr(losart.backends.cuda.backend, "gated_matmul_plan", lambda *_, plan=plan: plan)
        poison(backend)
        assert_close(*gated(backend, dtype, x, weight), TOLERANCE[dtype])


@steady(20)
@given(st.sampled_from(DTYPES), st.integers(1, 70), st.sampled_from([8, 100, 1024, 2560]), st.booleans())
def test_residual_and_norm(dtype, tokens, hidden, first):
    rng = np.random.default_rng(tokens + hidden)
    x, delta = (rng.standard_normal((tokens, hidden), np.float32) for _ in range(2))
    gain = rng.standard_normal(hidden, np.float32)
    backend = new_backend(dtype, kv_heads=1, group=1, width=16)
    with backend.memory.stream:
        given = None if first else split_matmul(backend, delta, rng)
        total, y = backend.add_rms_norm(to_device(backend, x), given, to_device(backend, gain))
    expected = x.astype(np.float64) + (0 if first else delta)
    total, y = on_host(backend, total, y)
    assert_close(total, expected, 1e-6)
    expected = expected / np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-6) * gain
    assert_close(widened(y, dtype), expected, TOLERANCE[dtype])


@steady(20)
@given(st.sampled_from(DTYPES), st.integers(1, 70), st.sampled_from([8, 96, 320, 6144]))
def test_silu_gate(dtype, tokens, ffn):
    rng = np.random.default_rng(tokens + ffn)
    x = 3 * rng.standard_normal((tokens, 2 * ffn), np.float32)
    backend = new_backend(dtype, kv_heads=1, group=1, width=16)
    with backend.memory.stream:
        y = backend.silu_gate(split_matmul(backend, x, rng))
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    assert_close(widened(on_host(backend, y), dtype), gate / (1 + np.exp(-gate)) * up, TOLERANCE[dtype])


@steady(20)
@given(
    st.integers(1, 70),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([8, 16, 24, 48, 64, 80, 128, 192, 256]),
    st.integers(0, 200_000),
    st.booleans(),
    st.sampled_from([1.0, 1.0, 0.5, 0.25]),
    st.sampled_from([0.0, 0.1]),
)
@example(3, 1, 2, 8, 100, True, 1.0, 0.0)
@example(3, 1, 2, 192, 100, True, 1.0, 0.0)
@example(5, 2, 2, 128, 32766, False, 0.5, 0.1)
def test_heads(tokens, kv_heads, group, width, length, norms, partial, beta):
    rng = np.random.default_rng(tokens + width)
    partial = partial if width * partial % 8 == 0 else 1.0
    rope = RopeConfig(partial=partial, query_beta=beta, original_max_positions=16384)
    sizes = {"kv_heads": kv_heads, "group": group, "width": width, "max_positions": 1 << 18, "rope": rope}
    backend = new_backend("float32", **sizes)
    heads = kv_heads * group
    x = rng.standard_normal((tokens, (heads + 2 * kv_heads) * width), np.float32)
    gains = [rng.standard_normal(width, np.float32) for _ in range(2)]
    cache = backend.new_cache(16)
    cache.reserve(1)
    cache.length = length
    with backend.memory.stream:
        batch = place(backend, cache, tokens)
        held = [to_device(backend, gain) if norms else None for gain in gains]
        found = backend.split_heads(split_matmul(backend, x, rng), *held, batch)
    q, k, v = np.split(x.astype(np.float64).reshape(tokens, -1, width), [heads, heads + kv_heads], axis=1)
    frequencies, _ = inverse_frequencies(rope, width)
    positions, half = np.arange(length, length + tokens)[:, None, None], len(frequencies)
    angles, factor = positions * frequencies, 1 + beta * np.log(1 + positions // 16384)
    for array, values, gain in zip(on_host(backend, *found), (q, k, v), (*gains, None), strict=True):
        if gain is not None:
            if norms:
                values = values / np.sqrt((values**2).mean(axis=2, keepdims=True) + 1e-6) * gain
            first, second, rest = np.split(values, [half, 2 * half], axis=2)
            values = np.concatenate(
                [
                    first * np.cos(angles) - second * np.sin(angles),
                    second * np.cos(angles) + first * np.sin(angles),
                    rest,
                ],
                axis=2,
            )
            values = values * factor if gain is gains[0] else values
        assert_close(array, values, 1e-6)


# Cache and attention


@st.composite
def shapes(draw):
    width = draw(st.sampled_from([16, 48, 64, 64, 128, 128, 128, 256]))
    return {
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "width": width,
    }


def filled_cache(backend, k, v, page_size, pieces):
    """A cache with k and v in its first layer of two, written in pieces of these lengths."""
    cache = backend.new_cache(page_size)
    start = 0
    for piece in pieces:
        cache.reserve(cache.length + piece)
        with backend.memory.stream:
            batch = place(backend, cache, piece)
            for layer, factor in ((0, 1.0), (1, np.nan)):
                backend.write_kv(
                    layer,
                    to_device(backend, np.float32(factor) * k[start : start + piece]),
                    to_device(backend, np.float32(factor) * v[start : start + piece]),
                    batch,
                )
        cache.advance(piece)
        start += piece
    return cache


def random_pieces(rng, length):
    pieces = []
    while length:
        pieces.append(int(rng.integers(1, min(length, 700) + 1)))
        length -= pieces[-1]
    return pieces


def kv_format(backend):
    """In what the backend holds keys and values, and page bounds."""
    return backend.precision.kv.name, backend.precision.kv_operands.name


def page_bounds(backend, cache):
    """Of the first layer [2 (smallest, largest), pages, kv_heads, width]: exact ones, and those by codes."""
    dtype, width = backend.precision.kv_operands.name, backend.config.head_dim
    chunks = [on_host(backend, bounds)[0] for _, bounds in cache.table.chunks]
    if not chunks:
        return (np.zeros((2, 0, backend.config.num_kv_heads, width)),) * 2
    values = np.concatenate(chunks, axis=1)
    kv_heads, groups = values.shape[:2]
    exact, base, step, words = np.split(values, width * np.array([32, 33, 34]), axis=2)
    exact = widened(exact, dtype).reshape(kv_heads, groups * 16, 2, width).transpose(2, 1, 0, 3)
    base, step = (widened(x, dtype)[:, :, None, None] for x in (base, step))
    words = np.ascontiguousarray(words).view(np.uint32).reshape(kv_heads, groups, 2, 16, width // 8, 1)
    codes = words >> np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32) & 15
    coded = held(base + codes.reshape(kv_heads, groups, 2, 16, width) * step, dtype)
    return exact, coded.transpose(2, 1, 3, 0, 4).reshape(exact.shape)


@steady(80)
@given(
    st.sampled_from(DTYPES),
    shapes(),
    st.sampled_from([1, 3, 4, 5, 16, 32, 64]),
    st.one_of(st.integers(0, 300), st.integers(900, 2300)),
    st.sampled_from([16, 48, 64]),
    cards(),
    KV,
)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 4096, 16, {}, "auto")
@example("float16", {"kv_heads": 8, "group": 2, "width": 128}, 16, 1030, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 2, "group": 4, "width": 64}, 16, 2049, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 32, 0, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 1, "group": 3, "width": 24}, 200, 100, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 4096, 16, {}, "int8")
@example("bfloat16", {"kv_heads": 8, "group": 8, "width": 128}, 16, 4100, 48, {}, "int8")
@example("float16", {"kv_heads": 2, "group": 4, "width": 64}, 16, 2049, 16, {}, "fp8")
@example("float16", {"kv_heads": 1, "group": 3, "width": 128}, 3, 300, 16, {}, "int8")
@example("float32", {"kv_heads": 2, "group": 3, "width": 128}, 5, 300, 16, {}, "int8")
def test_prefix_and_block_attention(dtype, shape, tokens, length, page_size, card, kv):
    rng = np.random.default_rng(tokens + length)
    backend = new_backend(dtype, card, kv, **shape)
    held_as, bounds_as = kv_format(backend)
    heads, width = shape["kv_heads"] * shape["group"], shape["width"]
    k, v = (rng.standard_normal((length, shape["kv_heads"], width), np.float32) for _ in range(2))
    q = 2 * rng.standard_normal((tokens, heads, width), np.float32)
    block_k, block_v = (rng.standard_normal((tokens, shape["kv_heads"], width), np.float32) for _ in range(2))
    cache = filled_cache(backend, k, v, page_size, random_pieces(rng, length))
    cache.reserve(length + tokens)
    poison(backend)
    with backend.memory.stream:
        batch = place(backend, cache, tokens)
        prefix = backend.prefix_attention(0, to_device(backend, q), batch)
        o, lse = backend.merge(prefix)
        merged = backend.block_attention(
            *(to_device(backend, x) for x in (q, block_k, block_v)), prefix, batch
        )
    expected = ref.softmax_attention(q, held(k, held_as), held(v, held_as))
    o, lse, merged = on_host(backend, o, lse, merged)
    assert_close(o, expected[0], TOLERANCE[dtype])
    assert (lse == expected[1])[np.isinf(expected[1])].all()
    finite = np.isfinite(expected[1])
    assert np.allclose(lse[finite], expected[1][finite], atol=2 * TOLERANCE[dtype], rtol=1e-5)
    expected = ref.merge(*expected, *ref.softmax_attention(q, block_k, block_v))
    assert_close(widened(merged, dtype), expected, TOLERANCE[dtype])

    exact, coded = page_bounds(backend, cache)
    expected = held_page_bounds(k, page_size, held_as, bounds_as)
    np.testing.assert_array_equal(exact[:, : cache.pages], expected)
    pages = length // (16 * page_size) * 16
    expected = [x[:pages] for x in coded_page_bounds(k, page_size, held_as, bounds_as)]
    np.testing.assert_array_equal(coded[:, :pages], expected)


@steady(60)
@given(
    st.sampled_from(DTYPES),
    shapes(),
    st.sampled_from([1, 3, 4, 16, 32]),
    st.one_of(st.integers(0, 300), st.integers(900, 2300)),
    st.sampled_from([16, 48]),
    cards(),
    KV,
)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 4096, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 2, "width": 64}, 16, 2040, 16, {}, "auto")
@example("float16", {"kv_heads": 2, "group": 8, "width": 128}, 16, 0, 16, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 4096, 16, {}, "int8")
@example("float16", {"kv_heads": 2, "group": 8, "width": 128}, 4, 300, 16, {}, "fp8")
def test_a_first_pass_sees_what_the_commit_that_rides_with_it_writes(
    dtype, shape, block_length, length, page_size, card, kv
):
    rng = np.random.default_rng(block_length + length)
    backend = new_backend(dtype, card, kv, **shape)
    kv_shape, rows = (shape["kv_heads"], shape["width"]), 2 * block_length
    prefix = [rng.standard_normal((length, *kv_shape), np.float32) for _ in range(2)]
    fresh = [rng.standard_normal((rows, *kv_shape), np.float32) for _ in range(2)]
    q = 2 * rng.standard_normal((rows, shape["kv_heads"] * shape["group"], shape["width"]), np.float32)
    cache = filled_cache(backend, *prefix, page_size, random_pieces(rng, length))
    cache.reserve(length + rows)
    slot = backend.new_slot(StoredResults(block_length, attention=True))
    (commit,) = block_batch(cache, block_length, PassKind.COMMIT).sequences
    (first,) = block_batch(cache, block_length, PassKind.FIRST, slot=slot).sequences
    ride = PassBatch((commit, replace(first, prefix_length=length + block_length)))
    poison(backend)
    with backend.memory.stream:
        batch = backend.runner.place(ride)
        on_device, *block = (to_device(backend, x) for x in (q, *fresh))
        backend.write_kv(0, *block, batch)
        parts = backend.prefix_attention(0, on_device, batch)
        parts = backend.store_attention(0, on_device, parts, batch)
        found = backend.block_attention(on_device, *block, parts, batch)
    stored = on_host(backend, *(stored_array(backend, slot, name) for name in ("queries", "o", "lse")))
    k, v = (held(np.concatenate(both), kv_format(backend)[0]) for both in zip(prefix, fresh, strict=True))
    for index in range(2):
        own, seen = slice(index * block_length, (index + 1) * block_length), length + index * block_length
        of_prefix = ref.softmax_attention(q[own], k[:seen], v[:seen])
        expected = ref.merge(*of_prefix, *ref.softmax_attention(q[own], fresh[0][own], fresh[1][own]))
        assert_close(widened(on_host(backend, found[own]), dtype), expected, TOLERANCE[dtype])
    np.testing.assert_array_equal(stored[0], q[own])
    assert_close(stored[1], of_prefix[0], TOLERANCE[dtype])
    np.testing.assert_allclose(stored[2], of_prefix[1], atol=2 * TOLERANCE[dtype], rtol=1e-5)


@steady(60)
@given(
    st.sampled_from(DTYPES),
    shapes(),
    st.sampled_from([1, 4, 5, 16, 32]),
    st.integers(0, 60),
    st.integers(1, 60),
    cards(),
    KV,
)
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 64, 64, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 4, 7, 300, {}, "auto")
@example("bfloat16", {"kv_heads": 1, "group": 1, "width": 64}, 32, 0, 40, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 250, 16, {}, "auto")
@example("float16", {"kv_heads": 2, "group": 3, "width": 64}, 5, 700, 13, {}, "auto")
@example("float16", {"kv_heads": 1, "group": 2, "width": 128}, 32, 130, 3, {"capability": (8, 0)}, "auto")
@example("float32", {"kv_heads": 2, "group": 2, "width": 72}, 4, 600, 9, {}, "auto")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 64, 64, {}, "int8")
@example("bfloat16", {"kv_heads": 8, "group": 4, "width": 128}, 16, 250, 16, {}, "fp8")
def test_block_causal_attention(dtype, shape, block_length, blocks_before, blocks, card, kv):
    rng = np.random.default_rng(block_length + blocks)
    backend = new_backend(dtype, card, kv, **shape)
    heads, width = shape["kv_heads"] * shape["group"], shape["width"]
    before, tokens = blocks_before * block_length, blocks * block_length
    length = before + tokens
    k, v = (rng.standard_normal((length, shape["kv_heads"], width), np.float32) for _ in range(2))
    q = 2 * rng.standard_normal((tokens, heads, width), np.float32)
    cache = filled_cache(backend, k, v, 16, [n for n in (before, tokens) if n])
    cache.length = before
    poison(backend)
    with backend.memory.stream:
        batch = place(backend, cache, tokens, options=options_of(block_length))
        o = backend.causal_attention(0, to_device(backend, q), batch)
    k, v = (held(x, kv_format(backend)[0]) for x in (k, v))
    expected = np.concatenate(
        [
            ref.softmax_attention(
                q[start : start + block_length],
                k[: before + start + block_length],
                v[: before + start + block_length],
            )[0]
            for start in range(0, tokens, block_length)
        ]
    )
    assert_close(widened(on_host(backend, o), dtype), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("ends", [(0.1, 6), (6, 0.1), (1, 1)])
@pytest.mark.parametrize(("tokens", "length"), [(16, 3000), (32, 1000), (8, 700), (3, 130), (16, 64), (1, 1)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kv", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_that_rise_and_fall_along_the_prefix(dtype, kv, width, tokens, length, ends):
    """In one part, so that weights so far are scaled again and again, and buffers used many times."""
    rng = np.random.default_rng(length)
    backend = new_backend(dtype, {"sms": 1}, kv, kv_heads=2, group=4, width=width)
    k, v = (rng.standard_normal((length, 2, width), np.float32) for _ in range(2))
    k *= np.linspace(*ends, length, dtype=np.float32)[:, None, None]
    cache = filled_cache(backend, k, v, 16, random_pieces(rng, length))
    q = rng.standard_normal((tokens, 8, width), np.float32)
    poison(backend)
    with backend.memory.stream:
        parts = backend.prefix_attention(0, to_device(backend, q), place(backend, cache, tokens))
        o, lse = on_host(backend, *backend.merge(parts))
    held_as, _ = kv_format(backend)
    expected = ref.softmax_attention(q, held(k, held_as), held(v, held_as))
    assert_close(o, expected[0], 2 * TOLERANCE[dtype])
    assert np.allclose(lse, expected[1], atol=4 * TOLERANCE[dtype], rtol=1e-3)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_the_reference(dtype, kv, width):
    rng = np.random.default_rng(width)
    sizes = np.float32([0, 1e-44, 1e-30, 1e-3, 1, 1e4, 1e30, np.nan, np.inf])
    k, v = (rng.standard_normal((500, 3, width), np.float32) for _ in range(2))
    for x in (k, v):
        x *= rng.choice(sizes[:-2], (500, 3, 1))
        x[7::50, :, 1] = np.nan
        x[9::50, :, 2] = -np.inf
    backend = new_backend(dtype, kv=kv, kv_heads=3, group=1, width=width)
    cache = filled_cache(backend, k, v, 16, [*random_pieces(rng, 500)])
    chunks = [on_host(backend, chunk)[0] for chunk, _ in cache.table.chunks]
    for kind, x in enumerate((k, v)):
        groups = np.concatenate([c[kind].reshape(3, -1, 8 * (width + 4)) for c in chunks], axis=1)[:, :63]
        scales = np.ascontiguousarray(groups[..., 8 * width :]).view(np.float32)
        codes = groups[..., : 8 * width]
        if dtype != "float32" and width % 64 == 0:
            codes = interleaved(codes.reshape(3, 63, width // 64, 512), kind)
        codes = codes.reshape(3, 504, width)[:, :500].transpose(1, 0, 2)
        numbers, expected = encoded(x, kv)
        np.testing.assert_array_equal(scales.reshape(3, 504)[:, :500].T[..., None], expected)
        sound = np.isfinite(expected[..., 0])
        np.testing.assert_array_equal(code_values(codes, kv)[sound], numbers[sound])


def interleaved(codes, kind):
    """Codes [..., chunks of 64 channels, 512] of groups of 8 positions as [..., 8 positions, channels]."""
    found = np.empty((*codes.shape[:-1], 8, 64), codes.dtype)
    for row in range(8):
        for c in range(64):
            at = row * 64 + c // 4 * 4 + [0, 2, 1, 3][c % 4]
            if kind:
                within = c // 16 % 2 * 4 + c // 8 % 2 + row % 2 * 2
                at = c // 32 * 256 + (c % 8 * 4 + row // 2) * 8 + within
            found[..., row, c] = codes[..., at]
    return np.moveaxis(found, -2, -3)


def code_values(codes, kv):
    if kv == "int8":
        return codes.astype(np.float64) - 128
    exponent, eighths = codes >> 3 & 15, (codes & 7).astype(np.float64)
    normal = (1 + eighths / 8) * 2.0 ** (exponent.astype(np.float64) - 7)
    return np.where(codes >> 7, -1.0, 1.0) * np.where(exponent, normal, eighths / 512)


@pytest.mark.parametrize("ends", [(1e-4, 10), (10, 1e-4)])
@pytest.mark.parametrize("tokens", [4, 16, 32])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_values_that_rise_and_fall_along_the_prefix(kv, tokens, ends):
    """In one part, so that sums so far are scaled again and again as scales of values grow."""
    rng = np.random.default_rng(tokens)
    backend = new_backend("bfloat16", {"sms": 1}, kv, kv_heads=2, group=4, width=128)
    k, v = (rng.standard_normal((1000, 2, 128), np.float32) for _ in range(2))
    v *= np.geomspace(*ends, 1000, dtype=np.float32)[:, None, None]
    cache = filled_cache(backend, k, v, 16, random_pieces(rng, 1000))
    q = rng.standard_normal((tokens, 8, 128), np.float32)
    with backend.memory.stream:
        parts = backend.prefix_attention(0, to_device(backend, q), place(backend, cache, tokens))
        o, _ = backend.merge(parts)
    expected, _ = ref.softmax_attention(q, held(k, kv), held(v, kv))
    assert_close(on_host(backend, o), expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kv", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_is_not_finite_shows(dtype, kv, bad):
    rng = np.random.default_rng(0)
    backend = new_backend(dtype, kv=kv, kv_heads=1, group=2, width=64)
    k, v = (rng.standard_normal((40, 1, 64), np.float32) for _ in range(2))
    k[20, 0, 3] = bad
    cache = backend.new_cache(16)
    cache.reserve(44)
    with backend.memory.stream:
        backend.write_kv(0, to_device(backend, k), to_device(backend, v), place(backend, cache, 40))
        cache.advance(40)
        batch = place(backend, cache, 4)
        o, _ = backend.merge(
            backend.prefix_attention(0, to_device(backend, np.abs(v[:4]).repeat(2, 1)), batch)
        )
    assert np.isnan(on_host(backend, o)).any(axis=2).all()
    bounds, _ = page_bounds(backend, cache)
    lost = 1 if kv == "auto" else 64  # channels: what shares a scale is lost with it
    assert np.isnan(bounds[:, 1, 0, 3]).all() and np.isnan(bounds[:, :3]).sum() == 2 * lost


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-3, 6e4])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_of_any_size_are_held_in_8_bits(dtype, kv, largest):
    """In float16 weights times small scales must not lose bits."""
    rng = np.random.default_rng(0)
    backend = new_backend(dtype, kv=kv, kv_heads=1, group=2, width=128)
    k, v = (rng.uniform(-1, 1, (100, 1, 128)).astype(np.float32) for _ in range(2))
    v *= np.float32(largest)
    cache = filled_cache(backend, k, v, 16, [100])
    q = rng.standard_normal((4, 2, 128), np.float32)
    with backend.memory.stream:
        parts = backend.prefix_attention(0, to_device(backend, q), place(backend, cache, 4))
        o, _ = backend.merge(parts)
    expected, _ = ref.softmax_attention(q, held(k, kv), held(v, kv))
    found = on_host(backend, o)
    norm = np.linalg.norm(expected)
    assert np.linalg.norm(found - expected) <= TOLERANCE[dtype] * norm or (
        norm < 1e-40 and np.abs(found).max() < 1e-40
    )


# Sampling


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.5},
        {"temperature": 1e-3},
    ],
)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 70), (16, 1000), (16, 151_936)])
def test_sampling_is_that_of_the_cpu(options, tokens, vocab):
    rng = np.random.default_rng(vocab)
    backend = new_backend("float32", kv_heads=1, group=1, width=16, vocab_size=vocab)
    logits = exact(3 * rng.standard_normal((tokens, vocab)))
    rows = np.flatnonzero(rng.random(tokens) < 0.7) if tokens > 1 else np.array([0])
    uniforms = rng.random(tokens)
    config = generation_config(
        backend.config,
        {"mask_token_id": 7, "remasking": "entropy_bounded", "block_length": tokens, **options},
    )
    logits[:, 7] = 50.0
    matmul = split_matmul(backend, logits, rng)
    backend.linear = lambda hidden, head: matmul
    cache = backend.new_cache(16)
    cache.reserve(1)
    batch = block_batch(cache, tokens, masked=rows, uniforms=uniforms, options=config)
    hidden = np.empty((tokens, 0))
    body = PassBody(lambda batch: (backend.propose(hidden, None, batch), []))
    found = backend.begin(batch, body)().proposals
    logits = matmul_array(backend, matmul).astype(np.float32)
    logits[:, 7] = -np.inf
    expected = propose(
        logits[rows],
        uniforms[rows],
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        with_entropy=True,
    )
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert np.allclose(found.confidence, expected.confidence, rtol=1e-4)
    assert np.allclose(found.entropy, expected.entropy, rtol=1e-4, atol=1e-5)
