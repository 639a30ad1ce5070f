"""Checks that configuration objects share."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and finite as a float."""
    if not isinstance(value, float) and not is_int(value):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
