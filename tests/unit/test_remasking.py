"""The remasking strategies against the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from kv import at_most

from losart.config.options import GenerationConfig
from losart.engine.batch import PassKind, SequencePass
from losart.engine.remasking import choose, remask
from losart.engine.sampling import STRATEGIES, Proposals, check_remasking, transfer_counts
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


counts = st.one_of(st.none(), st.integers(0, 40))
thresholds = st.integers(0, 40).map(lambda n: n / 16)


@at_most(600)
@given(
    st.lists(
        st.tuples(proposals(), st.sampled_from(list(STRATEGIES)), counts, sixteenth, thresholds),
        min_size=1,
        max_size=6,
    )
)
def test_each_sequence_has_what_the_reference_fixes(sequences):
    passes, expected = [], []
    for (masked, confidence, entropy), name, count, threshold, eb_threshold in sequences:
        places = np.flatnonzero(masked)
        config = GenerationConfig(
            *(len(masked), 0, 1),
            remasking=name,
            confidence_threshold=threshold,
            eb_threshold=eb_threshold,
        )
        ids = [0] * len(masked)
        passes.append(SequencePass(PassKind.LATER, ids, 0, config, None, masked=places.tolist(), count=count))
        spread = np.full((2, len(masked)), 0.5)  # what stands where nothing is masked is of no matter
        spread[:, places] = confidence, entropy
        fixed = places
        if count is not None:
            fixed = ref.remask(name, np.arange(len(masked)), *spread, masked, count, threshold, eb_threshold)
        expected.append(fixed.tolist())
    confidence, entropy = (np.concatenate([one[0][index] for one in sequences]) for index in (1, 2))
    proposed = Proposals(1 + np.arange(len(confidence)), confidence, entropy)
    chosen, tokens, blocks = choose(proposed, passes), proposed.tokens, remask(proposed, passes)
    for one, fixed, (block, left) in zip(passes, expected, blocks, strict=True):
        own, chosen = chosen[: len(one.masked)], chosen[len(one.masked) :]
        assert np.array(one.masked)[own].tolist() == fixed
        after = np.zeros(len(one.ids), int)
        after[fixed] = tokens[: len(own)][own]
        assert block == after.tolist() and left == sorted({*one.masked} - {*fixed})
        assert not any(one.ids)  # the pass keeps its own
        tokens = tokens[len(own) :]
    assert not len(chosen)


def one_pass(masked: list[int]) -> SequencePass:
    return SequencePass(PassKind.LATER, [0] * 4, 0, GenerationConfig(4, 0, 1), None, masked=masked, count=1)


@pytest.mark.parametrize("masked", [[4], [-1]])
def test_a_row_that_the_block_has_not_is_refused(masked):
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match=f"row {masked[0]} of 4 cannot be masked"):
        remask(Proposals(np.ones(1, int), one, one), [one_pass(masked)])


@pytest.mark.parametrize("rows", [1, 3])
def test_proposals_for_other_rows_are_refused(rows):
    some = np.ones(rows, np.float32)
    with pytest.raises(ValueError, match="a proposal for each row"):
        remask(Proposals(np.ones(rows, int), some, some), [one_pass([1, 2])])


@at_most(150)
@given(st.integers(1, 70), st.integers(1, 80))
def test_the_counts_of_the_passes_are_the_references(block_length, steps):
    counts = transfer_counts(block_length, steps)
    assert counts == ref.transfer_counts(block_length, steps)
    assert sum(counts) == block_length and len(counts) == steps


@pytest.mark.parametrize("name", ["random", "", "Sequential", None, 3, ["sequential"]])
def test_an_unknown_strategy_is_refused(name):
    with pytest.raises(OptionError, match=r"remasking must be one of sequential, .*, not "):
        check_remasking(name)
