"""How a pass over several sequences is divided: its groups' shapes, and parts of dense prefix attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losart.backends.cuda.pass_inputs import divide_prefixes
from losart.backends.cuda.plans import prefix_plan
from losart.backends.cuda.variants import CARDS

cards = st.sampled_from(list(CARDS.values()))
lengths = st.lists(
    st.one_of(st.just(0), st.integers(0, 3000), st.integers(0, 300_000)), min_size=2, max_size=140
)


def divided(lengths, plan, riding=0):
    starts = np.full(len(lengths) - riding + 1, -7, np.int32)
    owners = np.full(plan.parts, -7, np.int32)
    divide_prefixes(np.array(lengths, np.int32), riding, plan, starts, owners)
    return starts, owners


@given(
    cards,
    lengths,
    st.sampled_from([8, 16, 32]),
    st.booleans(),
    st.sampled_from([1, 4, 16, 32]),
    st.sampled_from([64, 80, 128]),
)
def test_every_cache_has_parts_and_no_part_is_without_one(
    card, lengths, kv_bits, same_sums, tokens, head_dim
):
    plan = prefix_plan(card, kv_bits, tokens, 32, 8, head_dim, len(lengths), same_sums)
    starts, owners = divided(lengths, plan)
    counts = np.diff(starts)
    assert starts[0] == 0 and (counts >= 1).all() and plan.grid[1] == plan.parts == len(owners)
    used = owners[: starts[-1]]
    np.testing.assert_array_equal(used, np.repeat(np.arange(len(lengths)), counts))
    assert (owners[starts[-1] :] == -1).all()
    alone = prefix_plan(card, kv_bits, tokens, 32, 8, head_dim)
    assert alone.share == alone.parts == plan.share and alone.defines == plan.defines
    if same_sums:
        assert (counts == alone.parts).all()


@given(cards, lengths, st.sampled_from([4, 16]))
def test_parts_are_of_about_the_same_size(card, lengths, tokens):
    plan = prefix_plan(card, 16, tokens, 32, 8, 128, len(lengths))
    starts, _ = divided(lengths, plan)
    tiles = -(-np.array(lengths) // 64)
    largest = np.max(-(-tiles // np.diff(starts)))
    # No part has more than one of a lone cache's, which has all SMs at work, would have of all.
    assert largest <= max(8, -(-tiles.sum() // plan.share))


@given(cards, lengths, st.data())
def test_of_two_sequences_of_a_cache_the_second_counts(card, lengths, data):
    riding = data.draw(st.integers(0, len(lengths)))
    plan = prefix_plan(card, 16, 4, 32, 8, 128, len(lengths))
    both = [each for length in lengths[:riding] for each in (0, length)] + lengths[riding:]
    for found, expected in zip(divided(both, plan, riding), divided(lengths, plan), strict=True):
        np.testing.assert_array_equal(found, expected)


@given(lengths, st.integers(1, 64))
def test_parts_are_in_proportion_to_tiles(lengths, tile):
    plan = replace(prefix_plan(CARDS["sm_90a"], 16, 4, 32, 8, 128, len(lengths)), tile=tile)
    tiles = [-(-length // tile) for length in lengths]
    wanted = [-(-one * (plan.parts - len(lengths)) // max(1, sum(tiles))) for one in tiles]
    least = [max(1, min(count, max(1, one // 4))) for count, one in zip(wanted, tiles, strict=True)]
    np.testing.assert_array_equal(np.diff(divided(lengths, plan)[0]), least)


def test_arrays_that_are_too_short_are_refused():
    plan = prefix_plan(CARDS["sm_90a"], 16, 4, 32, 8, 128, 3)
    starts, owners = np.zeros(4, np.int32), np.zeros(plan.parts, np.int32)
    for riding, *arrays in ((0, starts[:3], owners), (0, starts, owners[:-1]), (2, starts, owners)):
        with pytest.raises(ValueError, match="no room for"):
            divide_prefixes(np.zeros(3, np.int32), riding, plan, *arrays)


@pytest.mark.parametrize("name", CARDS)
def test_one_cache_is_divided_as_ever(name):
    card = CARDS[name]
    plan = prefix_plan(card, 16, 16, 32, 8, 128)
    assert plan.parts == plan.grid[1] == card.sms // 8
    assert prefix_plan(replace(card, sms=1), 16, 16, 32, 8, 128).parts == 1


def test_numbers_of_sequences_are_padded_by_an_eighth_at_most():
    padded = pytest.importorskip("losart.backends.cuda.batch").padded
    found = [padded(count) for count in range(1, 1025)]
    assert found[:16] == list(range(1, 17))
    assert all(count <= one <= count * 9 / 8 for count, one in enumerate(found, 1))
    assert len(set(found)) < 70
