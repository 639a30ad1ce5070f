"""Tokens, confidence and entropy from logits, against float64 and by plain statistics."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losart.engine.sampling import Proposals, propose
from losart.errors import NumericalError

# The same examples each time: sums that all but reach a threshold may fall on either side of it.
quick = settings(max_examples=150, deadline=None, derandomize=True)


def run(logits: np.ndarray, uniforms: np.ndarray | None = None, **options: float) -> Proposals:
    rows = np.array(logits, np.float32)
    uniforms = np.zeros(len(rows)) if uniforms is None else uniforms
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "with_entropy": True}
    return propose(rows, uniforms, **defaults | options)


def softmax(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    row = np.asarray(row, np.float64)
    p = np.exp((row - row.max()) / temperature)
    return p / p.sum()


def kept(p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The distribution after top-k (with what ties with the last) and then top-p, in float64."""
    p = p.copy()
    if 0 < top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0
    if top_p < 1:
        total, reached = p.sum(), 0.0
        for token in np.argsort(-p, kind="stable"):
            above = reached > top_p * total
            reached += p[token]
            if above:
                p[token] = 0
    return p / p.sum()


def random_logits(rows: int, vocab: int, seed: int, masked: bool = True) -> np.ndarray:
    logits = 3 * np.random.default_rng(seed).standard_normal((rows, vocab), np.float32)
    if masked:
        logits[:, seed % vocab] = -np.inf  # the mask token's column
    return logits


@quick
@given(st.integers(1, 8), st.integers(2, 300), st.integers(0, 2**16))
def test_greedy_is_the_most_probable_token_its_probability_and_the_entropy(rows, vocab, seed):
    logits = random_logits(rows, vocab, seed)
    result = run(logits)
    for i, row in enumerate(logits):
        p = softmax(row)
        assert result.tokens[i] == p.argmax()
        assert result.confidence[i] == pytest.approx(p.max(), rel=1e-5)
        positive = p[p > 0]
        assert result.entropy[i] == pytest.approx(-(positive * np.log(positive)).sum(), rel=1e-4, abs=1e-5)


def test_of_equal_logits_greedy_takes_the_first():
    result = run([[0.0, 2.0, 2.0, -np.inf]])
    assert result.tokens == [1]
    assert result.confidence[0] == pytest.approx(1 / (2 + math.exp(-2)))


def test_entropy_of_a_sure_and_of_a_flat_row():
    result = run([[0.0, -np.inf, -np.inf, -np.inf], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(result.entropy, [0.0, math.log(4)], atol=1e-6)


def test_entropy_is_only_computed_on_demand():
    assert not run(random_logits(3, 50, 1), with_entropy=False).entropy.any()


@quick
@given(
    st.integers(2, 120),
    st.integers(0, 2**16),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 2, 7, 500]),
    st.sampled_from([1.0, 0.9, 0.4, 1e-9]),
)
def test_a_draw_is_that_of_the_inverse_distribution(vocab, seed, temperature, top_k, top_p):
    logits = random_logits(6, vocab, seed)
    uniforms = np.random.default_rng(seed).random(6)
    uniforms[:2] = [0.0, 1 - 2**-53]
    result = run(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, uniform, token, confidence, entropy in zip(
        logits, uniforms, result.tokens, result.confidence, result.entropy, strict=True
    ):
        whole = softmax(row, temperature)
        p = kept(whole, top_k, top_p)
        cumulative = np.cumsum(p)
        assert p[token] > 0 and token != seed % vocab
        assert cumulative[token] - p[token] - 1e-5 <= uniform <= cumulative[token] + 1e-5
        assert confidence == pytest.approx(p[token], rel=1e-4)
        positive = whole[whole > 0]
        assert entropy == pytest.approx(-(positive * np.log(positive)).sum(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}]
)
def test_frequencies_are_the_probabilities(options):
    draws = 40_000
    row = random_logits(1, 12, 5)[0]
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    uniforms = np.random.default_rng(0).random(draws)
    tokens = run(np.repeat(row[None], draws, axis=0), uniforms, **options).tokens
    p = kept(softmax(row, options["temperature"]), options["top_k"], options["top_p"])
    counts = np.bincount(tokens, minlength=12)
    assert not counts[p == 0].any()
    expected = draws * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 99.9% quantile of 11 degrees of freedom


def test_top_k_keeps_what_ties_with_the_last():
    uniforms = np.linspace(0, 0.999, 500)
    tokens = run(np.tile([3.0, 1.0, 2.0, 2.0, 0.0], (500, 1)), uniforms, temperature=1.0, top_k=2).tokens
    assert set(tokens) == {0, 2, 3}


def test_top_p_keeps_the_token_that_takes_the_sum_above_it():
    uniforms = np.linspace(0, 0.999, 500)
    tokens = run(np.zeros((500, 4)), uniforms, temperature=1.0, top_p=0.5).tokens
    assert set(tokens) == {0, 1, 2}  # two of them reach 0.5 and no more


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 1e-50, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = random_logits(5, 40, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(logits, np.full(5, 0.999), temperature=temperature)
    np.testing.assert_array_equal(result.tokens, logits.argmax(axis=1))
    np.testing.assert_allclose(result.confidence, 1.0)
    np.testing.assert_allclose(result.entropy, 0.0, atol=1e-6)


def test_a_huge_temperature_is_uniform_over_all_but_the_mask_token():
    for temperature in (1e30, 1e39, 1e308, 10**300):  # of these float32 holds the first
        draws = np.linspace(0, 0.999, 90)
        result = run(np.repeat(random_logits(1, 10, 4), 90, axis=0), draws, temperature=temperature)
        np.testing.assert_allclose(result.confidence, 1 / 9, rtol=1e-6)
        assert set(result.tokens) == set(range(10)) - {4}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad, temperature):
    logits = random_logits(3, 20, 2)
    logits[1, 7] = bad
    with pytest.raises(NumericalError, match="logits are not finite"):
        run(logits, temperature=temperature)
    with pytest.raises(NumericalError, match="logits are not finite"):
        run(np.full((1, 4), -np.inf), temperature=temperature)
