"""How repetitive texts are: figures that need no second model."""

from __future__ import annotations

from collections.abc import Sequence


def grams(ids: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """All n-grams of a text, as often as they occur."""
    return list(zip(*(ids[i:] for i in range(count)), strict=False))


def repeated(ids: Sequence[int], count: int = 4) -> float:
    """Share of n-grams of a text that occurred in it before."""
    found = grams(ids, count)
    return 1 - len(set(found)) / len(found) if found else 0.0


def repeated_within(texts: Sequence[Sequence[int]], count: int = 4) -> float:
    """The same of several texts, each by itself; weighted by how many n-grams they have."""
    total = sum(len(grams(ids, count)) for ids in texts)
    return sum(repeated(ids, count) * len(grams(ids, count)) for ids in texts) / max(total, 1)


def distinct(texts: Sequence[Sequence[int]], count: int = 2) -> float:
    """Share of different ones among the n-grams of all texts (distinct-n, arXiv 1510.03055)."""
    found = [gram for ids in texts for gram in grams(ids, count)]
    return len(set(found)) / max(len(found), 1)
