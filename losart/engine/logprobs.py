"""The log-probabilities of the tokens that a sequence's passes fix."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np

from losart.engine.batch import SequencePass
from losart.engine.sampling import Proposals
from losart.observe.step import TokenLogprob


class LogprobRecorder:
    """A hook that changes nothing, and keeps the log-probabilities of what is fixed.

    Parameters
    ----------
    count : int
        Of the most probable tokens, those that are kept of each position.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: dict[int, np.ndarray] = {}  # of the last pass, by the row of the block
        self._found: dict[int, TokenLogprob] = {}  # by position

    def revise(self, asked: SequencePass, proposals: Proposals) -> Proposals:
        """Keep the logits until it is known what the pass fixes."""
        assert proposals.logits is not None
        self._rows = dict(zip(asked.targets, proposals.logits, strict=True))
        return proposals

    def fixed(self, start: int, tokens: Iterable[tuple[int, int]], pass_number: int) -> None:
        """Note the tokens that the last pass has fixed or changed.

        Parameters
        ----------
        start : int
            Position of the block's first row.
        tokens : iterable of tuple of int
            Row of the block, and token.
        pass_number : int
        """
        for row, token in tokens:
            self._found[start + row] = token_logprob(self._rows[row], token, self._count, pass_number)
        self._rows = {}

    def of(self, first: int, count: int) -> list[TokenLogprob]:
        """Of so many positions, all fixed."""
        return [self._found[position] for position in range(first, first + count)]


def token_logprob(logits: np.ndarray, token: int, count: int, pass_number: int = 0) -> TokenLogprob:
    """A token's log-probability among logits [vocab], and those of the `count` most probable tokens.

    Of equal ones the lower ids come first; tokens of logits of -inf are none of them.
    """
    values = log_softmax(logits)
    order = np.empty(0, np.int64)
    if count:
        lowest = np.partition(values, -count)[-count] if count < len(values) else -np.inf
        order = np.flatnonzero((values >= lowest) & (values > -np.inf))
        order = order[np.argsort(-values[order], kind="stable")]
    top = tuple((int(one), float(values[one])) for one in islice(order, count))
    return TokenLogprob(int(token), float(values[token]), top, pass_number)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
