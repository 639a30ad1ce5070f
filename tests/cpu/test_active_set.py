"""LoSA's active set: how much each token's query changed, and the tokens of largest change."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kv import at_most, model_config
from passes import block_batch

from losart.backends.base import ActiveRule, StoredResults
from losart.backends.cpu.active_set import query_change, select_active
from losart.backends.cpu.backend import CpuBackend
from losart.config.options import AttentionConfig
from losart.config.precision import Precision

changes = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, float("inf")]))


@at_most(60)
@given(
    st.integers(0, 64), st.integers(1, 9), st.sampled_from([16, 48, 128]), st.sampled_from([0.0, 1e-4, 1.0])
)
def test_change_is_the_mean_square_of_the_difference(tokens, heads, width, size):
    rng = np.random.default_rng(tokens)
    q = 10 * rng.standard_normal((tokens, heads, width), np.float32)
    previous = q + np.float32(size) * rng.standard_normal(q.shape, np.float32)
    change = query_change(q, previous)
    assert change.shape == (tokens,) and change.dtype == np.float32
    np.testing.assert_allclose(change, ref.query_change(q, previous), rtol=1e-6)


def test_change_of_one_token_is_that_tokens():
    q = np.random.default_rng(0).standard_normal((5, 3, 16), np.float32)
    moved = q.copy()
    moved[3, 1, 7] += 2.0
    np.testing.assert_allclose(query_change(q, moved), [0, 0, 0, 4.0 / 48, 0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 2, 16), (5, 3, 16), (5, 2, 32)])
def test_queries_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="same shape"):
        query_change(np.zeros((5, 2, 16), np.float32), np.zeros(shape, np.float32))


@at_most(200)
@given(st.integers(0, 20).flatmap(lambda n: arrays(np.float32, n, elements=changes)), st.data())
def test_the_largest_changes_are_active_and_of_equal_ones_the_earlier(change, data):
    count = data.draw(st.integers(0, len(change)))
    active = select_active(change, count)
    assert active.dtype == np.int32
    np.testing.assert_array_equal(active, ref.select_active(change, count))


@at_most(100)
@given(arrays(np.float32, 6, elements=st.sampled_from([0.0, 1.0, 2.0, float("nan")])), st.integers(0, 6))
def test_nan_leaves_a_set_of_the_right_size(change, count):
    active = select_active(change, count)
    assert len(active) == count
    assert (np.diff(active) > 0).all() and np.isin(active, range(6)).all()


@at_most(200)
@given(st.integers(0, 20).flatmap(lambda n: arrays(np.float32, n, elements=changes)), st.data())
def test_of_candidates_the_largest_changes_are_active_and_of_few_all(change, data):
    masked = data.draw(arrays(bool, len(change)))
    count = data.draw(st.integers(0, len(change)))
    # One channel of one head, whose square is the change.
    q = np.zeros((len(change), 1, 16), np.float32)
    q[:, 0, 0] = 4 * np.sqrt(np.minimum(change, 1))
    backend = CpuBackend(model_config(1, 1, 16), Precision.of("float32"))
    slot = backend.new_slot(StoredResults(len(change), attention=True))
    slot.queries[0] = 0
    batch = block_batch(backend.new_cache(16), len(change), slot=slot, masked=np.flatnonzero(masked))
    selector = backend.selectors["auto"]
    rule = ActiveRule(count, masked_only=True, follow=False)
    (active,) = selector.select_active(0, q, batch, rule).tokens
    assert active.dtype == np.int32 and len(active) == min(count, masked.sum())
    np.testing.assert_array_equal(active, ref.select_active(query_change(q, np.zeros_like(q)), count, masked))


@at_most(60)
@given(st.integers(1, 64), st.integers(1, 9), st.sampled_from([1e-3, 0.3, 10.0]))
def test_relative_change_is_over_the_previous_querys_square(tokens, heads, size):
    rng = np.random.default_rng(tokens)
    previous = (10 ** rng.uniform(-3, 3, (tokens, 1, 1)) * rng.standard_normal((tokens, heads, 16))).astype(
        "f4"
    )
    q = (previous * (1 + size * rng.standard_normal((tokens, 1, 1)))).astype("f4")
    change = query_change(q, previous, relative=True)
    np.testing.assert_allclose(change, ref.query_change(q, previous, relative=True), rtol=1e-5)
    # It does not depend on the queries' size.
    np.testing.assert_allclose(change, query_change(8 * q, 8 * previous, relative=True), rtol=1e-6)


def test_a_stored_query_of_zeros_makes_a_token_active():
    q, previous = np.zeros((3, 2, 16), np.float32), np.zeros((3, 2, 16), np.float32)
    q[1], previous[2] = 1, 1
    change = query_change(q, previous, relative=True)
    assert np.isnan(change[0]) and change[1] == np.inf and change[2] == 1
    assert select_active(change, 3, 100.0).tolist() == [0, 1]


@at_most(200)
@given(st.integers(0, 20).flatmap(lambda n: arrays(np.float32, n, elements=changes)), st.data())
def test_only_changes_above_the_threshold_are_active(change, data):
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.5, 2.0]))
    count = data.draw(st.integers(0, len(change)))
    active = select_active(change, count, threshold)
    assert active.dtype == np.int32
    np.testing.assert_array_equal(active, ref.select_active(change, count, threshold=threshold))
    everything = select_active(change, len(change), threshold)
    np.testing.assert_array_equal(everything, np.flatnonzero(change > threshold))


@pytest.mark.parametrize("count", [-1, 5])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match="count must be 0 to 4"):
        select_active(np.zeros(4, np.float32), count)


@at_most(200)
@given(st.one_of(st.integers(0, 100), st.integers(0, 1000).map(lambda n: n / 1000)), st.integers(1, 64))
def test_the_active_count_is_the_references(active, block_length):
    assert AttentionConfig(active=active).active_count(block_length) == ref.active_count(active, block_length)


@pytest.mark.parametrize(
    ("active", "block_length", "count"),
    [
        (0.3, 10, 3),
        (0.1, 4, 1),
        (0.5, 5, 3),
        (0.5, 4, 2),
        (1.0, 7, 7),
        (0.0, 7, 0),
        (1, 7, 1),
        (9, 7, 7),
        (0, 7, 0),
    ],
)
def test_a_fraction_of_the_block_is_rounded_up(active, block_length, count):
    assert AttentionConfig(active=active).active_count(block_length) == count
