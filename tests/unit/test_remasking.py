"""The remasking strategies against the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from losart.config.options import GenerationConfig
from losart.engine.sampling import STRATEGIES, Proposals, strategy, transfer_counts
from losart.errors import OptionError

# Sixteenths: exact in float32 and float64, with ties, and equal to a threshold now and then.
sixteenth = st.integers(0, 16).map(lambda n: n / 16)


@st.composite
def proposals(draw):
    """A block's masked positions, and confidence and entropy of the proposals for them."""
    masked = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=32).filter(any)))
    rows = int(masked.sum())
    confidence, entropy = (draw(st.lists(sixteenth, min_size=rows, max_size=rows)) for _ in range(2))
    return masked, np.float32(confidence), np.float32(entropy)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=150, deadline=None)
@given(proposals(), st.integers(0, 40), sixteenth, st.integers(0, 40).map(lambda n: n / 16))
def test_a_strategy_is_the_references(name, drawn, count, threshold, eb_threshold):
    masked, confidence, entropy = drawn
    config = GenerationConfig(len(masked), 0, 1, confidence_threshold=threshold, eb_threshold=eb_threshold)
    places = np.flatnonzero(masked)
    chosen = strategy(name)(Proposals(np.arange(len(places)), confidence, entropy), count, config)

    spread = np.full((2, len(masked)), 0.5)  # what stands at positions that are not masked is of no matter
    spread[:, places] = confidence, entropy
    expected = ref.remask(name, np.arange(len(masked)), *spread, masked, count, threshold, eb_threshold)
    np.testing.assert_array_equal(np.sort(places[chosen]), expected)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 80))
def test_the_counts_of_the_passes_are_the_references(block_length, steps):
    counts = transfer_counts(block_length, steps)
    assert counts == ref.transfer_counts(block_length, steps)
    assert sum(counts) == block_length and len(counts) == steps


@pytest.mark.parametrize("name", ["random", "", "Sequential", None, 3, ["sequential"]])
def test_an_unknown_strategy_is_refused(name):
    with pytest.raises(OptionError, match=r"remasking must be one of sequential, .*, not "):
        strategy(name)
