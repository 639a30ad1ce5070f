"""The paged cache's bookkeeping: writing, page bounds, rounding, and lists of pages."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference as ref
from hypothesis import example, given
from hypothesis import strategies as st
from kv import (
    HELD_AS,
    OUTERMOST,
    at_most,
    bfloat16,
    coded_page_bounds,
    empty_table,
    encoded,
    held,
    held_page_bounds,
    model_config,
    narrow,
    precision_of,
)
from passes import block_batch, write

from losart.backends.cpu.backend import CpuBackend
from losart.backends.cpu.convert import widen
from losart.backends.cpu.kv_index import PageTable, mark_pages, positions_in, top_pages, united
from losart.config.precision import FORMATS, KV_FORMATS, Precision
from losart.engine.kv_cache import PagedKVCache
from losart.errors import OutOfMemoryError

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]
quick = at_most(60)
operands_formats = st.sampled_from(list(FORMATS))


def random_kv(positions: int, kv_heads: int = 2, width: int = 16, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((positions, kv_heads, width), np.float32) for _ in range(2)]


def read_back(chunks, layer: int, positions: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [positions, kv_heads, width] in float64, by the layout that kv_index describes."""
    if dtype in KV_FORMATS:
        numbers, scales = read_codes(chunks, layer, positions, dtype)
        with np.errstate(over="ignore"):
            return tuple((numbers.astype(np.float32) * scales).astype(np.float64))
    kv = np.concatenate([kv[layer] for kv, _ in chunks], axis=2)
    _, kv_heads, capacity, width = kv.shape
    keys = (
        kv[0].reshape(kv_heads, capacity // 16, width, 16).swapaxes(2, 3).reshape(kv_heads, capacity, width)
    )
    wide = (widen(np.ascontiguousarray(x.swapaxes(0, 1)[:positions])) for x in (keys, kv[1]))
    return tuple(x.astype(np.float64) for x in wide)


def numbers_of(dtype: str) -> np.ndarray:
    """What each of the 256 codes stands for."""
    codes = np.arange(256)
    if dtype == "int8":
        return codes - 128.0
    sign, exponent, eighths = np.where(codes < 128, 1.0, -1.0), codes // 8 % 16, codes % 8
    magnitude = np.ldexp(np.where(exponent, 8 + eighths, eighths), np.maximum(exponent, 1) - 10)
    return np.where(codes % 128 == 127, np.nan, sign * magnitude)


def read_codes(chunks, layer: int, positions: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [2, positions, kv_heads, width] of keys' and values' codes of 8 bits, and scales [..., 1]."""
    kv = np.concatenate([kv[layer] for kv, _ in chunks], axis=2)
    _, kv_heads, capacity, width = kv.shape
    width -= 4
    slabs = kv.reshape(2, kv_heads, capacity // 16, 16 * width + 64)
    codes, scales = np.split(slabs, [16 * width], axis=3)
    keys = codes[0].reshape(kv_heads, -1, width, 16).swapaxes(2, 3)
    codes = np.stack([keys, codes[1].reshape(keys.shape)]).reshape(2, kv_heads, capacity, width)
    scales = np.ascontiguousarray(scales).view(np.float32).reshape(2, kv_heads, capacity, 1)
    return tuple(x.swapaxes(1, 2)[:, :positions] for x in (numbers_of(dtype)[codes], scales))


def bounds(chunks, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest keys, each [pages, kv_heads, width]."""
    both = np.concatenate([bounds[layer] for _, bounds in chunks], axis=1)
    kv_heads, groups, values = both.shape
    channels = 2 * (values // 38)
    both = both[:, :, : 16 * channels].reshape(kv_heads, groups, channels, 16)
    pages = both.transpose(1, 3, 0, 2).reshape(groups * 16, kv_heads, channels)
    return pages[:, :, : channels // 2], pages[:, :, channels // 2 :]


KINDS_OF_KEYS = {
    "normal": lambda x: x,
    "equal": lambda x: np.full_like(x, 1.7),
    "zero": np.zeros_like,
    "far from zero": lambda x: 300 + x,
    "tiny": lambda x: x * np.float32(1e-6),
    "below float16": lambda x: x * np.float32(1e-9),
    "large": lambda x: np.clip(x, -2, 2) * np.float32(3e4),
    "one outlier": lambda x: np.where(np.arange(len(x))[:, None, None] == 7, np.float32(1e4), x),
}


# Writing


@st.composite
def pieces(draw):
    total = draw(st.integers(1, 700))
    cuts = draw(st.sets(st.integers(1, total), max_size=12))
    return total, sorted(cuts | {0, total})


@quick
@given(pieces(), st.sampled_from([16, 32, 48, 64]), st.sampled_from(list(HELD_AS)))
def test_written_in_pieces_is_written_at_once(piece, page_size, dtype):
    total, cuts = piece
    k, v = random_kv(total, seed=total)
    whole, whole_chunks = empty_table(2, 16, page_size, dtype, total)
    whole.write(1, 0, k, v)
    parts, chunks = empty_table(2, 16, page_size, dtype, total)
    for start, end in itertools.pairwise(cuts):
        parts.write(1, start, k[start:end], v[start:end])
    for chunk, expected in zip(chunks, whole_chunks, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(chunk, expected, strict=True))

    np.testing.assert_array_equal(read_back(chunks, 1, total, dtype), [held(x, dtype) for x in (k, v)])
    assert not any(kv[0].any() or bounds[0].any() for kv, bounds in chunks), "the other layer is untouched"


@quick
@given(
    *(st.integers(1, 700), st.sampled_from([16, 32, 48, 64]), st.sampled_from(list(HELD_AS))),
    *(operands_formats, st.integers(1, 3), st.sampled_from(list(KINDS_OF_KEYS))),
)
def test_bounds_are_those_of_the_held_keys(total, page_size, dtype, operands, kv_heads, kind):
    k, v = random_kv(total, kv_heads, seed=total)
    k = KINDS_OF_KEYS[kind](k)
    table, chunks = empty_table(kv_heads, 16, page_size, dtype, total, operands=operands)
    table.write(0, 0, 7 - k, v)  # an earlier sequence: it must not show
    table.write(0, 0, k, v)
    found = [bound[: -(-total // page_size)] for bound in reversed(bounds(chunks, 0))]
    np.testing.assert_array_equal(found, held_page_bounds(k, page_size, dtype, operands))
    for page, start in enumerate(range(0, total, page_size)):
        keys = held(k[start : start + page_size], dtype)
        assert (found[0][page] <= keys).all() and (found[1][page] >= keys).all()


def coded_bounds(
    chunks, layer: int, dtype: str, operands: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest keys by their codes, each [pages, kv_heads, width]."""
    values = np.concatenate([bounds[layer] for _, bounds in chunks], axis=1)
    kv_heads, groups, width = *values.shape[:2], values.shape[2] // 38
    base, step, words = np.split(values[:, :, 32 * width :], [width, 2 * width], axis=2)
    words = np.ascontiguousarray(words).view(np.uint64).reshape(kv_heads, groups, 2, width, 1)
    codes = words >> (4 * np.arange(16, dtype=np.uint64)) & np.uint64(15)
    exact = base[:, :, None, :, None].astype(np.float64) + codes * step[:, :, None, :, None].astype(
        np.float64
    )
    exact = held(exact, precision_of(dtype, operands).kv_operands.name)
    largest, smallest = exact.transpose(2, 1, 4, 0, 3).reshape(2, groups * 16, kv_heads, width)
    return smallest, largest


@quick
@given(
    *(st.integers(1, 700), st.sampled_from([16, 32]), st.sampled_from(list(HELD_AS))),
    *(operands_formats, st.sampled_from(list(KINDS_OF_KEYS))),
)
@example(600, 16, "float16", "float16", "below float16")
@example(600, 16, "bfloat16", "bfloat16", "far from zero")
@example(600, 16, "int8", "float16", "below float16")
@example(600, 16, "fp8", "bfloat16", "far from zero")
def test_coded_bounds_are_the_references_and_bound_the_keys(total, page_size, dtype, operands, kind):
    k, v = random_kv(total, seed=total)
    k = KINDS_OF_KEYS[kind](k)
    table, chunks = empty_table(2, 16, page_size, dtype, total, operands=operands)
    table.write(0, 0, 7 - k, v)  # an earlier sequence: it must not show
    table.write(0, 0, k, v)
    pages = total // (16 * page_size) * 16
    found = [x[:pages] for x in coded_bounds(chunks, 0, dtype, operands)]
    expected = [x[:pages] for x in coded_page_bounds(k, page_size, dtype, operands)]
    np.testing.assert_array_equal(found, expected)
    smallest, largest = (x[:pages] for x in ref.page_bounds(held(k, dtype), page_size))
    assert (found[0] <= smallest).all() and (found[1] >= largest).all()
    # By less than two steps, and what the step's and the sum's own rounding add.
    low, high = held_page_bounds(k, page_size, dtype, operands)
    spread = (high.max(axis=(0, 2)) - low.min(axis=(0, 2))).max()
    assert (found[1] - high[:pages]).max(initial=0) <= spread / 7 + 2.0**-12


@pytest.mark.parametrize("dtype", HELD_AS)
def test_a_group_with_a_key_that_is_not_finite_is_not_coded(dtype):
    k, v = random_kv(512)
    k[300, 1, 5] = np.nan
    table, chunks = empty_table(2, 16, 16, dtype, 512)
    table.write(0, 0, k, v)
    smallest, largest = coded_bounds(chunks, 0, dtype)
    for bounds in (smallest, largest):
        assert np.isnan(bounds[16:, 1]).all() and not np.isnan(bounds[16:, 0]).any()
        assert not np.isnan(bounds[:16]).any()


@pytest.mark.parametrize("dtype", HELD_AS)
@pytest.mark.parametrize("place", [0, 1, 15])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38])
def test_a_key_that_is_not_finite_stays_so_and_in_the_bounds(dtype, place, bad):
    """As NaN, whatever it was: the page is then selected, and no query passes over the key."""
    if np.isfinite(held(np.float32([bad]), dtype)).all():
        bad = np.nan
    k, v = random_kv(16)
    k[place, 0, 5] = bad
    table, chunks = empty_table(2, 16, 16, dtype, 16)
    table.write(0, 0, k, v)
    expected = np.zeros((2, 16), bool)
    expected[0, slice(None) if dtype in KV_FORMATS else 5] = True  # channels that share a scale
    for bound in bounds(chunks, 0):
        np.testing.assert_array_equal(np.isnan(bound[0]), expected)
    np.testing.assert_array_equal(np.isnan(read_back(chunks, 0, 16, dtype)[0][place]), expected)


def test_writing_outside_is_refused():
    table, _ = empty_table(2, 16, 16, positions=256)
    for layer, start, sizes in [
        (2, 0, {}),
        (0, 250, {}),
        (0, -1, {}),
        (0, 0, {"width": 32}),
        (0, 0, {"kv_heads": 1}),
    ]:
        with pytest.raises(ValueError, match=r"outside the cache|must be"):
            table.write(layer, start, *random_kv(8, **sizes))


def test_no_memory_is_an_error_of_ours_and_the_cache_stays_valid():
    config = model_config(2, 1, 16)
    given_out = []

    def allocate(shape, format):
        if len(given_out) == 3:
            raise MemoryError
        given_out.append(np.zeros(shape, format.array))
        return given_out[-1]

    cache = PagedKVCache(PageTable(2, 2, 16, 16, 1024, *[FORMATS["float32"]] * 2), allocate)
    k, v = random_kv(1024)
    write(cache, 0, k, v)
    cache.advance(1024)
    with pytest.raises(OutOfMemoryError, match=r"1025 .* room for 1024, 0 MiB more"):
        write(cache, 0, k[:1], v[:1])
    q = np.ones((1, 2, 16), np.float32)
    backend = CpuBackend(config, Precision.of("float32"))
    assert np.isfinite(backend.prefix_attention(0, q, block_batch(cache, 1))[0]).all()


# Rounding


def widened_float16(bits: np.ndarray, dtype: type) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # Arm flags signalling NaNs
        return bits.view(np.float16).astype(dtype)


def tricky_floats(bits: int) -> np.ndarray:
    """Every value of a 16-bit format, the midpoints, float32's neighbours of both, and more."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if bits == 7:
        exact = (patterns.astype(np.uint32) << 16).view(np.float32)
    else:
        exact = widened_float16(patterns, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        ordered = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
        halfway = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
        near = [np.nextafter(x, np.float32(way)) for x in (exact, halfway) for way in (np.inf, -np.inf)]
    anything = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint32).view(np.float32)
    ends = np.float32([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.3961775e38, 3.4028235e38])
    return np.concatenate([exact, halfway, *near, anything, ends, -ends])


def expected_of(dtype: str, x: np.ndarray) -> np.ndarray:
    if dtype == "bfloat16":
        return bfloat16(x)
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float16).astype(np.float64)


def assert_same_numbers(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize(("dtype", "mantissa"), [("bfloat16", 7), ("float16", 10)])
def test_narrowing_rounds_to_the_nearest_and_ties_to_even(dtype, mantissa):
    x = tricky_floats(mantissa)
    expected = expected_of(dtype, x)
    assert_same_numbers(widen(narrow(x, dtype)), expected)
    # The cache rounds by itself.
    x = np.append(x, np.zeros(-len(x) % 32, np.float32))
    v = x.reshape(-1, 2, 16)
    table, chunks = empty_table(2, 16, 16, dtype, len(v), chunk_pages=1600)
    table.write(0, 0, np.zeros_like(v), v)
    values = read_back(chunks, 0, len(v), dtype)[1].reshape(-1)
    assert_same_numbers(values[: len(expected)], expected)


def tricky_quotients(dtype: str) -> np.ndarray:
    """Every number that codes stand for, the midpoints, float32's neighbours of both, and more."""
    exact = np.sort(numbers_of(dtype)[np.abs(numbers_of(dtype)) <= OUTERMOST[dtype]]).astype(np.float32)
    halfway = (exact[1:] + exact[:-1]) / 2
    near = [np.nextafter(x, np.float32(way)) for x in (exact, halfway) for way in (np.inf, -np.inf)]
    tiny = np.float32([1e-45, 1e-38, 2.0**-10, 2.0**-11])
    x = np.concatenate([exact, halfway, *near, tiny, -tiny, [-0.0]]).astype(np.float32)
    return x[np.abs(x) <= OUTERMOST[dtype]]


@pytest.mark.parametrize("dtype", KV_FORMATS)
def test_codes_are_the_nearest_and_ties_go_to_even(dtype):
    x = tricky_quotients(dtype)
    x = np.append(x, np.zeros(-len(x) % 30, np.float32)).reshape(-1, 2, 15)
    outermost = np.full((*x.shape[:2], 1), OUTERMOST[dtype], np.float32)  # a scale of 1
    x = np.concatenate([x, outermost], axis=2)
    numbers, scales = encoded(x, dtype)
    assert (scales == 1).all()
    table, chunks = empty_table(2, 16, 16, dtype, len(x))
    table.write(0, 0, x, -x)
    found, found_scales = read_codes(chunks, 0, len(x), dtype)
    np.testing.assert_array_equal(found, [numbers, -numbers])
    np.testing.assert_array_equal(found_scales, [scales, scales])
    if dtype == "fp8":
        np.testing.assert_array_equal(np.signbit(found[0]), np.signbit(x))


rows_of_8_bits = st.one_of(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16),
    st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16),
    st.lists(st.floats(-(2.0**-126), 2.0**-126, width=32), min_size=16, max_size=16),  # subnormal
    st.lists(st.sampled_from([*SPECIAL, 1e-45, -1e-45, 2e-43, 1e-30]), min_size=16, max_size=16),
)


@at_most(200)
@given(st.lists(rows_of_8_bits, min_size=1, max_size=20), st.sampled_from(list(KV_FORMATS)))
@example([[0.0] * 16, [1e-45] * 16, [-3.4028234663852886e38] * 16], "int8")
@example([[-0.0] * 16, [1e-45] * 16, [-3.4028234663852886e38] * 16], "fp8")
@example([[np.nan] + [1.0] * 15, [2.0] * 16, [1.0] * 15 + [-np.inf]], "int8")
def test_codes_and_scales_byte_for_byte(rows, dtype):
    k = np.array(rows, np.float32)[:, None]
    v = np.ascontiguousarray(k[::-1])
    table, chunks = empty_table(1, 16, 16, dtype, len(k))
    table.write(1, 0, k, v)
    numbers, scales = read_codes(chunks, 1, len(k), dtype)
    for found, found_scales, x in zip(numbers, scales, (k, v), strict=True):
        expected, expected_scales = encoded(x, dtype)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_scales, expected_scales)
        not_finite = ~np.isfinite(x).all(axis=-1)
        np.testing.assert_array_equal(np.isnan(found_scales[..., 0]), not_finite)
    kv = chunks[0][0][1]
    assert (kv[:, :, len(k) // 16 * 16 + 16 :] == 0).all(), "later slabs are untouched"


def test_widening_is_exact():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    assert_same_numbers(widen(patterns.view(np.float16)), widened_float16(patterns, np.float64))
    bits = widen(patterns).view(np.uint32)
    np.testing.assert_array_equal(bits, patterns.astype(np.uint32) << 16)


def test_nan_stays_nan():
    quiet_and_signalling = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001, 0xFFFFFFFF], np.uint32)
    for dtype in ("bfloat16", "float16"):
        assert np.isnan(widen(narrow(quiet_and_signalling.view(np.float32), dtype))).all()


# Lists of pages


def sorted_top(scores: np.ndarray, count: int) -> list[int]:
    """By a plain sort: NaN first, then the largest; of equal ones, -0.0 and 0.0 too, the earlier."""
    order = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -scores[i], i))
    return order[:count]


tied = st.sampled_from([*SPECIAL, 2.0, 1e-45, -1e-45, 3e38])
score = st.one_of(tied, st.floats(-4, 4, width=32))


@st.composite
def page_scores(draw):
    heads, rows, pages = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.integers(0, 40))
    values = draw(st.lists(score, min_size=heads * rows * pages, max_size=heads * rows * pages))
    scores = np.full((heads, rows, -(-pages // 16) * 16), np.nan, np.float32)  # columns that are no pages
    scores[:, :, :pages] = np.array(values, np.float32).reshape(heads, rows, pages)
    return scores, pages


@at_most(200)
@given(page_scores(), st.integers(1, 45))
def test_top_pages_and_their_union_are_those_of_a_plain_sort(drawn, count):
    scores, pages = drawn
    top = top_pages(scores, pages, count)
    ids, counts = united(top[:, :, ::-1].copy(), pages)
    assert top.dtype == ids.dtype == counts.dtype == np.int32
    for head, rows in enumerate(scores):
        chosen = [sorted(sorted_top(row[:pages].tolist(), count)) for row in rows]
        assert top[head].tolist() == chosen
        assert ids[head, : counts[head]].tolist() == sorted({page for row in chosen for page in row})


def test_a_nan_of_either_sign_is_selected():
    scores = np.arange(32, dtype=np.float32).reshape(1, 1, 32).repeat(2, axis=0)
    scores[:, :, 3] = np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)[:, None]
    assert top_pages(scores, 32, 2).tolist() == [[[3, 31]]] * 2


@pytest.mark.parametrize(("pages", "count"), [(17, 1), (-1, 1), (4, 0)])
def test_impossible_counts_of_pages_are_refused(pages, count):
    with pytest.raises(ValueError, match="pages must be within the scores"):
        top_pages(np.zeros((1, 1, 16), np.float32), pages, count)


@pytest.mark.parametrize("page", [-1, 4])
def test_a_page_that_does_not_exist_is_not_united(page):
    with pytest.raises(ValueError, match="selected pages must exist"):
        united(np.array([[[0, page]]], np.int32), 4)


@quick
@given(st.integers(0, 300), st.sampled_from([16, 48, 64]), st.integers(1, 4), st.data())
def test_positions_of_a_list(length, page_size, heads, data):
    pages = -(-length // page_size)
    chosen = data.draw(st.lists(st.sets(st.integers(0, pages - 1) if pages else st.nothing()),
                                min_size=heads, max_size=heads))  # fmt: skip
    ids = np.full((heads, pages), -1, np.int32)
    for head, some in enumerate(chosen):
        ids[head, : len(some)] = sorted(some)
    counts = np.array([len(some) for some in chosen], np.int32)
    expected = sum(position // page_size in some for some in chosen for position in range(length))
    assert positions_in(ids, counts, page_size, length) == expected


# Going back


@st.composite
def written_and_begun_with(draw):
    """Writes of whole blocks, some never taken into the prefix, and caches that begin with the one before."""
    block = draw(st.integers(1, 20))
    steps = st.one_of(
        st.tuples(st.just("write"), st.integers(1, 300 // block)),
        st.tuples(st.just("lost"), st.integers(1, 120 // block)),
        st.tuples(st.just("share"), st.integers(0, 800)),
    )
    return (
        block,
        draw(st.lists(steps, min_size=1, max_size=10)),
        draw(st.lists(st.integers(1, 4), min_size=10)),
    )


@quick
@given(written_and_begun_with(), st.sampled_from([16, 48]), st.sampled_from(list(HELD_AS)), operands_formats)
def test_a_cache_that_begins_with_another_has_its_keys_and_their_bounds(steps, page_size, dtype, operands):
    """Whatever the sizes of their chunks."""
    block, steps, groups = steps
    step = math.lcm(page_size, block)

    def allocate(shape, format):
        return np.zeros(shape, format.array)

    def new_cache():
        chunk = groups.pop() * 16 * page_size if groups else 16 * page_size
        formats = precision_of(dtype, operands)
        return PagedKVCache(PageTable(1, 2, 16, page_size, chunk, formats.kv, formats.kv_operands), allocate)

    cache = new_cache()
    kv = [np.zeros((0, 2, 16), np.float32)] * 2
    dirty = False
    for seed, (kind, count) in enumerate([*steps, ("share", 10**6)]):
        if kind == "share" or dirty:
            before, cache = cache, new_cache()
            kept = min(count if kind == "share" else before.length, before.length) // step * step
            own, other = cache.positions_per_chunk, before.positions_per_chunk
            cache.share(before.chunks, other, kept)
            shared = [one is two for one, two in zip(cache.chunks, before.chunks, strict=False)]
            assert sum(shared) == (kept // own if own == other else 0)
            assert cache.length == kept and len(cache.chunks) == -(-kept // own)
            kv, dirty = [x[:kept] for x in kv], False
        if kind != "share":
            written = random_kv(count * block, seed=seed)
            write(cache, 0, *written)
            if kind == "write":
                cache.advance(count * block)
                kv = [np.concatenate(both) for both in zip(kv, written, strict=True)]
            dirty = kind == "lost"
    if not len(kv[0]):
        return
    np.testing.assert_array_equal(
        read_back(cache.chunks, 0, cache.length, dtype), [held(x, dtype) for x in kv]
    )
    smallest, largest = held_page_bounds(kv[0], page_size, dtype, operands)
    # Pages that hold more than the prefix are those past its end.
    found = bounds(cache.chunks, 0)
    np.testing.assert_array_equal(found[0][: cache.pages], largest)
    np.testing.assert_array_equal(found[1][: cache.pages], smallest)
    full = cache.length // (16 * page_size) * 16
    coded = [x[:full] for x in coded_bounds(cache.chunks, 0, dtype, operands)]
    expected = [x[:full] for x in coded_page_bounds(kv[0], page_size, dtype, operands)]
    np.testing.assert_array_equal(coded, expected)


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("dtype", HELD_AS)
@pytest.mark.parametrize("positions", [1, 1000, 1024, 1025, 5000])
def test_memory_of_positions_is_that_of_their_chunks(page_size, dtype, positions):
    table = CpuBackend(model_config(2, 1, 16, layers=3), precision_of(dtype)).new_cache(page_size).table
    arrays = []

    def allocate(shape, format):
        arrays.append(np.zeros(shape, format.array))
        return arrays[-1]

    cache = PagedKVCache(table, allocate)
    cache.reserve(positions)
    assert cache.bytes_for(positions) == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("dtype", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_chunks_of_8_bits_take_little_more_than_half_of_bfloat16(dtype, head_dim):
    config = model_config(2, 1, head_dim, layers=3)
    sizes = []
    for kv in (dtype, "auto"):
        cache = CpuBackend(config, Precision.of("bfloat16", kv)).new_cache(16)
        cache.reserve(1)
        sizes.append(cache.chunks[0][0].nbytes)
        assert cache.chunk_bytes == cache.nbytes == sizes[-1] + cache.chunks[0][1].nbytes
    assert sizes[0] * 2 * head_dim == sizes[1] * (head_dim + 4)


@at_most(50)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 70),
    st.booleans(),
    st.integers(0, 99),
)
def test_marks_are_of_what_rows_have_selected(heads, tokens, group, pages, every, seed):
    rng = np.random.default_rng(seed)
    words = 3
    selected = rng.integers(-1, max(pages, 1), (heads, tokens * group, 4)).astype(np.int32)
    chosen = None if every else np.flatnonzero(rng.random(tokens) < 0.5).astype(np.int32)
    marks = mark_pages(selected, chosen, group, words)
    bits = np.unpackbits(marks.view(np.uint8), axis=1, bitorder="little")
    by_token = selected.reshape(heads, tokens, group * 4)
    for head in range(heads):
        rows = by_token[head] if every else by_token[head, chosen]
        assert np.flatnonzero(bits[head]).tolist() == sorted(set(rows[rows >= 0].tolist()))
