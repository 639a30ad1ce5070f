"""Which proposals a denoising pass fixes (SDAR, arXiv 2510.06303, and its published script)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from losart.config.options import GenerationConfig
from losart.engine.sampling import Proposals
from losart.errors import OptionError

Strategy = Callable[[Proposals, int, GenerationConfig], np.ndarray]


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """How many tokens each of `steps` passes fixes at least, so that all fix a block."""
    base, remainder = divmod(block_length, steps)
    return [base + (step < remainder) for step in range(steps)]


def sequential(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """The leftmost masked positions."""
    return np.arange(min(count, len(proposals.tokens)))


def low_confidence_static(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """The most confident proposals."""
    return np.argsort(-proposals.confidence, kind="stable")[:count]


def low_confidence_dynamic(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """All proposals above the confidence threshold, but at least the `count` most confident."""
    above = np.flatnonzero(proposals.confidence > config.confidence_threshold)
    return above if len(above) >= count else low_confidence_static(proposals, count, config)


def entropy_bounded(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """Proposals by rising entropy while its running sum stays within the bound, at least one.

    `count` does not matter. The published script takes the entropy from the chosen token's
    probability alone; this is the entropy of the whole distribution.
    """
    order = np.argsort(proposals.entropy, kind="stable")
    within = np.cumsum(proposals.entropy[order]) <= config.eb_threshold
    return order[: max(1, int(within.sum()))]


STRATEGIES: dict[str, Strategy] = {
    strategy.__name__: strategy
    for strategy in (sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded)
}


def strategy(name: str) -> Strategy:
    """The remasking strategy of this name.

    Raises
    ------
    OptionError
        When there is none.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        raise OptionError(f"remasking must be one of {', '.join(STRATEGIES)}, not {name!r}")
    return STRATEGIES[name]
