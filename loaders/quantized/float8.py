"""The 8-bit floating-point format E4M3 without infinities (arXiv 2209.05433)."""

from __future__ import annotations

import numpy as np


def _values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(np.maximum(exponent, 1) - 10.0)
    )
    magnitude[code & 127 == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


FLOAT8_VALUES = _values()  # by the code; codes 127 and 255 are NaN
