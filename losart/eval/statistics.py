"""What a share of right answers says."""

from __future__ import annotations

import math


def wilson_interval(right: int, samples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (J. Am. Stat. Assoc. 22, 1927); 95% by default.

    Returns
    -------
    low, high : float
        Between 0 and 1.
    """
    share, square = right / samples, z * z / samples
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt((share * (1 - share) + square / 4) / samples)
    return max(0.0, middle - half), min(1.0, middle + half)
