"""From rows of logits to proposed tokens, and to those that a pass fixes (remasking)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from losart.config.options import GenerationConfig
from losart.errors import NumericalError, OptionError

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # below it float32 may hold zero
LARGEST_TEMPERATURE = float(np.finfo(np.float32).max)  # above it float32 holds infinity

NOT_FINITE = (
    "the logits are not finite: the checkpoint holds NaN or infinite weights, "
    "or its values overflow in this dtype"
)


def float32_temperature(temperature: float) -> float:
    """A temperature above 0 as float32 can hold it; 0, which is greedy, as it is."""
    return min(max(temperature, SMALLEST_TEMPERATURE), LARGEST_TEMPERATURE) if temperature > 0 else 0.0


@dataclass(frozen=True)
class Proposals:
    """What a pass proposes for the masked positions.

    Attributes
    ----------
    tokens : int64 [rows]
    confidence : float32 [rows]
        Probability of the token under the distribution it was taken from.
    entropy : float32 [rows]
        Of the model's whole distribution at the temperature, in nats.
    """

    tokens: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray


def propose(
    logits: np.ndarray,
    uniforms: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    with_entropy: bool,
) -> Proposals:
    """Take one token from each row of logits.

    Parameters
    ----------
    logits : float32 [rows, vocab]
        The mask token's column is -inf already. Overwritten.
    uniforms : float64 [rows]
        Random numbers in [0, 1), one per row; not used when greedy.
    temperature : float
        0 takes the most probable token; `top_k` and `top_p` do not matter then.
    top_k : int
        Keep this many highest logits, and what ties with the last; 0 keeps all.
    top_p : float
        Keep the most probable tokens up to and including the one that takes their sum above this.
    with_entropy : bool
        Otherwise entropy is zero, and not computed.

    Raises
    ------
    NumericalError
        When a row has a NaN or an infinite maximum.
    """
    top = logits.max(axis=1, keepdims=True)
    if not np.isfinite(top).all():
        raise NumericalError(NOT_FINITE)
    tokens = logits.argmax(axis=1)
    # Different logits may have the same weight in float32: tokens are ranked by logits.
    restricted = temperature > 0 and (0 < top_k < logits.shape[1] or top_p < 1.0)
    ranks = logits.copy() if restricted else logits
    logits -= top
    if temperature > 0:
        with np.errstate(over="ignore"):  # -inf is right for what overflows
            logits /= float32_temperature(temperature)
    weights = np.exp(logits)
    total = weights.sum(axis=1)
    entropy = np.zeros(len(logits), np.float32)
    if with_entropy:
        # -sum p log p = log Z - sum p x; a token of probability zero may have x = -inf.
        np.maximum(logits, np.finfo(np.float32).min, out=logits)
        entropy = np.log(total) - np.einsum("rv,rv->r", weights, logits) / total
    if temperature == 0:
        return Proposals(tokens, 1.0 / total, entropy)

    if 0 < top_k < logits.shape[1]:
        lowest = np.partition(ranks, -top_k, axis=1)[:, -top_k, None]
        weights[ranks < lowest] = 0.0
    if top_p < 1.0:
        _keep_top_p(weights, ranks, top_p)
    cumulative = np.cumsum(weights, axis=1, dtype=np.float64)
    drawn = uniforms[:, None] * cumulative[:, -1:]
    # The first token whose cumulative weight is above the draw: one of weight zero is never it.
    tokens = (cumulative > drawn).argmax(axis=1)
    chosen = np.take_along_axis(weights, tokens[:, None], axis=1)[:, 0]
    return Proposals(tokens, (chosen / cumulative[:, -1]).astype(np.float32), entropy)


def _keep_top_p(weights: np.ndarray, ranks: np.ndarray, top_p: float) -> None:
    order = np.argsort(-ranks, axis=1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=1).astype(np.float64)
    before = np.cumsum(ranked, axis=1) - ranked
    ranked[before > top_p * ranked.sum(axis=1, keepdims=True)] = 0.0
    np.put_along_axis(weights, order, ranked.astype(np.float32), axis=1)


# Remasking (SDAR, arXiv 2510.06303, and its published script)

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
    return (-proposals.confidence).argsort(kind="stable")[:count]


def low_confidence_dynamic(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """All proposals above the confidence threshold, but at least the `count` most confident."""
    above = np.flatnonzero(proposals.confidence > config.confidence_threshold)
    return above if len(above) >= count else low_confidence_static(proposals, count, config)


def entropy_bounded(proposals: Proposals, count: int, config: GenerationConfig) -> np.ndarray:
    """Proposals by ascending entropy while its running sum stays within the bound, at least one.

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
