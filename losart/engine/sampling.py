"""From rows of logits to proposed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losart.errors import NumericalError, OptionError

LEFT_OPEN = -1  # of `Proposals.decided`
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
    finite : bool [rows], optional
        Whether the logits were; without it all were.
    logits : float32 [rows of the sequences that keep them, vocab], optional
        Before the temperature, one sequence after the other; the mask token's are -inf. None where none
        keeps them.
    decided : int8 [rows], optional
        1 where a proposal is fixed whatever remasking says, 0 where it is not, LEFT_OPEN elsewhere.
    """

    tokens: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    finite: np.ndarray | None = None
    logits: np.ndarray | None = None
    decided: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[Proposals]) -> Proposals:
        """The rows of several, one after the other."""
        finite = [np.ones(len(one.tokens), bool) if one.finite is None else one.finite for one in parts]
        tokens, confidence, entropy = (
            np.concatenate([getattr(one, name) for one in parts])
            for name in ("tokens", "confidence", "entropy")
        )
        logits = [one.logits for one in parts if one.logits is not None]
        kept = np.concatenate(logits) if logits else None
        return cls(tokens, confidence, entropy, np.concatenate(finite), kept)

    @classmethod
    def not_finite(cls, rows: int) -> Proposals:
        """In place of proposals for so many rows whose logits were not finite."""
        nothing = np.zeros(rows, np.float32)
        return cls(np.zeros(rows, np.int64), nothing, nothing, np.zeros(rows, bool))


def propose(
    logits: np.ndarray,
    uniforms: np.ndarray | None,
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
    uniforms : float64 [rows], optional
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
    weights = np.exp(logits, out=None if with_entropy else logits)
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
    assert uniforms is not None
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


# Remasking (remasking.pyx)

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """How many tokens each of `steps` passes fixes at least, so that all fix a block."""
    base, remainder = divmod(block_length, steps)
    return [base + (step < remainder) for step in range(steps)]


def check_remasking(name: str) -> None:
    """Raise OptionError where there is no remasking strategy of this name."""
    if not isinstance(name, str) or name not in STRATEGIES:
        raise OptionError(f"remasking must be one of {', '.join(STRATEGIES)}, not {name!r}")
