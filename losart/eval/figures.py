"""What answering some questions read, and how fast it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from losart.observe.step import Stats


@dataclass(frozen=True)
class Figures:
    """Figures of some questions with one attention setting.

    Attributes
    ----------
    attention : str
    budget : int or None
    active : "auto", int, float or None
    samples : int
        Questions.
    sparse_density, density, active_fraction : float or None
        Means over the questions of `losart.Stats`' figures.
    tokens_per_second : float
        New tokens over the seconds of decoding; those of prefill do not count.
    passes_per_question : float
        Denoising and commit passes.
    """

    attention: str
    budget: int | None
    active: int | float | str | None
    samples: int
    sparse_density: float | None
    density: float | None
    active_fraction: float | None
    tokens_per_second: float
    passes_per_question: float


def figures(setting: Mapping[str, Any], stats: Sequence[Stats]) -> dict[str, Any]:
    """The fields of `Figures` from the attention setting and the figures of each generation."""
    seconds = sum(one.decode_seconds for one in stats)
    return {
        "attention": setting["attention"],
        "budget": setting.get("budget"),
        "active": setting.get("active"),
        "samples": len(stats),
        "sparse_density": mean(one.sparse_density for one in stats),
        "density": mean(one.density for one in stats),
        "active_fraction": mean(one.active_fraction for one in stats),
        "tokens_per_second": sum(one.new_tokens for one in stats) / seconds if seconds else 0.0,
        "passes_per_question": sum(one.forward_passes for one in stats) / len(stats),
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
