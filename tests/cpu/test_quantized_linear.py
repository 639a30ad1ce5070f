"""Products with quantized matrices against float64; a token's sums depend on no other token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kv import at_most

from losart.backends.cpu.quantized_linear import (
    TOKENS,
    QuantizedMatrix,
    block_of,
    multiply,
    multiply_all,
    nbytes_of,
    rounded,
)


def packed(rng: Any, rows: int, columns: int, bits: int, group: int, zeros: bool) -> tuple[Any, np.ndarray]:
    """A packed matrix of random codes, and its entries in float64."""
    half, groups = 1 << (bits - 1), -(-columns // group)
    codes = rng.integers(-half, half, (rows, columns))
    scales = (rng.choice([-1, 1], (rows, groups)) * rng.uniform(0.001, 0.02, (rows, groups))).astype(
        np.float32
    )
    of_groups = rng.integers(-half, half + 1, (rows, groups)) if zeros else None
    matrix = QuantizedMatrix(rows, columns, bits, group, zeros)
    cut = rows // 2 // 16 * 16
    for part in (slice(0, cut), slice(cut, rows)):
        if part.start < part.stop:
            matrix.fill(part.start, codes[part], scales[part], None if of_groups is None else of_groups[part])
    index = np.arange(columns) // group
    values = codes - (of_groups[:, index] if of_groups is not None else 0)
    assert matrix.nbytes == nbytes_of(rows, columns, bits, group, zeros)
    return matrix, values * scales[:, index].astype(np.float64)


def product(x: np.ndarray, matrix: Any) -> np.ndarray:
    out = np.full((len(x), len(matrix) + 3), 7, np.float32)
    multiply_all([(x, matrix, out, 2)])
    assert (out[:, :2] == 7).all() and (out[:, -1] == 7).all()
    return out[:, 2:-1]


def as_rounded(x: np.ndarray, matrix: Any) -> np.ndarray:
    """Activations as the product sees them, float64."""
    values, scales, sums = rounded(x, matrix.block, matrix.activations)
    seen = values * scales[:, :, None].astype(np.float64)
    np.testing.assert_allclose(sums, seen.sum(axis=2), rtol=1e-5, atol=1e-6 * np.abs(seen).max(initial=0))
    return seen.transpose(1, 0, 2).reshape(len(x), -1)[:, : x.shape[1]]


forms = st.tuples(st.sampled_from([4, 8]), st.sampled_from([8, 16, 24, 32, 64, 128, 1 << 20]), st.booleans())


@at_most(150)
@given(forms, st.integers(1, 70), st.integers(1, 300), st.integers(1, 2 * TOKENS + 3), st.integers(0, 2**32))
@example((8, 1 << 20, False), 33, 4096, 17, 0)
@example((4, 64, True), 16, 3072, 64, 1)
def test_a_product_is_that_of_the_rounded_activations(form, rows, columns, tokens, seed):
    bits, group, zeros = form
    if group < columns:
        columns = max(group, columns // group * group)
    rng = np.random.default_rng(seed)
    matrix, weights = packed(rng, rows, columns, bits, min(group, columns), zeros)
    x = (rng.standard_normal((tokens, columns)) * rng.uniform(0.01, 30, (1, columns))).astype(np.float32)
    seen = as_rounded(x, matrix)
    largest = np.abs(x).max(axis=1, keepdims=True)
    assert (np.abs(seen - x) <= largest * (0.51 / np.iinfo(matrix.activations).max)).all()
    expected = seen @ weights.T
    # Codes and zeros are summed apart, so that rounding is of the size that they may have.
    largest_code = np.abs(matrix.scales).max() * (2 << bits)
    assert (
        np.abs(product(x, matrix) - expected) <= 1e-6 * largest_code * np.abs(seen).sum(axis=1)[:, None]
    ).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_alone_has_the_same_bits(bits):
    rng = np.random.default_rng(0)
    matrix, _ = packed(rng, 50, 256, bits, 64, True)
    x = rng.standard_normal((TOKENS + 9, 256), np.float32)
    together = product(x, matrix)
    for count in (1, 2, 3, 5, 7, 8, 16):
        for first in range(0, len(x) - count, 11):
            alone = product(x[first : first + count], matrix)
            np.testing.assert_array_equal(alone, together[first : first + count])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_its_token_alone(value):
    rng = np.random.default_rng(0)
    matrix, _ = packed(rng, 20, 128, 4, 32, False)
    x = rng.standard_normal((5, 128), np.float32)
    expected = product(x, matrix)
    x[3, 70] = value
    found = product(x, matrix)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(expected, 3, 0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0, 1e-45, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(size, bits):
    rng = np.random.default_rng(0)
    matrix, weights = packed(rng, 20, 64, bits, 64, False)
    x = np.float32(size) * rng.choice(np.float32([-1, 1]), (2, 64))
    with np.errstate(over="ignore"):
        expected = (x.astype(np.float64) @ weights.T).astype(np.float32)
    np.testing.assert_allclose(product(x, matrix), expected, rtol=1e-4, atol=1e-33 + 1e-5 * size)


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [(64, 64, 64), (63, 63, 64), (256, 128, 64), (96, 96, 64), (96, 32, 32), (96, 48, 16)],
)
def test_blocks(columns, group, block):
    assert block_of(columns, group, 8) == block
    assert block_of(columns, group, 4) == min(block, 32)


def test_what_does_not_fit_is_refused():
    matrix = QuantizedMatrix(40, 64, 4, 32, False)
    codes, scales = np.zeros((16, 64), np.int8), np.ones((16, 2), np.float32)
    for start, of in (
        (8, codes),
        (32, codes),
        (0, codes[:5]),
        (0, codes[:, :32]),
        (0, codes + 8),
        (0, codes - 9),
    ):
        with pytest.raises(ValueError, match=r"fit|whole"):
            matrix.fill(start, of, scales[: len(of)])
    with pytest.raises(ValueError, match="cannot be packed"):
        QuantizedMatrix(16, 60, 4, 12, False)
    x = rounded(np.zeros((3, 64), np.float32), 32, np.int8)
    for out, column in ((np.zeros((3, 39), np.float32), 0), (np.zeros((3, 40), np.float32), 1)):
        with pytest.raises(ValueError, match="do not fit into out"):
            multiply([(x, matrix, out, column)])
    with pytest.raises(ValueError, match="were expected"):
        multiply([(x, matrix, np.zeros((2, 40), np.float32), 0)])
    with pytest.raises(ValueError, match="of int8 were expected"):
        x = rounded(np.zeros((3, 64), np.float32), 32, np.int16)
        multiply([(x, matrix, np.zeros((3, 40), np.float32), 0)])
