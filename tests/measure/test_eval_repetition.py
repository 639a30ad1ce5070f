"""How repetitive texts are."""

from __future__ import annotations

import pytest

from losart.eval.repetition import distinct, repeated, repeated_within


def test_repeated_counts_what_occurred_before():
    assert repeated([1, 2, 3]) == 0
    assert repeated([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert repeated([1, 2, 1, 2, 3], count=2) == pytest.approx(1 / 4)


def test_texts_count_by_their_n_grams():
    texts = [[1, 1, 1, 1, 1, 1], [1, 2, 3, 4], [5]]
    assert repeated_within(texts) == pytest.approx(2 / 4)
    assert repeated_within([]) == repeated_within([[1]]) == 0


def test_distinct_is_over_all_texts():
    assert distinct([[1, 2, 3], [1, 2]]) == pytest.approx(2 / 3)
    assert distinct([]) == 0
