"""GPTQ (arXiv 2210.17323): codes whose errors columns that come later make up for."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from losart.config.precision import Format
from losart.errors import NumericalError
from losart.quantization.rounding import WeightFormat, decoded, nearest_codes, outermost_scales

BLOCK = 128  # columns, of one group, after which the rest of the matrix is corrected
DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
DAMPINGS = 6  # tried, each ten times the one before


def gptq(
    weights: np.ndarray, hessian: np.ndarray, format: WeightFormat, scales_format: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of a matrix, column by column, each error spread over the columns to come.

    Parameters
    ----------
    weights : float32 [out, in]
    hessian : float64 [in, in]
        Sum of x x^T over inputs x.
    format : WeightFormat
    scales_format : Format
        In which scales are held.

    Returns
    -------
    codes : int8 or uint8 [out, in]
    scales : float32 [out, groups]
        As of a `RoundedTensor`.

    Raises
    ------
    NumericalError
        The inputs were not finite, or their Hessian has no inverse.
    """
    columns = weights.shape[1]
    group = format.group or columns
    left, factor = weights.copy(), _inverse_factor(hessian)
    unused = np.diag(hessian) == 0
    left[:, unused] = 0  # nothing comes through them
    codes = np.empty(weights.shape, np.uint8 if format.name == "fp8" else np.int8)
    scales = np.empty((len(weights), columns // group), np.float32)
    if group == columns:
        scales[:, 0] = outermost_scales(left[:, None], format.name, scales_format)[:, 0]
    blocks = (
        (start, min(start + BLOCK, first + group))
        for first in range(0, columns, group)
        for start in range(first, first + group, BLOCK)
    )
    for start, stop in blocks:
        if group < columns and start % group == 0:
            of_group = left[:, None, start : start + group]
            scales[:, start // group] = outermost_scales(of_group, format.name, scales_format)[:, 0]
        scale = scales[:, start // group]
        errors = np.empty((len(weights), stop - start), np.float32)
        for column in range(start, stop):
            with np.errstate(over="ignore"):
                codes[:, column] = nearest_codes(left[:, column] / scale, format.name)
            error = left[:, column] - decoded(codes[:, column], format.name) * scale
            error /= factor[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : stop] -= np.outer(error, factor[column, column + 1 : stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, scales


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """The upper triangular U for which U^T U is the inverse of the damped Hessian, float32."""
    if not np.isfinite(hessian).all():
        raise NumericalError("the inputs are not finite")
    damped, diagonal = hessian.copy(), np.diag(hessian)
    size, mean = np.arange(len(hessian)), float(diagonal.mean()) or 1.0
    for power in range(DAMPINGS):
        damped[size, size] = diagonal + DAMPING * 10**power * mean
        with suppress(np.linalg.LinAlgError):
            inverse = np.linalg.inv(damped)
            inverse += inverse.T.copy()  # symmetric to the last bit
            inverse /= 2
            return np.linalg.cholesky(inverse).T.astype(np.float32)
    raise NumericalError("the inputs' Hessian has no inverse")
