"""From rows of logits to proposed tokens, and to those that a pass fixes (remasking)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

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
    finite : bool [rows], optional
        Whether the logits were; without it all were.
    """

    tokens: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    finite: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[Proposals]) -> Proposals:
        """The rows of several, one after the other."""
        finite = [np.ones(len(one.tokens), bool) if one.finite is None else one.finite for one in parts]
        tokens, confidence, entropy = (
            np.concatenate([getattr(one, name) for one in parts])
            for name in ("tokens", "confidence", "entropy")
        )
        return cls(tokens, confidence, entropy, np.concatenate(finite))

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


# Remasking (SDAR, arXiv 2510.06303, and its published script)


class Denoised(Protocol):
    """What remasking needs to know of a sequence's pass: a `SequencePass`."""

    options: GenerationConfig
    masked: Sequence[int] | np.ndarray  # rows that proposals are for
    count: int | None  # how many are fixed at least; None: all


class Candidates:
    """Proposals of some sequences with the same strategy, a row each, from the left.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of Denoised
        Whose masked rows they are for, one after the other.

    Attributes
    ----------
    valid : bool [sequences, width]
        Where there is a proposal.
    counts : int64 [sequences, 1]
        How many are fixed at least.
    """

    def __init__(self, proposals: Proposals, passes: Sequence[Denoised]) -> None:
        sizes = np.array([len(one.masked) for one in passes])
        self.valid = np.arange(sizes.max()) < sizes[:, None]
        counts = [len(one.masked) if one.count is None else one.count for one in passes]
        self.counts = np.array(counts)[:, None]
        self._proposals = proposals
        self._passes = passes

    @cached_property
    def confidence(self) -> np.ndarray:
        """Of each proposal; -inf where there is none."""
        return self._spread(self._proposals.confidence, -np.inf)

    @cached_property
    def entropy(self) -> np.ndarray:
        """Of each proposal's distribution; inf where there is none."""
        return self._spread(self._proposals.entropy, np.inf)

    def _spread(self, values: np.ndarray, outside: float) -> np.ndarray:
        spread = np.full(self.valid.shape, outside, np.float32)
        spread[self.valid] = values
        return spread

    def option(self, name: str) -> np.ndarray:
        """An option of the sequences: float32 [sequences, 1]."""
        return np.array([getattr(one.options, name) for one in self._passes], np.float32)[:, None]


def choose(proposals: Proposals, passes: Sequence[Denoised]) -> np.ndarray:
    """Which proposals are fixed, as each sequence's strategy says.

    Parameters
    ----------
    proposals : Proposals
    passes : sequence of Denoised
        Whose masked rows they are for, one after the other.

    Returns
    -------
    bool [rows]
    """
    names = [one.options.remasking for one in passes]
    if names.count(names[0]) == len(names):
        candidates = Candidates(proposals, passes)
        chosen = STRATEGIES[names[0]](candidates)
        chosen |= [[one.count is None] for one in passes]
        return chosen[candidates.valid]
    chosen = np.empty(len(proposals.tokens), bool)
    for name in set(names):
        of_name = [one for one, own in zip(passes, names, strict=True) if own == name]
        rows = np.repeat([own == name for own in names], [len(one.masked) for one in passes])
        fields = proposals.tokens, proposals.confidence, proposals.entropy
        chosen[rows] = choose(Proposals(*(field[rows] for field in fields)), of_name)
    return chosen


def transfer_counts(block_length: int, steps: int) -> list[int]:
    """How many tokens each of `steps` passes fixes at least, so that all fix a block."""
    base, remainder = divmod(block_length, steps)
    return [base + (step < remainder) for step in range(steps)]


Strategy = Callable[[Candidates], np.ndarray]


def sequential(candidates: Candidates) -> np.ndarray:
    """The leftmost masked positions."""
    return np.arange(candidates.valid.shape[1]) < candidates.counts


def low_confidence_static(candidates: Candidates) -> np.ndarray:
    """The most confident proposals."""
    return _first(candidates, np.argsort(-candidates.confidence, axis=1, kind="stable"), candidates.counts)


def low_confidence_dynamic(candidates: Candidates) -> np.ndarray:
    """All proposals above the confidence threshold, but at least the `count` most confident."""
    above = candidates.confidence > candidates.option("confidence_threshold")
    enough = above.sum(axis=1, keepdims=True) >= candidates.counts
    return above if enough.all() else np.where(enough, above, low_confidence_static(candidates))


def entropy_bounded(candidates: Candidates) -> np.ndarray:
    """Proposals by ascending entropy while its running sum stays within the bound, at least one.

    `count` does not matter. The published script takes the entropy from the chosen token's
    probability alone; this is the entropy of the whole distribution.
    """
    order = np.argsort(candidates.entropy, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(candidates.entropy, order, axis=1), axis=1)
    within = (sums <= candidates.option("eb_threshold")).sum(axis=1, keepdims=True)
    return _first(candidates, order, np.maximum(1, within))


def _first(candidates: Candidates, order: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The first so many of each row, in an order."""
    chosen = np.empty(order.shape, bool)
    np.put_along_axis(chosen, order, np.arange(order.shape[1]) < counts, axis=1)
    return chosen


STRATEGIES: dict[str, Strategy] = {
    strategy.__name__: strategy
    for strategy in (sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded)
}


def check_remasking(name: str) -> None:
    """Raise OptionError where there is no remasking strategy of this name."""
    if not isinstance(name, str) or name not in STRATEGIES:
        raise OptionError(f"remasking must be one of {', '.join(STRATEGIES)}, not {name!r}")
