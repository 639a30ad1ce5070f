"""Attention settings to compare: the combinations of what is given in lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def attention_settings(
    methods: Sequence[str], budgets: Sequence[int], active: Sequence[int | float]
) -> list[dict[str, Any]]:
    """Options of `Model.generate`, one dict for each setting: dense has no budget, only losa `active`."""
    settings: list[dict[str, Any]] = []
    for method in methods:
        if method == "dense":
            settings.append({"attention": method})
        elif method == "losa":
            settings += [
                {"attention": method, "budget": budget, "active": count}
                for budget in budgets
                for count in active
            ]
        else:
            settings += [{"attention": method, "budget": budget} for budget in budgets]
    return settings
